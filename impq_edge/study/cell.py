"""One cell of the study: one model, backend, player kind, calibration text and seed; every method, every budget."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from impq_edge.impq.allocate import average_bits_constraint
from impq_edge.impq.allocation import PUBLISHED_TYPES
from impq_edge.impq.baselines import METRICS
from impq_edge.model.calibration import Windows
from impq_edge.spqe.isolated import isolated_scores
from impq_edge.spqe.journal import to_text
from impq_edge.spqe.sampling import Coalition, uniform
from impq_edge.spqe.table import Job, Progress
from impq_edge.study import methods
from impq_edge.study.lab import Asked, Lab, Objective
from impq_edge.study.methods import Answers, Setting

AVERAGE_BITS = tuple(Fraction(quarter, 4) for quarter in range(9, 16))
"""2.25 to 3.75."""

RANDOMS = 5
SHARE = 3
"""Methods that choose what to evaluate get this share, one third, of what the published estimator evaluates."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a method chose for every budget."""

    name: str
    answers: Answers
    evaluations: int
    seconds: float


def run_cell(
    job: Job, held_out: Mapping[str, Windows], seed: int, journal: Path, progress: Progress = lambda *_: None,
    wanted: Callable[[str], bool] = lambda _: True,
) -> dict[str, Any]:  # fmt: skip
    """Play every method on one game, and examine what they chose on held-out text."""
    started = time.monotonic()
    lab = Lab(job, held_out, journal, progress)
    constraints = tuple(average_bits_constraint(lab.players, PUBLISHED_TYPES, target) for target in AVERAGE_BITS)
    scores: dict[str, Any] = {**isolated_scores(job, progress)} if wanted("lim") else {}
    answered: list[Answered] = []
    setting = Setting(constraints, 0, seed)

    def add(name: str, asked: Asked | None, answer: Callable[[], Answers]) -> None:
        if wanted(name):
            begun = time.monotonic()
            answers = answer()
            spent = time.monotonic() - begun
            answered.append(Answered(name, answers, asked.evaluations if asked else 0, spent))
            progress(name, len(answered), 0)

    for metric in METRICS if scores else ():
        add(metric, None, lambda metric=metric: methods.by_scores(scores[metric], setting))  # type: ignore[misc]
    for index in range(RANDOMS):
        add(f"random-mean-{index}", None, lambda i=index: methods.random_answers(len(lab.players), setting, i))  # type: ignore[misc]
    for objective, suffix in _OBJECTIVES:
        setting = _play(lab, objective, suffix, constraints, seed, scores, add)
    coalitions = {c for each in answered for c in each.answers}
    exams = {}
    everything = [uniform(2, len(lab.players)), uniform(4, len(lab.players)), *sorted(coalitions)]
    for done, coalition in enumerate(dict.fromkeys(everything), 1):
        exams[to_text(coalition)] = _examined(lab, coalition)
        progress("examining", done, len(everything))
    return {
        "schema": "impq-edge.study/1",
        "tokens": job.settings.tokens,
        "window_tokens": job.settings.window_tokens,
        "dtype": job.settings.dtype,
        "calibration_tokens": job.settings.calibration_tokens,
        "backend_settings": job.settings.backend,
        "model_sha256": job.spec.content_sha256,
        "bits_per_weight": list(lab.prepared.bits_per_weight),
        "budgeted_evaluations": setting.evaluations,
        "player_names": [player.name for player in lab.players],
        "player_weights": [player.weights for player in lab.players],
        "scores": {name: [float(f"{v:.6g}") for v in values] for name, values in scores.items()},
        "answers": _answers(lab, answered),
        "exams": exams,
        "unquantised": {name or "calibration": float(v.mean()) for name, v in lab.unquantised.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


_OBJECTIVES: tuple[tuple[Objective, str], ...] = (("loss", ""), ("divergence", "-kl"))


def _play(  # the order is free: what one method asks, another finds answered
    lab: Lab,
    objective: Objective,
    suffix: str,
    constraints: Any,
    seed: int,
    scores: dict[str, Any],
    add: Callable[[str, Asked | None, Callable[[], Answers]], None],
) -> Setting:
    def fresh() -> Asked:
        return Asked(lab, objective)

    setting = Setting(constraints, 0, seed)
    asked = fresh()
    found = methods.shapley(asked, setting)
    setting = dataclasses.replace(setting, evaluations=asked.evaluations // SHARE)
    scores[f"phi{suffix}"], scores[f"phi-stderr{suffix}"] = found.phi, found.phi_stderr
    add(f"phi{suffix}", asked, lambda: methods.by_scores(found.phi, setting))
    add(f"phi-variance{suffix}", asked, lambda: methods.with_variance(found, setting, 0.5))
    for alpha in (0.0, 0.5, 1.0):
        add(f"impq-{alpha:g}{suffix}", asked, lambda a=alpha: methods.impq(found, setting, a))  # type: ignore[misc]
    add(f"impq-shuffled{suffix}", asked, lambda: methods.shuffled(found, setting, 0.5))
    third = fresh()
    fewer = methods.shapley(third, setting, methods.PERMUTATIONS // SHARE)
    add(f"impq-third{suffix}", third, lambda: methods.impq(fewer, setting, 0.5))
    one, other = fresh(), fresh()
    scores[f"singles{suffix}"], scores[f"leave-one-out{suffix}"] = methods.singles(one), methods.leave_one_out(other)
    add(f"singles{suffix}", one, lambda: methods.by_scores(scores[f"singles{suffix}"], setting))
    add(f"leave-one-out{suffix}", other, lambda: methods.by_scores(scores[f"leave-one-out{suffix}"], setting))
    for name, method in _ADAPTIVE.items():
        own = fresh()
        add(f"{name}{suffix}", own, lambda m=method, a=own: m(a, setting))  # type: ignore[misc]
    return setting


_ADAPTIVE: dict[str, Callable[[Asked, Setting], Answers]] = {
    "phi-stratified": methods.stratified,
    "pairwise": methods.pairwise,
    "clado": methods.clado,
    "random-best": methods.random_best,
    "evolution": methods.evolution,
    "rounds": lambda asked, setting: methods.rounds(asked, setting, 0.4),
}


def _answers(lab: Lab, answered: list[Answered]) -> list[dict[str, Any]]:
    rows = []
    for each in answered:
        measured = lab.ask(each.answers)
        for target, coalition, (loss, divergence) in zip(AVERAGE_BITS, each.answers, measured.tolist(), strict=True):
            rows.append({
                "method": each.name, "average_bits": float(target), "coalition": to_text(coalition),
                "evaluations": each.evaluations, "seconds": round(each.seconds, 2),
                "loss": round(loss, 6), "divergence": round(divergence, 6),
            })  # fmt: skip
    return rows


def _examined(lab: Lab, coalition: Coalition) -> dict[str, Any]:
    found = {}
    for name, exam in lab.examine(coalition).items():
        found[name] = {
            "loss": round(float(exam.losses.mean()), 6),
            "loss_se": round(_standard_error(exam.losses), 6),
            "kl": round(float(exam.divergences.mean()), 6),
            "kl_se": round(_standard_error(exam.divergences), 6),
            "losses": [float(f"{loss:.5g}") for loss in exam.losses],
        }
    return found


def _standard_error(values: np.ndarray[Any, Any]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
