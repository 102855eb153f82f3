"""Finer players against whole blocks, at equal average bits: the same cells but for the players, contest by contest."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from impq_edge.study.contests import Contest, Point
from impq_edge.study.tally import votes

METHODS = ("rounds", "rounds-kl", "singles", "singles-kl")
"""The search, and each player alone, which is what many players can afford."""

EVERY = "all"


@dataclasses.dataclass(frozen=True)
class Finer:
    """A method with finer players against a method with blocks, on one held-out text or all of them."""

    model: str  # or EVERY
    text: str  # or EVERY
    players: str
    method: str
    against: str  # with blocks
    contests: int
    evaluations: tuple[int, int]  # least and most of the cells, for all averages together
    lower: int  # in perplexity
    equal: int
    change: float  # of perplexity, median, as a share
    kl_lower: int
    kl_change: float  # of the KL divergence from the unquantised model, median, as a share


def finer(contests: Iterable[Contest], ours: str) -> tuple[Finer, ...]:
    """Compare each of some methods with what ours does with blocks, and with what it does with blocks itself."""
    cells: dict[tuple[str, str, str, int, str, float], dict[str, Contest]] = {}
    for contest in contests:
        cell = contest.cell
        key = (cell.model, cell.backend, cell.text, cell.seed, contest.text, contest.average_bits)
        cells.setdefault(key, {})[cell.players] = contest
    methods = dict.fromkeys([ours, *METHODS])
    rows = []
    for players in sorted({kind for kinds in cells.values() for kind in kinds} - {"blocks"}):
        for method in methods:
            for against in dict.fromkeys([ours, method]):
                paired = [
                    (key[0], key[4], kinds[players].points[method], kinds["blocks"].points[against])
                    for key, kinds in cells.items()
                    if {players, "blocks"} <= kinds.keys()
                    and method in kinds[players].points
                    and against in kinds["blocks"].points
                ]
                rows += list(_rows(players, method, against, paired))
    return tuple(rows)


def _rows(players: str, method: str, against: str, paired: Sequence[tuple[str, str, Point, Point]]) -> Iterator[Finer]:
    """Of all together, of every text and of every model."""
    models, texts = {model for model, *_ in paired}, {text for _, text, *_ in paired}
    for model, text in [(EVERY, EVERY), *((EVERY, t) for t in sorted(texts)), *((m, EVERY) for m in sorted(models))]:
        points = [(one, other) for m, t, one, other in paired if model in (m, EVERY) and text in (t, EVERY)]
        if not points:
            continue
        losses = [one.loss - other.loss for one, other in points]
        ratios = [one.kl / other.kl - 1 for one, other in points if other.kl > 0]
        counts = [one.evaluations for one, _ in points]
        lower, equal, *_ = votes(losses)
        yield Finer(
            model, text, players, method, against, len(points), (min(counts), max(counts)),
            lower, equal, math.expm1(statistics.median(losses)),
            sum(ratio < 0 for ratio in ratios), statistics.median(ratios) if ratios else 0.0,
        )  # fmt: skip
