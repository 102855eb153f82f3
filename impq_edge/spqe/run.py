"""The stage: checkpoint and text in, sensitivity profile out; resumable at every evaluation."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_edge.backends import Backend, describe
from impq_edge.errors import SensitivityError
from impq_edge.impq.allocation import Objective
from impq_edge.model.calibration import Windows
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.spqe.cluster import Evaluator, RayEvaluator
from impq_edge.spqe.estimate import Estimate, estimate
from impq_edge.spqe.game import Prepared
from impq_edge.spqe.journal import Journal, from_text, to_text
from impq_edge.spqe.playing import evaluations_for, play_rounds
from impq_edge.spqe.profile import Design, GameSettings, SensitivityProfile, StoppedBy
from impq_edge.spqe.rounds import design as first_part
from impq_edge.spqe.sampling import Coalition, Draw, coalitions_of, draws, draws_for, evaluation_order
from impq_edge.spqe.stopping import Stability
from impq_edge.spqe.table import Job, Progress, set_table, set_table_elsewhere

COMPUTE_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}

Answer = Callable[[Estimate], Hashable]
"""What an estimate is for: a run may stop once this has stopped changing."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """Where evaluations run, if not in this process."""

    count: int = 0  # 0: in this process, without Ray
    address: str | None = None  # of a running Ray cluster


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run ends before all draws of its design are evaluated."""

    answer: Answer | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """A profile and what its run cost; the cost stays out of the profile, which is the same on every run."""

    profile: SensitivityProfile
    evaluations: int  # made by this run, not counting those known before
    recomputed_share: float  # of the blocks, on average over this run's evaluations
    streamed_blocks: int  # blocks that waited in host memory, for want of GPU memory
    journal_is_in_profile: bool


def game_settings(
    backend_name: str,
    backend: Backend,
    windows: Windows,
    *,
    players: PlayerKind,
    device: str,
    calibration: Windows | None = None,
    objective: Objective = "loss",
) -> GameSettings:
    """Gather everything besides the model that the losses depend on.

    ``calibration`` is what the backend's statistics come from; ``windows`` by default.
    """
    seen = 0 if backend.statistics == "none" else (calibration or windows).tokens.size
    return GameSettings(
        backend=describe(backend_name, backend),
        players=players,
        text_sha256=windows.text_sha256,
        tokens=windows.tokens.size,
        window_tokens=windows.tokens.shape[1],
        device=device,
        dtype=COMPUTE_DTYPES[device],
        calibration_tokens=seen,
        objective=objective,
    )


