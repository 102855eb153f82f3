"""Cells as contests: one cell at one average of bits on one held-out text, and where every method ended there."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from impq_edge.study.cells import Cell, Exam

ISOLATED = ("llm-mq", "lim", "zd", "activation")
"""The published baselines: one number per player, measured without quantising the others."""

BEST_ISOLATED = "best isolated"
"""The lowest of :data:`ISOLATED` in a contest, chosen after the exam: harder to beat than any one of them."""

RANDOM_MEAN = "random-mean"
"""The mean over the random allocations ``random-mean-0``, ``random-mean-1`` … of a contest."""

ORDER = (
    *ISOLATED, BEST_ISOLATED, "singles", "leave-one-out", "phi", "phi-variance", "impq-0", "impq-0.5", "impq-1",
    "impq-shuffled", "pairwise", "clado", RANDOM_MEAN, "random-best", "evolution",
)  # fmt: skip
"""The methods that the study compares with, in the order of its tables; others follow."""

CALIBRATION = "calibration"
"""In place of a held-out text: the loss that the methods themselves minimise."""


@dataclasses.dataclass(frozen=True, order=True)
class Game:
    """What is played: cells of one game share everything but the calibration text and the seed."""

    model: str
    backend: str
    players: str

    def __str__(self) -> str:
        return f"{self.model}, {self.backend}, {self.players}"


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a method ended in a contest."""

    loss: float  # nats per token
    kl: float
    evaluations: int
    coalition: str | None  # None where it stands for several
    losses: tuple[float, ...]  # of every window; none on the calibration text


@dataclasses.dataclass(frozen=True)
class Contest:
    """One cell at one average of bits, on one held-out text."""

    cell: Cell
    game: Game
    text: str  # held out, or CALIBRATION
    average_bits: float
    points: Mapping[str, Point]

    def difference(self, method: str, other: str) -> float | None:
        """Return the loss of a method less that of another, nats per token; None where one is missing."""
        if method not in self.points or other not in self.points:
            return None
        return self.points[method].loss - self.points[other].loss


def game_of(cell: Cell) -> Game:
    """Return the game of a cell."""
    return Game(cell.model, cell.backend, cell.players)


def contests_of(cells: Iterable[Cell]) -> tuple[Contest, ...]:
    """Return the contests of all cells on all held-out texts."""
    return tuple(
        contest for cell in cells for text in cell.unquantised for contest in _contests(cell, text)
    )  # fmt: skip


def calibration_contests(cells: Iterable[Cell]) -> tuple[Contest, ...]:
    """Return the contests of all cells by their calibration loss."""
    return tuple(contest for cell in cells for contest in _contests(cell, CALIBRATION))


def _contests(cell: Cell, text: str) -> list[Contest]:
    found: dict[float, dict[str, Point]] = {}
    for answer in cell.answers:
        exam = (
            Exam(answer.loss, 0, answer.divergence, 0, ())
            if text == CALIBRATION
            else cell.exams[answer.coalition][text]
        )
        point = Point(exam.loss, exam.kl, answer.evaluations, answer.coalition, exam.losses)
        found.setdefault(answer.average_bits, {})[answer.method] = point
    return [Contest(cell, game_of(cell), text, bits, _with_derived(found[bits])) for bits in sorted(found)]


def _with_derived(points: dict[str, Point]) -> dict[str, Point]:
    """Add the best isolated metric, where all of them are there, and the mean of the random allocations."""
    random = [name for name in points if name.startswith(f"{RANDOM_MEAN}-")]
    derived = {name: point for name, point in points.items() if name not in random}
    if all(name in points for name in ISOLATED):
        derived[BEST_ISOLATED] = min((points[name] for name in ISOLATED), key=lambda point: point.loss)
    if random:
        derived[RANDOM_MEAN] = _mean([points[name] for name in random])
    return derived


def _mean(points: Sequence[Point]) -> Point:
    return Point(
        loss=statistics.fmean(point.loss for point in points),
        kl=statistics.fmean(point.kl for point in points),
        evaluations=max(point.evaluations for point in points),
        coalition=points[0].coalition if len({point.coalition for point in points}) == 1 else None,
        losses=tuple(statistics.fmean(losses) for losses in zip(*(point.losses for point in points), strict=True)),
    )


def methods_of(contests: Iterable[Contest]) -> tuple[str, ...]:
    """Return every method of some contests: the known ones in the order of the tables, then the others by name."""
    found = {method for contest in contests for method in contest.points}
    return (*(method for method in ORDER if method in found), *sorted(found - set(ORDER)))


def games_of(contests: Iterable[Contest]) -> tuple[Game, ...]:
    """Return every game of some contests."""
    return tuple(sorted({contest.game for contest in contests}))
