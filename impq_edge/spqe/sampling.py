"""Which coalitions are evaluated, in which order. A coalition is the tuple of its players' bits."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from impq_edge.backends import Bits

Coalition = tuple[Bits, ...]
"""Bits of each of the N players: the paper's S is the set of players at 4."""

Estimator = Literal["permutations", "antithetic", "stratified"]
"""Independent orders as published; each order followed by its reverse; complement pairs of every size."""

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

Draw = tuple[int, ...]
"""An order of the players; for ``stratified``, the players at 4 bit in ascending order, the complement implied."""


def uniform(bits: Bits, n_players: int) -> Coalition:
    """Return the coalition with every player at the same bits."""
    return (bits,) * n_players


def alone(bits: Bits, n_players: int) -> list[Coalition]:
    """Return the N coalitions in which one player is at these bits and all others are at the other ones."""
    rest: Bits = 2 if bits == 4 else 4
    return [tuple(bits if player == one else rest for player in range(n_players)) for one in range(n_players)]


def draws(estimator: Estimator, n_players: int, count: int, seed: int) -> list[Draw]:
    """Draw what an estimator evaluates; the first k draws do not depend on ``count``.

    Returns
    -------
    ``count`` draws; for ``stratified`` no pair comes twice, so that there are at most 2^(N−1) − 1.
    """
    if estimator == "stratified":
        return _complement_pairs(n_players, count, seed)
    generator = np.random.default_rng(seed)
    if estimator == "permutations":
        return [_order(generator, n_players) for _ in range(count)]
    orders = [_order(generator, n_players) for _ in range((count + 1) // 2)]
    return [order for forward in orders for order in (forward, forward[::-1])][:count]


def draws_for(estimator: Estimator, n_players: int, permutations: int) -> int:
    """Return how many draws cost about as many evaluations as M plain permutations.

    M permutations take M (N − 1) evaluations besides the two extremes, which every estimator needs; a
    complement pair takes two. Of a small game's pairs no more are asked for than there are, but 1 at least,
    so that the number serves as a step (a lone player has no pair).
    """
    if estimator == "permutations":
        return permutations
    if estimator == "antithetic":
        return permutations + permutations % 2
    there_are: int = 2 ** (n_players - 1) - 1
    return max(1, min((permutations * (n_players - 1) + 1) // 2, there_are))


def coalitions_of(estimator: Estimator, draw: Draw, n_players: int) -> list[Coalition]:
    """Return every coalition that a draw needs, the two extremes included."""
    if estimator == "stratified":
        kept = set(draw)
        one: Coalition = tuple(4 if player in kept else 2 for player in range(n_players))
        return [uniform(4, n_players), uniform(2, n_players), one, complement(one)]
    return list(walk(draw))


def complement(coalition: Coalition) -> Coalition:
    """Return the coalition with every player at the other bits."""
    return tuple(2 if bits == 4 else 4 for bits in coalition)


def walk(order: Sequence[int]) -> Iterator[Coalition]:
    """Yield the N + 1 coalitions of one progressive quantisation: all at 4 bit, then one player less each time."""
    bits: list[Bits] = [4] * len(order)
    yield tuple(bits)
    for player in order:
        bits[player] = 2
        yield tuple(bits)


def evaluation_order(estimator: Estimator, draws: Sequence[Draw], n_players: int) -> list[Coalition]:
    """Return the coalitions that draws need, each once, in an order that lets activations be reused.

    The two extremes come first, because everything needs them. The others are sorted: then every distinct
    beginning of a coalition is computed once, and no order can do with less. (A single walk descends, so
    sorting it alone only turns it round.)
    """
    extremes = [uniform(4, n_players), uniform(2, n_players)]
    others = {coalition for draw in draws for coalition in coalitions_of(estimator, draw, n_players)}
    return list(dict.fromkeys([*extremes, *sorted(others)]))


def _order(generator: np.random.Generator, n_players: int) -> Draw:
    order: list[int] = generator.permutation(n_players).tolist()
    return tuple(order)


def stratum_of(draw: Draw, n_players: int) -> int:
    """Return the size of the smaller side of a complement pair."""
    return min(len(draw), n_players - len(draw))


def pairs_of_size(size: int, n_players: int) -> int:
    """Return how many complement pairs there are whose smaller side has ``size`` players."""
    return math.comb(n_players, size) // (2 if 2 * size == n_players else 1)


def _complement_pairs(n_players: int, count: int, seed: int) -> list[Draw]:
    """Draw pairs without repetition so that in every prefix all coalition sizes are as frequent as can be.

    Sizes 1…N−1 alike, because a Shapley value is a plain mean over sizes. Regression on equal numbers
    of every size is also what leverage scores ask for (Musco & Witter 2025, "Provably accurate Shapley
    value estimation via leverage score sampling").
    """
    generator = np.random.default_rng(seed)
    sizes = np.arange(1, n_players // 2 + 1)
    share = np.where(2 * sizes == n_players, 1.0, 2.0) / max(1, n_players - 1)  # a pair has both k and N − k
    left = [pairs_of_size(int(size), n_players) for size in sizes]
    drawn = np.zeros(len(sizes))
    seen: dict[Draw, None] = {}
    while len(seen) < count and any(left):
        lack = np.where(left, (len(seen) + 1) * share - drawn, -np.inf)
        most = np.flatnonzero(lack > lack.max() - 1e-9)  # which of several that lack alike is left to chance
        stratum = int(generator.choice(most))
        seen[_unseen(generator, n_players, int(sizes[stratum]), seen)] = None
        drawn[stratum] += 1
        left[stratum] -= 1
    return list(seen)


def _unseen(generator: np.random.Generator, n_players: int, size: int, seen: dict[Draw, None]) -> Draw:
    while True:
        members = np.sort(generator.permutation(n_players)[:size])
        if 2 * size == n_players and members[0] != 0:  # of two equal sides, name the one with player 0
            members = np.setdiff1d(np.arange(n_players), members)
        names: list[int] = members.tolist()
        if (draw := tuple(names)) not in seen:
            return draw