def estimate_sensitivity(
    job: Job,
    header_bytes: int,
    design: Design,
    journal_path: Path,
    *,
    before: SensitivityProfile | None = None,
    limits: Limits | None = None,
    workers: Workers | None = None,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Run SPQE: evaluate the coalitions of a design and of its rounds, and estimate φ and C from its draws.

    Losses are appended to ``journal_path`` as they are measured; a second call with the same inputs
    goes on where the first was stopped. Losses of an earlier profile of the same game, ``before``, are kept and not
    measured again; where they are all that is needed, the model is not even loaded. Where a run
    stops by stability depends on the losses alone, not on how many workers measured them.

    Raises
    ------
    SensitivityError
        When the journal belongs to other inputs, a loss is not finite, or the time was too short for one round.
    """
    limits = limits or Limits()
    deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
    journal = Journal(journal_path, {"model": job.spec.content_sha256, **job.settings.identity()})
    workers = workers or Workers()
    known = before.window_losses if before else {}
    losses = {**known, **{from_text(of): values for of, values in journal.losses.items()}}
    make = _Run if design.rounds is None else _Rounds
    run = make(job, design, losses, journal, limits.answer, deadline, max(1, workers.count), progress)
    with _table(job, workers, before if run.is_known else None, progress) as (evaluator, prepared, streamed):
        found, stopped_by = run.play(evaluator)
        evaluations, share = evaluator.evaluations, evaluator.recomputed_share
    profile = SensitivityProfile.from_losses(
        model=job.spec,
        header_bytes=header_bytes,
        settings=job.settings,
        design=design,
        stopped_by=stopped_by,
        bits_per_weight=prepared.bits_per_weight,
        reference_losses=prepared.reference_losses,
        draws=found,
        losses=run.losses,
        also={*known, *run.seen},
    )
    kept = {evaluation.coalition for evaluation in profile.evaluations}
    in_profile = kept.issuperset(journal.losses)
    return Measured(profile, evaluations, share, streamed, in_profile)


@contextlib.contextmanager
def _table(
    job: Job, workers: Workers, before: SensitivityProfile | None, progress: Progress
) -> Iterator[tuple[Any, Prepared, int]]:
    """Set the game up here, or on every worker; or nowhere, where ``before`` knows everything."""
    if before is not None:
        yield _Nobody(), Prepared(np.array(before.reference_losses), before.bits_per_weight), 0
        return
    if not workers.count:
        table = set_table(job, progress)
        yield table, table.prepared, table.streamed_blocks
        return
    make = functools.partial(set_table_elsewhere, job)
    gpus = job.settings.device == "cuda"
    with RayEvaluator(make, workers.count, gpus=gpus, address=workers.address) as evaluator:
        progress("quantising on the workers", 0, 1)
        prepared, streamed = evaluator.ask(_facts)
        progress("quantising on the workers", 1, 1)
        yield evaluator, prepared, streamed


def _facts(table: Any) -> tuple[Prepared, int]:
    return table.prepared, table.streamed_blocks


class _Nobody:
    """Evaluates nothing, because nothing is left to be evaluated."""

    evaluations = 0
    recomputed_share = 0.0

    def evaluate(self, coalitions: Sequence[Coalition]) -> Generator[tuple[Coalition, NDArray[np.float64]], None, None]:
        assert not coalitions
        yield from ()


class _Run:
    """The evaluations of one design, in rounds that cost about as much as one permutation each."""

    def __init__(
        self,
        job: Job,
        design: Design,
        losses: dict[Coalition, NDArray[np.float64]],
        journal: Journal,
        answer: Answer | None,
        deadline: float | None,
        ahead: int,
        progress: Progress,
    ) -> None:
        self.losses = losses
        self.seen: dict[Coalition, float] = {}  # what rounds asked for, in turn; nats per token
        self._design = design
        self._journal = journal
        self._answer = answer
        self._deadline = deadline
        self._ahead = ahead
        self._progress = progress
        self._n_players = len(players_of(job.spec, job.settings.players))
        self._draws, self._total = self._planned()

    def _planned(self) -> tuple[list[Draw], int]:
        """Return the draws of the design, and how many evaluations there will be."""
        estimator, n_players = self._design.estimator, self._n_players
        count = draws_for(estimator, n_players, self._design.permutations)
        found = draws(estimator, n_players, count, self._design.seed)
        return found, len(self._order(found))

    @property
    def is_known(self) -> bool:
        """Whether every loss has been measured already."""
        return not self._missing(self._draws)

    def play(self, evaluator: Evaluator) -> tuple[list[Draw], StoppedBy]:
        """Evaluate until all draws are done or a limit is reached; return the draws that count."""
        if self._answer is None and self._deadline is None:
            self._evaluate(evaluator, self._draws)  # in one go, which reuses the most activations
            return self._draws, "permutations"
        step = draws_for(self._design.estimator, self._n_players, 1)
        ends = [*range(step, len(self._draws), step), len(self._draws)]
        stability = Stability()
        for index, end in enumerate(ends):
            in_time = True
            if self._missing(self._draws[:end]):  # then go a little further, so that every worker has a round to play
                in_time = self._evaluate(evaluator, self._draws[: ends[min(index + self._ahead, len(ends)) - 1]])
            if not in_time and self._missing(self._draws[:end]):
                return self._cut_short(ends[index - 1] if index else 0), "time"
            if self._answer is not None and stability.add(self._answer(self._estimate(self._draws[:end]))):
                return self._draws[:end], "stability"
        return self._draws, "permutations"

    def _evaluate(self, evaluator: Evaluator, wanted: Sequence[Draw]) -> bool:
        """Measure what is missing; return whether that ended before the deadline."""
        return self._measure(evaluator, self._missing(wanted))

    def _measure(self, evaluator: Evaluator, missing: Sequence[Coalition]) -> bool:
        self._told()
        with contextlib.closing(evaluator.evaluate(missing)) as results:
            for left, (coalition, losses) in enumerate(results, 1 - len(missing)):
                self._journal.add(to_text(coalition), losses)
                self.losses[coalition] = losses
                self._told()
                if left and self._deadline is not None and time.monotonic() > self._deadline:
                    return False
        return True

    def _missing(self, wanted: Sequence[Draw]) -> list[Coalition]:
        return [coalition for coalition in self._order(wanted) if coalition not in self.losses]

    def _told(self) -> None:
        self._progress("evaluating", min(len(self.losses), self._total), self._total)

    def _cut_short(self, done: int) -> list[Draw]:
        if not done:
            raise SensitivityError(
                f"--time-limit ended the run after {len(self.losses)} evaluations, before the first round was whole; "
                "they are kept: run the same command again to go on."
            )
        return self._draws[:done]

    def _estimate(self, wanted: list[Draw]) -> Estimate:
        means = {c: float(self.losses[c].mean()) for c in self._order(wanted)}
        return estimate(self._design.estimator, self._n_players, wanted, means)

    def _order(self, wanted: Sequence[Draw]) -> list[Coalition]:
        return evaluation_order(self._design.estimator, wanted, self._n_players)


class _Rounds(_Run):
    """The evaluations of a design, then rounds; what they ask for follows from losses alone, whoever measured them."""

    def _planned(self) -> tuple[list[Draw], int]:
        assert self._design.rounds is not None
        self._rounds = self._design.rounds
        total = evaluations_for(self._n_players, self._design.permutations)
        self._first, pairs = first_part(self._n_players, total, self._rounds.share, self._design.seed)
        return pairs, total if self._rounds.budgets else len(self._first)

    @property
    def is_known(self) -> bool:
        """What rounds ask for is known only once they were played."""
        return not self._rounds.budgets and all(coalition in self.losses for coalition in self._first)

    def play(self, evaluator: Evaluator) -> tuple[list[Draw], StoppedBy]:
        """Evaluate the design and play the rounds, until all is done or time is over."""

        def ask(coalitions: Sequence[Coalition]) -> NDArray[np.float64]:
            if not self._measure(evaluator, sorted(c for c in coalitions if c not in self.losses)):
                raise _OutOfTimeError
            self.seen.update((coalition, float(self.losses[coalition].mean())) for coalition in coalitions)
            return np.array([self.seen[coalition] for coalition in coalitions])

        # In one go more activations are reused, but where time can run out, pairs are finished in turn.
        step = len(self._first) if self._deadline is None else self._n_players
        try:
            for start in range(0, len(self._first), step):
                ask(self._first[start : start + step])
            if self._rounds.budgets:
                play_rounds(ask, self.seen, self._draws, self._rounds, self._total)
        except _OutOfTimeError:
            return self._cut_short(len(self._whole_draws())), "time"
        return self._draws, "evaluations"

    def _whole_draws(self) -> list[Draw]:
        """Return the first draws, as far as all their coalitions were measured."""
        return list(
            itertools.takewhile(
                lambda draw: all(c in self.losses for c in coalitions_of("stratified", draw, self._n_players)),
                self._draws,
            )
        )


class _OutOfTimeError(Exception):
    """Ends a round that is under way."""
