"""Rounds as a method: what is evaluated first, and at which budgets the rounds are played, from any game."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.impq.allocate import average_bits_constraint, bits_within
from impq_edge.impq.allocation import PUBLISHED_TYPES
from impq_edge.impq.problem import Constraint
from impq_edge.model.players import Player
from impq_edge.records import STRICT
from impq_edge.spqe.estimate import estimate
from impq_edge.spqe.rounds import BATCH, Ask, Room, fitting, search_rounds
from impq_edge.spqe.sampling import Coalition, Draw, alone, uniform

SHARE = 0.4
"""Share of all evaluations that the design takes."""

MOST_ROUNDS = 40
"""More evaluations make larger batches, not more rounds: each takes a search."""

CURVE = tuple(Fraction(quarter, 4) for quarter in range(9, 16))
"""Average bits at which rounds are played where no device is given: 2.25 to 3.75."""

Budget = tuple[Constraint, ...]
"""Constraints that are kept together."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How evaluations are shared out between a design and rounds at budgets."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    share: float  # of all evaluations, that the design takes
    batch: int  # coalitions that a budget gets evaluated in one round
    budgets: tuple[Budget, ...]  # none where everything fits at 4 bit: then the design is all there is

    @classmethod
    def within(cls, budgets: Sequence[Budget], evaluations: int) -> "Rounds":
        """Take budgets as they come, without the limits that every choice keeps and those that hold all at 4 bit."""
        kept = tuple(dict.fromkeys(binding(budget) for budget in budgets if not holds_all_4(budget)))
        each = (1 - SHARE) * evaluations / (MOST_ROUNDS * max(1, len(kept)))
        return cls(SHARE, max(BATCH, math.ceil(each)), kept)


def curve(players: Sequence[Player], targets: Sequence[Fraction] = CURVE) -> list[Budget]:
    """Return the budgets of limits on average bits."""
    return [(average_bits_constraint(players, PUBLISHED_TYPES, target),) for target in targets]


def binding(budget: Budget) -> Budget:
    """Leave out the constraints that every choice keeps."""
    return tuple(c for c in budget if sum(map(max, c.costs)) > c.budget)


def holds_all_4(budget: Budget) -> bool:
    """Whether everything fits at 4 bit."""
    return all(sum(row[-1] for row in c.costs) <= c.budget for c in budget)


def evaluations_for(n_players: int, permutations: int) -> int:
    """Return E, what M permutations evaluate; 4 in any case for two players or more, so that there is a pair."""
    return max(permutations * (n_players - 1) + 2, 4 if n_players > 1 else 2)


def play_rounds(
    ask: Ask, seen: Mapping[Coalition, float], pairs: Sequence[Draw], rounds: Rounds, evaluations: int
) -> None:
    """Play the rounds, once the design has been evaluated.

    Parameters
    ----------
    ask
        Evaluates; what it returns must appear in ``seen``.
    seen
        Loss of everything evaluated so far, nats per token; both uniform coalitions are among it.
    pairs
        The complement pairs of the design.
    evaluations
        How many ``seen`` may hold in the end.
    """
    n_players = len(next(iter(seen)))
    rooms = [Room.of(budget) for budget in rounds.budgets]
    left = evaluations - len(seen)
    ask(_starts(seen, pairs, rounds, rooms)[: max(0, left)])
    if max(seen.values()) > seen[uniform(4, n_players)]:  # else 2 bit harms nothing, and there is no game to model
        search_rounds(ask, seen, rooms, evaluations, rounds.batch)


def program_answer(seen: Mapping[Coalition, float], pairs: Sequence[Draw], budget: Budget) -> Coalition:
    """Return what the published program without interactions answers to φ of complement pairs."""
    found = estimate("stratified", len(next(iter(seen))), pairs, seen)
    return as_coalition(bits_within(budget, found.phi, found.covariance, alpha=1.0))


def _starts(
    seen: Mapping[Coalition, float], pairs: Sequence[Draw], rounds: Rounds, rooms: Sequence[Room]
) -> list[Coalition]:
    """Return where the search begins at each budget, besides at what was measured.

    That is what players alone at 2 bit would choose, where all of them were measured: with many players a search by
    single steps from elsewhere ends further away. Otherwise, where nothing measured keeps a budget, what the pairs
    would choose. All at 2 bit keeps most budgets; but on some devices 4 bit is the faster type, or the smaller one in
    memory.
    """
    n_players = len(next(iter(seen)))
    apart = alone(2, n_players)
    if all(each in seen for each in apart):
        harm = np.array([seen[each] for each in apart]) - seen[uniform(4, n_players)]
        found = [additive_answer(harm, budget) for budget in rounds.budgets]
    else:
        found = [
            program_answer(seen, pairs, budget)
            for budget, room in zip(rounds.budgets, rooms, strict=True)
            if not fitting(seen, room)
        ]
    return [each for each in dict.fromkeys(found) if each not in seen]


def additive_answer(harm: NDArray[np.float64], budget: Budget) -> Coalition:
    """Return the best within a budget, if players at 2 bit add to the loss ``harm``, (N,), and no more."""
    return as_coalition(bits_within(budget, harm, np.zeros((len(harm), len(harm)))))


def as_coalition(bits: Sequence[int]) -> Coalition:
    """Return bits that are 2 or 4 as a coalition."""
    return tuple(2 if each == 2 else 4 for each in bits)
