"""When to stop drawing: once what the estimate is for has stopped changing.

The answers, and so the round at which a run stops, follow from the losses alone: neither interruptions
nor the number of workers change it.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np

from impq_edge.spqe.estimate import Estimate

MINIMUM_ROUNDS = 4
"""An answer that has not outlived this many further rounds is not trusted."""

DISORDER_LIMIT = 0.01
"""Share of all differences between players that players who changed places may hold: what counts as a tie."""


class Stability:
    """Told the answer after every round, says whether it has stopped changing.

    After r rounds an answer has stopped changing if it has been the same for the last r/4 of them, and
    for :data:`MINIMUM_ROUNDS` at least. Rounds are equally many draws each. The more rounds an answer took
    to settle, the more it must outlive: without that, mere slowness would pass for stability, as the mean
    of r rounds moves by 1/r with each.
    """

    def __init__(self) -> None:
        self._answers: list[Hashable] = []

    def add(self, answer: Hashable) -> bool:
        """Take the answer after one more round; return whether it has stopped changing."""
        self._answers.append(answer)
        window = max(MINIMUM_ROUNDS, len(self._answers) // 4)
        return len(self._answers) > window and all(_same(old, answer) for old in self._answers[-window - 1 : -1])


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the players by φ, ties aside."""

    phi: tuple[float, ...]  # (N,), nats per token

    def disorder(self, older: "Order") -> float:
        """Return what share of all differences in φ lies between players that ``older`` has the other way round.

        Σ|φ_i − φ_j| over the pairs in which the two disagree, over Σ|φ_i − φ_j| of all pairs. Players that
        nearly tie change places for ever, but hold next to nothing; no threshold on single pairs is needed,
        nor standard errors, which are themselves uncertain after a few draws.
        """
        new, old = (np.subtract.outer(phi, phi) for phi in (self.phi, older.phi))
        total = float(np.abs(new).sum())
        return float(np.abs(new[new * old <= 0]).sum()) / total if total else 0.0

    def agrees_with(self, older: "Order") -> bool:
        """Return whether only near-ties have changed places."""
        return self.disorder(older) <= DISORDER_LIMIT


def order_answer(found: Estimate) -> Order:
    """Return the order of the players, for runs that stop once it has stopped changing."""
    return Order(tuple(found.phi.tolist()))


def _same(older: Hashable, newer: Hashable) -> bool:
    if isinstance(older, Order) and isinstance(newer, Order):
        return newer.agrees_with(older)
    return older == newer
