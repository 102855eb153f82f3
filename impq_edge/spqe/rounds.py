"""Rounds on the curve: evaluate what a model of the game thinks best under each budget, fit it again, go on.

What is returned is the best allocation that was *measured*, so that a wrong model costs evaluations and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.impq.problem import Constraint
from impq_edge.spqe.sampling import Coalition, Draw, alone, coalitions_of, draws, pairs_of_size, uniform
from impq_edge.spqe.surrogate import Prior, Surrogate

Array = NDArray[np.float64]

Ask = Callable[[Sequence[Coalition]], Array]
"""Returns the loss of each coalition, nats per token."""

BATCH = 4
"""Coalitions a budget gets evaluated in one round."""

_HOPES = (0.0, 0.5, 1.0, 2.0)  # standard deviations below its mean that a proposal is judged by, in turn
_STARTS = 4  # of the local search, from the best that were measured
_STEPS = 60  # at most, of a local search
_KEPT = 24  # neighbours of every step that are kept as candidates
_SWAPPED = 16  # players at either width that are tried in swaps, where there are more swaps; never up to 32 players

_ALONE = 0.7
"""Share of all evaluations up to which players alone are measured first, whatever the share of the design."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Budgets over players that are at 2 or 4 bit, as matrices."""

    costs: Array  # (C, N) of a player at 4 bit beyond 2
    budgets: Array  # (C,)

    @classmethod
    def of(cls, constraints: Sequence[Constraint]) -> "Room":
        """Take the constraints of a program of two types."""
        return cls(
            np.array([[row[1] for row in c.costs] for c in constraints], dtype=np.float64),
            np.array([c.budget for c in constraints], dtype=np.float64),
        )

    def fits(self, lowest: Array) -> NDArray[np.bool_]:
        """Return which rows of (n, N), 1.0 where a player is at 2 bit, keep every budget."""
        return np.asarray(((1 - lowest) @ self.costs.T <= self.budgets).all(axis=1))

    @property
    def tightest(self) -> int:
        """The constraint of which the least can be afforded: the one that allocations lie on."""
        whole = np.maximum(self.costs, 0).sum(axis=1)
        share = np.divide(self.budgets, whole, out=np.full(len(whole), -np.inf), where=whole > 0)
        return int(np.argmin(share))


def _hoped(surrogate: Surrogate, lowest: Array, hope: float) -> Array:
    """Return the mean less so many standard deviations, (m,)."""
    if not hope:
        return surrogate.mean(lowest)
    mean, deviation = surrogate.predict(lowest)
    return mean - hope * deviation


def as_matrix(coalitions: Sequence[Coalition]) -> Array:
    """Return coalitions as a model of the game takes them, (n, N): 1.0 where a player is at 2 bit."""
    return np.asarray(np.array(coalitions) == 2, dtype=np.float64)


def from_row(lowest: Array) -> Coalition:
    """Return a row of such a matrix, (N,), as a coalition."""
    return tuple(2 if low else 4 for low in lowest)


