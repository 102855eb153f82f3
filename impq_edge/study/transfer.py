"""Does a ranking carry over from one backend to another? Rank correlations, and the perplexity that is lost."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from impq_edge.study.cells import Cell
from impq_edge.study.tally import Mean, mean

SCORES = ("singles", "phi")
"""The measured rankings that one backend could lend another."""

LENT = ("activation", "singles", "phi", "impq-0.5", "rounds", "singles-kl", "rounds-kl")
"""Methods whose choices are examined on other backends."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Two backends that ranked the same players; a backend with itself is two seeds or two calibration texts."""

    model: str
    players: str
    score: str
    backend: str
    other: str
    pairs: int  # of cells
    median: float | None  # Spearman's rank correlation
    lowest: float | None
    highest: float | None


@dataclasses.dataclass(frozen=True)
class Lent:
    """Allocations that were chosen on one backend, examined on another that happens to know them."""

    model: str
    players: str
    method: str
    chosen_on: str
    used_on: str
    text: str  # held out
    allocations: int
    known: int  # of them, examined on the other backend too
    loss: Mean  # log perplexity less that of the same method's own choice there, over known allocations


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, ties at their mean rank; None where a side has one value only."""
    ranks, others = _ranks(one), _ranks(other)
    ranks, others = ranks - ranks.mean(), others - others.mean()
    spread = float(np.sqrt((ranks @ ranks) * (others @ others)))
    return float(ranks @ others) / spread if spread else None


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, times = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks: npt.NDArray[np.float64] = (last - (times - 1) / 2)[place]
    return ranks


def transfer(cells: Sequence[Cell], scores: Sequence[str] = SCORES) -> tuple[Transfer, ...]:
    """Correlate backends, for the same model, players, calibration text and seed, and each backend with itself.

    A backend with itself is the ceiling: how well its ranking agrees with that of another seed or calibration text.
    """
    rows = []
    for (model, players), found in _by_board(cells).items():
        backends = sorted({cell.backend for cell in found})
        for score, (one, other) in itertools.product(scores, itertools.combinations_with_replacement(backends, 2)):
            matched = list(_repeated(found, one) if one == other else _matched(found, one, other))
            values = [
                rho
                for a, b in matched
                if score in a.scores and score in b.scores
                if (rho := spearman(a.scores[score], b.scores[score])) is not None
            ]
            rows.append(_transfer((model, players, score, one, other), values))
    return tuple(rows)


def _transfer(at: tuple[str, str, str, str, str], values: Sequence[float]) -> Transfer:
    if not values:
        return Transfer(*at, 0, None, None, None)
    return Transfer(*at, len(values), statistics.median(values), min(values), max(values))


def _by_board(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.name):
        found.setdefault((cell.model, cell.players), []).append(cell)
    return found


def _matched(cells: Sequence[Cell], one: str, other: str) -> Iterator[tuple[Cell, Cell]]:
    """Pair two backends' cells of the same players, calibration text and seed."""
    theirs = {(cell.text, cell.seed, cell.player_names): cell for cell in cells if cell.backend == other}
    for cell in cells:
        at = (cell.text, cell.seed, cell.player_names)
        if cell.backend == one and at in theirs:
            yield cell, theirs[at]


def _repeated(cells: Sequence[Cell], backend: str) -> Iterator[tuple[Cell, Cell]]:
    mine = [cell for cell in cells if cell.backend == backend]
    return ((a, b) for a, b in itertools.combinations(mine, 2) if a.player_names == b.player_names)


def lent_allocations(cells: Sequence[Cell], methods: Sequence[str]) -> tuple[Lent, ...]:
    """Return what a method loses when its choice on one backend is used on another, where that was examined."""
    rows = []
    for (model, players), found in _by_board(cells).items():
        backends = sorted({cell.backend for cell in found})
        texts = sorted({text for cell in found for text in cell.unquantised})
        for method, (one, other), text in itertools.product(methods, itertools.permutations(backends, 2), texts):
            pairs = [_lost(a, b, method, text) for a, b in _matched(found, one, other)]
            allocations = sum(total for total, _ in pairs)
            losses = [nats for _, known in pairs for nats in known]
            if allocations:
                rows.append(Lent(model, players, method, one, other, text, allocations, len(losses), mean(losses)))
    return tuple(rows)


def _lost(chosen: Cell, used: Cell, method: str, text: str) -> tuple[int, list[float]]:
    """Return how many allocations both cells have, and the losses of those that the second one examined."""
    theirs, own = (_coalitions(cell, method) for cell in (chosen, used))
    shared = [bits for bits in theirs if bits in own]
    known = [bits for bits in shared if text in used.exams.get(theirs[bits], {})]
    return len(shared), [used.exams[theirs[b]][text].loss - used.exams[own[b]][text].loss for b in known]


def _coalitions(cell: Cell, method: str) -> Mapping[float, str]:
    return {answer.average_bits: answer.coalition for answer in cell.answers if answer.method == method}
