"""Which of two methods is better: paired differences, counted, tested and averaged."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from impq_edge.study.contests import Contest, Game, Point

TIE_NATS = 1e-9
"""Losses are kept to seven digits: what differs by less is the same allocation, or a mean of the same ones."""

_CLEAR_STDERRS = 2.0


@dataclasses.dataclass(frozen=True)
class Tally:
    """A method against another over contests. Perplexity is lower, equal or higher; ``p`` is of the sign test."""

    contests: int
    lower: int
    equal: int
    higher: int
    clear_lower: int  # by more than two standard errors of the windows' paired differences
    clear_higher: int
    median_change: float | None  # of the perplexity, relative: -0.2 is a fifth lower; None without contests
    p: float | None
    games: int  # that the contests come from
    games_lower: int  # whose median difference is lower: the contests of a game are not independent
    games_equal: int
    games_higher: int
    games_p: float | None


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over cells and its standard error; None where there are too few cells to tell."""

    cells: int
    value: float | None
    stderr: float | None


def sign_test(lower: int, higher: int) -> float:
    """Return the two-sided p-value that a fair coin falls as unevenly; ties are left out by not being given.

    Exact: twice the smaller tail of Binomial(lower + higher, 1/2), at most 1.
    """
    flips = lower + higher
    tail = sum(math.comb(flips, heads) for heads in range(min(lower, higher) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**flips)))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two methods in one contest."""

    contest: Contest
    nats: float  # the loss of the one less that of the other
    is_clear: bool  # beyond two standard errors of the windows' paired differences


def pairs_of(contests: Iterable[Contest], method: str, other: str) -> tuple[Pair, ...]:
    """Return the contests that have both methods."""
    return tuple(
        Pair(contest, nats, _is_clear(contest.points[method], contest.points[other]))
        for contest in contests
        if (nats := contest.difference(method, other)) is not None
    )


def tally(pairs: Sequence[Pair]) -> Tally:
    """Count contests won and lost, and games, each by the median of its contests."""
    clear = [_sign(pair.nats) for pair in pairs if pair.is_clear]
    of_game: dict[Game, list[float]] = {}
    for pair in pairs:
        of_game.setdefault(pair.contest.game, []).append(pair.nats)
    lower, equal, higher, p = votes(pair.nats for pair in pairs)
    games_lower, games_equal, games_higher, games_p = votes(statistics.median(found) for found in of_game.values())
    return Tally(
        contests=len(pairs), lower=lower, equal=equal, higher=higher,
        clear_lower=clear.count(-1), clear_higher=clear.count(1),
        median_change=statistics.median(math.expm1(pair.nats) for pair in pairs) if pairs else None, p=p,
        games=len(of_game), games_lower=games_lower, games_equal=games_equal, games_higher=games_higher,
        games_p=games_p,
    )  # fmt: skip


def _sign(nats: float) -> int:
    return 0 if abs(nats) < TIE_NATS else (1 if nats > 0 else -1)


def votes(differences: Iterable[float]) -> tuple[int, int, int, float | None]:
    """Return how many differences of losses are below a tie, ties and above, and the p-value of the sign test."""
    signs = [_sign(nats) for nats in differences]
    lower, equal, higher = (signs.count(sign) for sign in (-1, 0, 1))
    return lower, equal, higher, sign_test(lower, higher) if signs else None


def _is_clear(one: Point, other: Point) -> bool:
    if len(one.losses) < 2:
        return False
    differences = np.subtract(one.losses, other.losses)
    stderr = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(abs(differences.mean()) > _CLEAR_STDERRS * stderr)


def mean(values: Sequence[float]) -> Mean:
    """Average a number over cells; the standard error is of cells, not of windows."""
    if not values:
        return Mean(0, None, None)
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(len(values), statistics.fmean(values), stderr)
