"""One cell of the study: one model, backend, player kind, calibration text and seed; every method, every budget."""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import BITS
from impq_edge.backends.kquant import KQuant
from impq_edge.impq.allocate import average_bits_constraint
from impq_edge.impq.allocation import PUBLISHED_TYPES, Objective
from impq_edge.impq.baselines import METRICS, baseline_bits
from impq_edge.model.calibration import Windows
from impq_edge.model.players import Player
from impq_edge.spqe.isolated import isolated_scores
from impq_edge.spqe.journal import from_text, to_text
from impq_edge.spqe.playing import CURVE, as_coalition
from impq_edge.spqe.sampling import Coalition, uniform
from impq_edge.spqe.surrogate import ADDITIVE, Prior
from impq_edge.spqe.table import Job, Progress
from impq_edge.study import methods
from impq_edge.study.cells import Answer, Cell, Exam, Unquantised
from impq_edge.study.lab import Asked, Lab
from impq_edge.study.methods import Answers, Setting
from impq_edge.study.remembering import Remembering

RANDOMS = 5
FEWER = 3
"""Methods that choose what to evaluate get a third of what the published estimator evaluates."""

NO_LINK = Prior(powers=(1.0,), ceilings=(np.inf,))
"""Pairs and remainder, of the increase itself."""

_OBJECTIVES: tuple[tuple[Objective, str], ...] = (("loss", ""), ("divergence", "-kl"))

