"""The binary quadratic program, as a value that can judge any answer to it."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.records import STRICT


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Σ costs_i (1 − q_i) ≤ budget: what promoting players from 2 to 4 bit may cost together."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    unit: str
    costs: tuple[int, ...]  # (N,), of promoting each player
    budget: int

    def used(self, demoted: Sequence[int]) -> int:
        """Return Σ costs_i (1 − q_i) for q = ``demoted``."""
        return sum(cost for cost, q in zip(self.costs, demoted, strict=True) if not q)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimise aᵀq + qᵀKq over q ∈ {0, 1}^N subject to constraints; q_i = 1 puts player i at 2 bit.

    The budgets are what is left once everything at 2 bit is paid for: the paper prints the program
    without that subtraction.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    linear: tuple[float, ...]  # a, (N,), nats per token
    quadratic: tuple[tuple[float, ...], ...]  # K, (N, N), symmetric
    constraints: tuple[Constraint, ...]

    def objective(self, demoted: Sequence[int]) -> float:
        """Return aᵀq + qᵀKq for q = ``demoted``."""
        q = np.array(demoted, dtype=np.float64)
        return float(np.array(self.linear) @ q + q @ np.array(self.quadratic) @ q)

    def is_feasible(self, demoted: Sequence[int]) -> bool:
        """Whether q = ``demoted`` keeps every budget."""
        return all(constraint.used(demoted) <= constraint.budget for constraint in self.constraints)


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
