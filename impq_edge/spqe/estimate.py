"""SPQE's estimators, from losses that were measured: φ, its standard error, and the covariance C."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.spqe.complements import Pairs, covariance_of_marginals, interactions, shares
from impq_edge.spqe.sampling import Coalition, Draw, Estimator, complement, stratum_of, uniform, walk


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Shapley values of the loss increase and how the increases vary together over orders of the players."""

    phi: NDArray[np.float64]  # (N,), nats per token: mean loss increase when the player drops to 2 bit
    phi_stderr: NDArray[np.float64]  # (N,), nats per token; NaN-free: 0 where nothing is left to measure it from
    covariance: NDArray[np.float64]  # (N, N), nats²


def estimate(
    estimator: Estimator, n_players: int, draws: Sequence[Draw], losses: Mapping[Coalition, float]
) -> Estimate:
    """Estimate Shapley values (Shapley 1953), their errors, and the covariance C of the marginals.

    Whatever the estimator, Σφ = v(all at 2 bit) − v(all at 4 bit) and C·1 = 0.

    - ``permutations``: means and the covariance, divisor M, over M walks, as the paper does and as
      Castro, Gómez & Tejada (2009, "Polynomial calculation of the Shapley value based on sampling").
    - ``antithetic``: the same means and covariance; errors from the means of an order and its reverse,
      which are independent of one another where the orders themselves are not (Mitchell et al. 2022,
      "Sampling permutations for Shapley value estimation"). A last order without its reverse is left out.
    - ``stratified``: regression on complement pairs, see :mod:`impq_edge.spqe.complements`. C is that of
      the fitted pairwise game, and knows nothing of interactions among three players or more.

    Parameters
    ----------
    draws
        As :func:`impq_edge.spqe.sampling.draws` makes them, or the first so many of them.
    losses
        v in nats per token of at least the coalitions that the draws need.

    Raises
    ------
    SensitivityError
        When there is no draw.
    """
    if estimator == "stratified":
        return _from_pairs(n_players, draws, losses)
    if not draws:
        raise SensitivityError("There are 0 permutations to estimate from; evaluate at least 1.")
    increases = marginals(np.array(draws, dtype=np.int64), losses)
    if estimator == "permutations" or len(draws) == 1:
        return _from_marginals(increases, increases)
    increases = increases[: len(increases) // 2 * 2]
    return _from_marginals(increases, (increases[::2] + increases[1::2]) / 2)


def marginals(orders: NDArray[np.int64], losses: Mapping[Coalition, float]) -> NDArray[np.float64]:
    """Return the loss increase of each player in each of M orders, shape (M, N), in nats per token.

    Each row sums to v(all at 2 bit) − v(all at 4 bit). The paper prints the opposite sign; an increase
    of loss is what a player costs.
    """
    increases = np.empty(orders.shape)
    for row, order in zip(increases, orders, strict=True):
        values = [losses[coalition] for coalition in walk(order.tolist())]
        row[order] = np.diff(values)
    return increases


def _from_marginals(increases: NDArray[np.float64], independent: NDArray[np.float64]) -> Estimate:
    """``independent`` are rows of the same mean whose spread tells that mean's error."""
    phi = increases.mean(axis=0)
    centred = increases - phi
    count = len(independent)
    spread = independent.std(axis=0, ddof=1) if count > 1 else np.zeros_like(phi)
    return Estimate(phi, spread / np.sqrt(count), centred.T @ centred / len(increases))


def complement_pairs(n_players: int, draws: Sequence[Draw], losses: Mapping[Coalition, float]) -> Pairs:
    """Gather evaluated complement pairs, as regressions on them take them; ``draws`` as ``stratified`` makes them."""
    none, total = losses[uniform(4, n_players)], losses[uniform(2, n_players)] - losses[uniform(4, n_players)]
    kept = np.array([[player in draw for player in range(n_players)] for draw in map(set, draws)])
    sides: list[Coalition] = [tuple(4 if k else 2 for k in row) for row in kept.tolist()]
    one = np.array([losses[side] for side in sides])
    other = np.array([losses[complement(side)] for side in sides])
    return Pairs(
        signs=np.where(kept, -1.0, 1.0),
        sizes=np.array([stratum_of(draw, n_players) for draw in draws]),
        differences=one - other,
        cuts=total - (one - none) - (other - none),
        total=total,
    )


def _from_pairs(n_players: int, draws: Sequence[Draw], losses: Mapping[Coalition, float]) -> Estimate:
    if n_players == 1:
        total = losses[uniform(2, n_players)] - losses[uniform(4, n_players)]
        return Estimate(np.array([total]), np.zeros(1), np.zeros((1, 1)))
    if not draws:
        raise SensitivityError("There are 0 complement pairs to estimate from; evaluate at least 1.")
    pairs = complement_pairs(n_players, draws, losses)
    phi, phi_stderr = shares(pairs)
    return Estimate(phi, phi_stderr, covariance_of_marginals(interactions(pairs, phi)))
