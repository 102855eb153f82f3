"""What a method's evaluations buy: how far it stays above the best allocation that is known of the same cell."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from impq_edge.study.cells import Cell
from impq_edge.study.contests import CALIBRATION, Contest, calibration_contests, contests_of, methods_of
from impq_edge.study.tally import TIE_NATS

HELD_OUT = "held out"
EVERY_MODEL = "all"

_RESAMPLES = 400
_COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Regret:
    """A method over contests."""

    model: str  # or EVERY_MODEL
    judged: str  # CALIBRATION, which the methods minimise, or HELD_OUT
    method: str
    contests: int
    evaluations: float | None  # for all averages of a cell together; the median over cells
    median_nats: float | None  # of the loss above the best known, nats per token
    low_nats: float | None  # 95 % interval of that median: cells are drawn anew, each with all its contests
    high_nats: float | None
    at_best: int  # contests in which no better allocation is known

    @property
    def median_change(self) -> float | None:
        """The perplexity above the best known, relative."""
        return None if self.median_nats is None else math.expm1(self.median_nats)


def regret(cells: Sequence[Cell], seed: int = 0) -> tuple[Regret, ...]:
    """Return every method's regret, over all models and for each, on the calibration text and on held-out ones.

    The best known allocation of a contest is the best of all answers of its cell for as many or fewer bits, judged on
    the same text: on held-out texts a method that minimised the calibration loss perfectly need not reach it.
    """
    rows = []
    for judged, contests in ((CALIBRATION, calibration_contests(cells)), (HELD_OUT, contests_of(cells))):
        excess = _excess(contests)
        for method in methods_of(contests):
            found = [(contest, nats[method]) for contest, nats in zip(contests, excess, strict=True) if method in nats]
            for model in (EVERY_MODEL, *sorted({contest.cell.model for contest in contests})):
                here = [(contest, nats) for contest, nats in found if model in (EVERY_MODEL, contest.cell.model)]
                rows.append(_regret(here, model, judged, method, np.random.default_rng(seed)))
    return tuple(rows)


def _excess(contests: Sequence[Contest]) -> list[dict[str, float]]:
    """Return for every contest each method's loss above the best known."""
    best: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for contest in contests:
        known = best.setdefault((contest.cell.name, contest.text), [])
        known += [(contest.average_bits, p.loss) for p in contest.points.values() if p.coalition is not None]
    found = []
    for contest in contests:
        known = best[contest.cell.name, contest.text]
        lowest = min((loss for bits, loss in known if bits <= contest.average_bits), default=math.inf)
        found.append({method: max(0.0, point.loss - lowest) for method, point in contest.points.items()})
    return found


def _regret(
    found: Sequence[tuple[Contest, float]], model: str, judged: str, method: str, random: np.random.Generator
) -> Regret:
    if not found:
        return Regret(model, judged, method, 0, None, None, None, None, 0)
    of_cell: dict[str, list[float]] = {}
    for contest, nats in found:
        of_cell.setdefault(contest.cell.name, []).append(nats)
    low, high = _interval([*of_cell.values()], random)
    evaluations = {contest.cell.name: contest.points[method].evaluations for contest, _ in found}
    return Regret(
        model, judged, method, len(found), statistics.median(evaluations.values()),
        statistics.median(nats for _, nats in found), low, high, sum(nats < TIE_NATS for _, nats in found),
    )  # fmt: skip


def _interval(
    of_cells: Sequence[Sequence[float]], random: np.random.Generator
) -> tuple[float, float] | tuple[None, None]:
    """Return the bootstrap interval of the median; None of fewer than two cells."""
    if len(of_cells) < 2:
        return None, None
    table = np.array([*itertools.zip_longest(*of_cells, fillvalue=math.nan)]).T  # (cells, contests of the longest)
    draws = random.integers(len(of_cells), size=(_RESAMPLES, len(of_cells)))
    median = np.nanmedian if np.isnan(table).any() else np.median
    tail = (1 - _COVERAGE) / 2
    low, high = np.quantile(median(table[draws].reshape(_RESAMPLES, -1), axis=1), [tail, 1 - tail])
    return float(low), float(high)