_ON_THE_LOSS_ALONE = {
    "clado", "random-best", "evolution", "evolution-seeded", "rounds-additive", "rounds-no-link", "rounds-half",
    "rounds-quarter",
}  # fmt: skip
"""Methods that evaluate what nobody else does, and are not played on the divergence again."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a method chose for every budget."""

    name: str
    answers: Answers
    evaluations: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which cell is played, and how."""

    model: str
    backend: str
    text: str  # calibrated on, by name
    seed: int
    permutations: int = methods.PERMUTATIONS
    skipped: frozenset[str] = frozenset()  # methods that are not played
    lent: Collection[str] = ()  # coalitions that are examined as well: what was chosen on other backends


def run_cell(
    plan: Plan, job: Job, held_out: Mapping[str, Windows], journal: Path, progress: Progress = lambda *_: None
) -> Cell:
    """Play every method on one game, and examine what they chose on held-out text.

    Raises
    ------
    SensitivityError
        When a loss is not finite, or the GPU's memory does not suffice.
    """
    started = time.monotonic()
    if not isinstance(job.backend, KQuant):  # whose encodings are kept on disk
        job = dataclasses.replace(job, backend=Remembering(job.backend))
    lab = Lab(job, held_out, journal, progress)
    constraints = tuple(average_bits_constraint(lab.players, PUBLISHED_TYPES, target) for target in CURVE)
    scores: dict[str, Any] = dict(isolated_scores(job, progress).items())
    answered: list[Answered] = []
    setting = Setting(constraints, 0, plan.seed)

    def add(name: str, asked: Asked | None, answer: Callable[[], Answers]) -> None:
        if name not in plan.skipped:
            answers = answer()
            answered.append(Answered(name, answers, asked.evaluations if asked else 0))
            progress(name, len(answered), 0)

    for metric in METRICS:
        add(metric, None, functools.partial(_isolated, lab.players, scores[metric]))
    for index in range(RANDOMS):
        add(f"random-mean-{index}", None, functools.partial(methods.random_answers, len(lab.players), setting, index))
    for objective, suffix in _OBJECTIVES:
        setting = _play(lab, objective, suffix, setting, plan.permutations, scores, add)
    exams: dict[str, dict[str, Exam]] = {}
    everything = sorted(
        {c for each in answered for c in each.answers}
        | {uniform(bits, len(lab.players)) for bits in BITS}
        | {from_text(text) for text in plan.lent}
    )
    for done, coalition in enumerate(everything, 1):
        exams[to_text(coalition)] = _examined(lab, coalition)
        progress("examining", done, len(everything))
    return Cell(
        model=plan.model,
        backend=plan.backend,
        backend_settings={
            **job.settings.backend, "calibration_tokens": job.settings.calibration_tokens,
            "bits_per_weight": list(lab.prepared.bits_per_weight), "dtype": job.settings.dtype,
        },
        players=job.settings.players,
        text=plan.text,
        seed=plan.seed,
        tokens=job.settings.tokens,
        window_tokens=job.settings.window_tokens,
        device=torch.cuda.get_device_name() if job.settings.device == "cuda" else "cpu",
        versions={"torch": torch.__version__, "numpy": np.__version__},
        player_names=tuple(player.name for player in lab.players),
        player_weights=tuple(player.weights for player in lab.players),
        scores={name: tuple(np.asarray(values).tolist()) for name, values in scores.items()},
        answers=_answers(lab, answered),
        exams=exams,
        unquantised={
            name: Unquantised(float(losses.mean()), _standard_error(losses))
            for name, losses in lab.unquantised.items() if name
        },
        seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip


def _play(  # the order is free: what one method asks, another finds answered
    lab: Lab,
    objective: Objective,
    suffix: str,
    setting: Setting,
    permutations: int,
    scores: dict[str, Any],
    add: Callable[[str, Asked | None, Callable[[], Answers]], None],
) -> Setting:
    def fresh() -> Asked:
        return Asked(lab, objective)

    asked = fresh()
    found = methods.shapley(asked, setting, permutations)
    setting = dataclasses.replace(setting, evaluations=asked.evaluations // FEWER)
    scores[f"phi{suffix}"], scores[f"phi-stderr{suffix}"] = found.phi, found.phi_stderr
    add(f"phi{suffix}", asked, lambda: methods.by_scores(found.phi, setting))
    add(f"phi-variance{suffix}", asked, lambda: methods.with_variance(found, setting, 0.5))
    for alpha in (0.0, 0.5, 1.0):
        add(f"impq-{alpha:g}{suffix}", asked, functools.partial(methods.impq, found, setting, alpha))
    add(f"impq-shuffled{suffix}", asked, lambda: methods.shuffled(found, setting, 0.5))
    third = fresh()
    fewer = methods.shapley(third, setting, max(1, permutations // FEWER))
    add(f"impq-third{suffix}", third, lambda: methods.impq(fewer, setting, 0.5))
    one, other = fresh(), fresh()
    scores[f"singles{suffix}"], scores[f"leave-one-out{suffix}"] = methods.singles(one), methods.leave_one_out(other)
    add(f"singles{suffix}", one, lambda: methods.by_scores(scores[f"singles{suffix}"], setting))
    add(f"leave-one-out{suffix}", other, lambda: methods.by_scores(scores[f"leave-one-out{suffix}"], setting))
    for name, method in _ADAPTIVE.items():
        if objective == "divergence" and name in _ON_THE_LOSS_ALONE:
            continue
        own = fresh()
        add(f"{name}{suffix}", own, functools.partial(method, own, setting))
    return setting


_ADAPTIVE: dict[str, Callable[[Asked, Setting], Answers]] = {
    "phi-stratified": methods.stratified,
    "pairwise": methods.pairwise,
    "clado": methods.clado,
    "random-best": methods.random_best,
    "evolution": methods.evolution,
    "evolution-seeded": methods.evolution_from_singles,
    "rounds": methods.rounds,
    "rounds-additive": lambda asked, setting: methods.rounds(asked, setting, prior=ADDITIVE),
    "rounds-no-link": lambda asked, setting: methods.rounds(asked, setting, prior=NO_LINK),
    "rounds-half": lambda asked, setting: methods.rounds(asked, setting, 1 / 2),
    "rounds-quarter": lambda asked, setting: methods.rounds(asked, setting, 1 / 4),
}


def _isolated(players: Sequence[Player], harm: NDArray[np.float64]) -> Answers:
    return [as_coalition(baseline_bits(players, harm, target)) for target in CURVE]


def _answers(lab: Lab, answered: list[Answered]) -> tuple[Answer, ...]:
    return tuple(
        Answer(each.name, float(target), to_text(coalition), each.evaluations, loss, divergence)
        for each in answered
        for target, coalition, (loss, divergence) in zip(
            CURVE, each.answers, lab.ask(each.answers).tolist(), strict=True
        )
    )


def _examined(lab: Lab, coalition: Coalition) -> dict[str, Exam]:
    return {
        name: Exam(
            loss=float(found.losses.mean()),
            loss_se=_standard_error(found.losses),
            kl=float(found.divergences.mean()),
            kl_se=_standard_error(found.divergences),
            losses=tuple(found.losses.tolist()),
        )
        for name, found in lab.examine(coalition).items()
    }


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
