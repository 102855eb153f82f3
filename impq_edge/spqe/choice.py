"""An allocation from losses that were measured: the best of them, or what a model of the game thinks better still."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.impq.allocate import bits_within
from impq_edge.impq.allocation import PUBLISHED_TYPES, Evidence
from impq_edge.impq.problem import Choice
from impq_edge.spqe.playing import Budget, as_coalition, binding, holds_all_4
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.rounds import Room, as_matrix, fitting, from_row, neighbours, surrogate_of
from impq_edge.spqe.sampling import Coalition, uniform

Array = NDArray[np.float64]

_STARTS = 4  # of the descent, from the best that were measured


def choose(found: SensitivityProfile, budget: Budget) -> tuple[Choice, Evidence]:
    """Choose an allocation within a budget that can be kept.

    Where everything fits at 4 bit, that. Where rounds were played at this very budget to their end, the best that was
    measured. Else the best in the eyes of a model of the game, fitted to every loss the profile holds: of what was
    measured, of what a descent from the best of it proposes, and of what it proposes from the published answer.

    Raises
    ------
    SensitivityError
        When the profile contradicts itself.
    """
    found.estimate()  # which checks that its evaluations are there
    seen, all_4 = found.losses, uniform(4, found.n_players)
    if holds_all_4(budget):
        return _told(found, all_4, seen[all_4], is_measured=True)
    room = Room.of(binding(budget))
    measured = fitting(seen, room)
    if measured and _was_played(found, budget):
        return _told(found, measured[0], seen[measured[0]], is_measured=True)
    estimate = found.estimate()
    published = as_coalition(bits_within(budget, estimate.phi, estimate.covariance))
    proposals = Proposals(seen, room) if max(seen.values()) > seen[all_4] else None
    if proposals is None:  # 2 bit harms nothing: there is no game to model
        best = measured[0] if measured else published
        return _told(found, best, seen.get(best, seen[all_4]), is_measured=best in seen)
    best = proposals.best(measured, published)
    loss = seen[best] if best in seen else seen[all_4] + proposals.increase(best)
    return _told(found, best, loss, is_measured=best in seen)


def _was_played(found: SensitivityProfile, budget: Budget) -> bool:
    """Whether rounds were played to their end within the same limits, whatever these are called."""
    rounds = found.design.rounds
    if rounds is None or found.stopped_by != "evaluations":
        return False
    return _limits(binding(budget)) in map(_limits, rounds.budgets)


def _limits(budget: Budget) -> set[tuple[tuple[tuple[int, ...], ...], int]]:
    return {(constraint.costs, constraint.budget) for constraint in budget}


def _told(found: SensitivityProfile, chosen: Coalition, loss: float, *, is_measured: bool) -> tuple[Choice, Evidence]:
    seen, objective = found.losses, found.settings.objective
    evidence = Evidence("rounds", is_measured, loss, seen[uniform(4, len(chosen))], len(seen), objective)
    return tuple(PUBLISHED_TYPES.index(bits) for bits in chosen), evidence


class Proposals:
    """A model of the game near a budget, and what it thinks best within it."""

    def __init__(self, seen: dict[Coalition, float], room: Room) -> None:
        self._room, self._seen = room, seen
        points = as_matrix(list(seen))
        self._increases = np.array(list(seen.values())) - seen[uniform(4, points.shape[1])]
        self._model = surrogate_of(seen, room)
        self._means = self._model.mean(points)

    def best(self, measured: Sequence[Coalition], published: Coalition) -> Coalition:
        """Return the best of the ``measured`` ones that fit, the best first, or something better.

        A measured one is as good as another that is predicted to be equal: it has been seen.
        """
        starts = [*measured[:_STARTS], published]
        ends = [from_row(end) for end in self._descents(as_matrix(starts))]
        candidates = [*measured[:1], *(end for end in dict.fromkeys(ends) if end not in self._seen)]
        return candidates[int(np.argmin(self._mean(as_matrix(candidates))))]

    def increase(self, coalition: Coalition) -> float:
        """Predict the loss increase over all at 4 bit, nats per token.

        The model ranks on a scale of its own; the increase is read off the measured coalitions, those of the same
        rank, and is therefore none that is outside what was measured.
        """
        mean = self._mean(as_matrix([coalition]))
        return float(np.interp(mean, np.sort(self._means), np.sort(self._increases))[0])

    def _descents(self, starts: Array) -> Iterator[Array]:
        for start in starts:
            here, score = start, float(self._mean(start[None])[0])
            while len(around := neighbours(here, self._room)):
                means = self._mean(around)
                best = int(np.argmin(means))
                if not means[best] < score:
                    break
                here, score = around[best], float(means[best])
            yield here

    def _mean(self, points: Array) -> Array:
        return self._model.mean(points)
