"""The program as a value that can judge any answer to it: one type for every player, under budgets."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.records import STRICT

Choice = tuple[int, ...]
"""An answer, (N,): for every player the index of its type among the T types, 0 the lowest."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Σ_i costs[i][t_i] ≤ budget: what players at types above their lowest may cost together."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    unit: str
    costs: tuple[tuple[int, ...], ...]  # (N, T), of every type beyond the player's lowest: 0 first, any sign after
    budget: int

    def used(self, choice: Sequence[int]) -> int:
        """Return Σ_i costs[i][t_i] for t = ``choice``."""
        return sum(row[kind] for row, kind in zip(self.costs, choice, strict=True))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimise Σ_i losses[i][t_i] + xᵀKx subject to constraints; x_i = 1 where player i takes its lowest type.

    The paper's program is that of T = 2 types, 2 and 4 bit, with losses (a_i, 0). The budgets are what is left
    once everything at the lowest type is paid for: the paper prints the program without that subtraction.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    losses: tuple[tuple[float, ...], ...]  # (N, T), nats per token
    quadratic: tuple[tuple[float, ...], ...]  # K, (P, P), symmetric, of the first P ≤ N players; others have no pairs
    constraints: tuple[Constraint, ...]

    def objective(self, choice: Sequence[int]) -> float:
        """Return Σ_i losses[i][t_i] + xᵀKx for t = ``choice``."""
        n_pairs = len(self.quadratic)
        lowest = np.array([float(kind == 0) for kind in choice[:n_pairs]])
        pairs = lowest @ np.array(self.quadratic).reshape(n_pairs, n_pairs) @ lowest
        return float(sum(row[kind] for row, kind in zip(self.losses, choice, strict=True)) + pairs)

    def is_feasible(self, choice: Sequence[int]) -> bool:
        """Whether t = ``choice`` keeps every budget."""
        return all(constraint.used(choice) <= constraint.budget for constraint in self.constraints)


def published_objective(
    phi: NDArray[np.float64], covariance: NDArray[np.float64], alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the paper's linear and quadratic terms, shapes (N,) and (N, N).

    K = (1 − α) C + α diag(C) and a_i = φ_i − Σ_{j≠i} K_ij: α = 1 drops all interactions, the paper
    takes α = 0.5.
    """
    quadratic = (1 - alpha) * covariance + alpha * np.diag(np.diag(covariance))
    linear = phi - (quadratic.sum(axis=1) - np.diag(quadratic))
    return linear, quadratic


def ladder_objective(
    losses: NDArray[np.float64], covariance: NDArray[np.float64] | None, alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the losses and the quadratic term of a ladder, shapes (N, T) and (P, P).

    Parameters
    ----------
    losses
        (N, T) in nats per token: of each player alone at each type.
    covariance
        (P, P) in nats², of the first P players at the lowest type; None where it was not estimated.
    alpha
        1 drops the interactions.

    The interactions are the paper's, K_ij = (1 − α) C_ij for i ≠ j, and a player's loss at its lowest type is less
    Σ_{j≠i} K_ij. Measured losses hold each player's own, so K has no α diag(C). What it keeps of the diagonal,
    (1 − α) C_ii, is taken off the loss too and cancels for x_i ∈ {0, 1}; with it K is as convex as C is.
    """
    if covariance is None or alpha == 1:
        return losses, np.zeros((0, 0))
    quadratic = (1 - alpha) * covariance
    corrected = losses.copy()
    corrected[: len(quadratic), 0] -= quadratic.sum(axis=1)
    return corrected, quadratic