def design(n_players: int, evaluations: int, share: float, seed: int) -> tuple[list[Coalition], list[Draw]]:
    """Choose what is evaluated before the rounds: anchors, then complement pairs of every size.

    Parameters
    ----------
    evaluations
        In all, with the rounds; 2 or more.
    share
        Of them that this part takes; 4 in any case where there are so many, so that a pair is among them, and more
        where players alone take more: where there are many, those say most about each for the least.

    Returns
    -------
    Coalitions, none twice: the two uniform ones, every player alone at 2 bit, every player alone at 4 bit, and pairs.
    Players alone are left out, at 4 bit or both, where not all of them fit: some would only tell of the first players.
    Then the pairs among the coalitions, as ``stratified`` draws them: a player alone at 2 and at 4 bit is one too.
    """
    limit = min(evaluations, max(4, round(share * evaluations)))
    most = max(limit, round(_ALONE * evaluations))
    found = dict.fromkeys([uniform(4, n_players), uniform(2, n_players)])
    pairs: dict[Draw, None] = {}
    if 2 + 2 * n_players <= most:
        found |= dict.fromkeys([*alone(2, n_players), *alone(4, n_players)])
        pairs |= dict.fromkeys((one,) for one in range(pairs_of_size(1, n_players) if n_players > 1 else 0))
    elif 4 + n_players <= most:
        found |= dict.fromkeys(alone(2, n_players))
        limit = max(limit, 4 + n_players)  # a pair in any case
    for draw in draws("stratified", n_players, limit // 2 + n_players, seed):
        fresh = [coalition for coalition in coalitions_of("stratified", draw, n_players) if coalition not in found]
        if len(found) + len(fresh) > limit:
            break
        found |= dict.fromkeys(fresh)
        pairs[draw] = None
    return list(found), list(pairs)


def neighbours(lowest: Array, room: Room, harm: Callable[[Array], Array] | None = None) -> Array:
    """Return the coalitions one flip or one swap away, (m, N), that keep the budgets; ``lowest`` is (N,).

    Where there are many players, swaps are those of the most promising ones: at 4 bit those that harm least for what
    they save, at 2 bit those that help most for what they cost, by ``harm`` of each flip. All of them without it.
    """
    n = len(lowest)
    flips = np.abs(np.eye(n) - lowest)
    down, up = np.flatnonzero(lowest == 0), np.flatnonzero(lowest == 1)
    if harm is not None and len(down) * len(up) > _SWAPPED**2:
        each = harm(np.vstack([lowest, flips]))
        rate = (each[1:] - each[0]) / np.maximum(np.abs(room.costs[room.tightest]), 1e-12)
        down, up = (side[np.argsort(rate[side], kind="stable")[:_SWAPPED]] for side in (down, up))
    swaps = np.repeat(lowest[None], len(down) * len(up), axis=0)
    rows = np.arange(len(swaps))
    swaps[rows, np.repeat(down, len(up))] = 1
    swaps[rows, np.tile(up, len(down))] = 0
    found: Array = np.vstack([flips, swaps])
    return found[room.fits(found)]


def search_rounds(
    ask: Ask,
    seen: Mapping[Coalition, float],
    rooms: Sequence[Room],
    evaluations: int,
    batch: int = BATCH,
    prior: Prior | None = None,
) -> None:
    """Spend evaluations on the curve, equally on every budget.

    Parameters
    ----------
    ask
        Evaluates; what it returns must appear in ``seen``.
    seen
        Everything evaluated so far, both uniform coalitions among it.
    rooms
        One for each budget.
    evaluations
        How many ``seen`` may hold in the end.
    batch
        Coalitions that each budget gets in a round.
    prior
        What the surrogate may believe.
    """
    while len(seen) < evaluations:
        before = len(seen)
        wanted: dict[Coalition, None] = {}
        for room in rooms:
            left = evaluations - len(seen) - len(wanted)
            for coalition in _proposals(seen, wanted, room, min(batch, left), prior):
                wanted[coalition] = None
        ask(list(wanted))
        if len(seen) == before:  # everything near the curve is known
            return


def fitting(seen: Mapping[Coalition, float], room: Room) -> list[Coalition]:
    """Return those of the measured coalitions that keep a budget, the best first."""
    coalitions = sorted(seen, key=lambda c: (seen[c], c))
    return [c for c, fits in zip(coalitions, room.fits(as_matrix(coalitions)), strict=True) if fits]


def best_measured(seen: Mapping[Coalition, float], room: Room) -> Coalition:
    """Return the coalition of least loss, of those measured, that keeps the budgets."""
    return fitting(seen, room)[0]


def surrogate_of(seen: Mapping[Coalition, float], room: Room, prior: Prior | None = None) -> Surrogate:
    """Fit a model of the game near a budget to everything measured; all at 4 bit is among it."""
    lowest, values = as_matrix(list(seen)), np.array(list(seen.values()))
    tightest = room.tightest
    base = seen[uniform(4, lowest.shape[1])]
    return Surrogate(lowest, values - base, room.costs[tightest], float(room.budgets[tightest]), prior)


def _proposals(
    seen: Mapping[Coalition, float], also: Mapping[Coalition, None], room: Room, count: int, prior: Prior | None
) -> Iterator[Coalition]:
    if count <= 0:
        return
    coalitions = list(seen)
    lowest, values = as_matrix(coalitions), np.array([seen[c] for c in coalitions])
    surrogate = surrogate_of(seen, room, prior)
    inside = np.flatnonzero(room.fits(lowest))
    starts = lowest[inside[np.argsort(values[inside], kind="stable")[:_STARTS]]]
    taken = {*coalitions, *also}
    pool = [c for c in _promising(surrogate, starts, room) if c not in taken]
    if not pool:
        return
    mean, deviation = surrogate.predict(as_matrix(pool))
    for index in range(min(count, len(pool))):
        scores = mean - _HOPES[index % len(_HOPES)] * deviation
        best = int(np.argmin(scores))
        yield pool[best]
        mean[best] = np.inf


def _promising(surrogate: Surrogate, starts: Array, room: Room) -> list[Coalition]:
    """Descend from every start, by the mean and by what may be hoped for; return everything met, in order."""
    met: dict[Coalition, None] = {}
    for hope in (0.0, 1.0):
        passed: set[bytes] = set()  # from where another start has gone on already
        for start in starts:
            here, score = start, np.inf
            for _ in range(_STEPS):
                if here.tobytes() in passed:
                    break
                passed.add(here.tobytes())
                around = neighbours(here, room, surrogate.mean)
                if not len(around):
                    break
                scores = _hoped(surrogate, around, hope)
                order = np.argsort(scores, kind="stable")
                met.update(dict.fromkeys(from_row(around[row]) for row in order[:_KEPT]))
                if scores[order[0]] >= score:
                    break
                here, score = around[order[0]], float(scores[order[0]])
    return list(met)
