"""SPQE's estimators, from losses that were measured: φ, its standard error, and the covariance C."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from impq_edge.spqe.sampling import Coalition, walk


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Shapley values of the loss increase and how they vary together over permutations."""

    phi: NDArray[np.float64]  # (L,), nats per token: mean loss increase when the block drops to 2 bit
    phi_stderr: NDArray[np.float64]  # (L,), nats per token; NaN-free: 0 for a single permutation
    covariance: NDArray[np.float64]  # (L, L), nats²


def marginals(orders: NDArray[np.int64], losses: Mapping[Coalition, float]) -> NDArray[np.float64]:
    """Return the loss increase of each block in each permutation, shape (M, L), in nats per token.

    Each row sums to v(all at 2 bit) − v(all at 4 bit). The paper prints the opposite sign; an increase
    of loss is what a block costs.
    """
    increases = np.empty(orders.shape)
    for row, order in zip(increases, orders, strict=True):
        values = [losses[coalition] for coalition in walk(order)]
        row[order] = np.diff(values)
    return increases


def estimate(increases: NDArray[np.float64]) -> Estimate:
    """Estimate φ and C as the paper does: means and the covariance with divisor M over permutations.

    ``increases`` has shape (M, L). C·1 = 0, because all rows have the same sum.
    """
    count = len(increases)
    phi = increases.mean(axis=0)
    centred = increases - phi
    spread = increases.std(axis=0, ddof=1) if count > 1 else np.zeros_like(phi)
    return Estimate(phi, spread / np.sqrt(count), centred.T @ centred / count)
