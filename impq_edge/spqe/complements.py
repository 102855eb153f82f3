"""Shapley values and pairwise interactions from complement pairs: a coalition S and the players it leaves out.

Write z_i = 1 for a player at 2 bit and −1 at 4 bit, and g for the loss increase over all-4-bit. The
difference of a pair, d(z) = g(z) − g(−z), holds all of a game's odd interactions and none of the even
ones; the sum holds the even ones alone. Shapley values depend on differences only (Zhang et al. 2023,
"Efficient sampling approaches to Shapley value approximation"), and a pairwise game's interactions on
sums only.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from impq_edge.spqe.sampling import pairs_of_size

Array = NDArray[np.float64]

FITTED_PAIRS = 2000
"""Interactions are fitted to so many pairs at most: 3 s of one core, and the time grows with the cube."""

_POOLED_PAIRS = 4  # a player's own variance weighs as much as the players' mean once this many pairs are to spare


@dataclasses.dataclass(frozen=True)
class Pairs:
    """n evaluated complement pairs of N ≥ 2 players, none twice. Losses in nats per token."""

    signs: Array  # z, (n, N): of one side of each pair, whichever
    sizes: NDArray[np.int64]  # (n,): players on the smaller side
    differences: Array  # d, (n,)
    cuts: Array  # (n,): g(all at 2 bit) − g(z) − g(−z)
    total: float  # g(all at 2 bit)

    def first(self, count: int) -> "Pairs":
        """Return the first ``count`` of the pairs."""
        return Pairs(self.signs[:count], self.sizes[:count], self.differences[:count], self.cuts[:count], self.total)

    @property
    def n_players(self) -> int:
        """N."""
        return self.signs.shape[1]

    @property
    def imbalance(self) -> Array:
        """Mean of z over the players, (n,); from −1 (all at 4 bit) to 1."""
        mean: Array = self.signs.mean(axis=1)
        return mean

    @property
    def weights(self) -> Array:
        """Shapley's kernel 1/(k (N − k)), shared out over the pairs of each size; (n,), sums to 1."""
        sizes, where, counts = np.unique(self.sizes, return_inverse=True, return_counts=True)
        rest = self.n_players - sizes
        kernel = np.where(sizes == rest, 1.0, 2.0) / (sizes * rest)
        weights: Array = (kernel / counts / kernel.sum())[where]
        return weights

    @property
    def are_complete(self) -> bool:
        """Whether these are all the pairs there are, so that nothing is left to chance."""
        return len(self.sizes) + 1 == 1 << (self.n_players - 1)


def shares(pairs: Pairs) -> tuple[Array, Array]:
    """Estimate Shapley values and their standard errors, both (N,), in nats per token.

    Least squares of d on z with Shapley's kernel as weights and Σφ = g(all at 2 bit) gives Shapley values
    exactly once all pairs are known (Covert & Lee 2021, "Improving KernelSHAP"; paired sampling). Two
    things are added that change nothing in that limit and remove most of the error before it when the
    loss is a curved function of nearly additive damage, as the loss of a quantised model is:

    - d also gets a level that depends on the imbalance u of z. Among all coalitions of one size every
      player is alike, so that levels are orthogonal to the centred z; in a sample they are not quite,
      and without them a player takes the blame for the sizes of the coalitions it happened to be in.
    - a control variate: the fit with slopes scaled by an even function of u. Its own Shapley
      values are known in closed form; only what it leaves unexplained is averaged over the sample (as
      Witter, Liu & Musco 2025, "Regression-adjusted Monte Carlo estimators for Shapley values").

    Standard errors are those of the jackknife over pairs (HC3: residuals over 1 − leverage) with the
    finite population correction of each size, so that they are 0 when all pairs are known; as long as
    there are few pairs to measure them from, they lean on their mean over the players. With fewer pairs than
    players the undetermined directions are left at equal shares (least norm), and their error is taken to
    be the spread between players that the pairs show.
    """
    n_players, u, weights = pairs.n_players, pairs.imbalance, pairs.weights
    centred = pairs.signs - u[:, None]  # its rows sum to 0, and so do least-norm coefficients: Σφ stays as it is
    levels = np.stack([u * (1 - u**2), u**3 * (1 - u**2)], axis=1)  # vanish at both extremes, which are known
    unequal = pairs.differences - pairs.total * u  # 0 if all players were alike and added up
    columns, root = np.hstack([centred, levels]), np.sqrt(weights)
    inverse = np.linalg.pinv(root[:, None] * columns, rcond=1e-10) * root  # (N + 2, n): least squares
    curved, mean_slopes, more_columns = _curved_fit(centred, levels, unequal, u, root)
    left = unequal - curved
    fitted = inverse @ left
    slopes = mean_slopes + fitted[:n_players]
    influence = inverse[:n_players]

    keep = 1 - _leverages(root[:, None] * np.hstack([columns, more_columns]))
    # A pair that alone decides a direction leaves no residual: its whole deviation from equal shares counts.
    errors = np.where(keep > 1e-6, (left - columns @ fitted) / np.maximum(keep, 1e-6), unequal)
    variance: Array = _variance_of_sum(influence * errors, pairs)
    resolved = np.diag(influence @ centred)
    unresolved = 1 - 1 / n_players - resolved
    spread = float(weights @ unequal**2) / float(weights @ (centred**2).sum(axis=1))
    variance = variance + spread * np.where(unresolved > 1e-6, unresolved, 0)
    return pairs.total / n_players + slopes - slopes.mean(), np.sqrt(variance)


def _curved_fit(centred: Array, levels: Array, unequal: Array, u: Array, root: Array) -> tuple[Array, Array, Array]:
    """Fit levels(u) + s(u) Σ_i γ_i z_i with s = s_0 + s_1 u² + s_2 u⁴, alternating between γ and s.

    Returns
    -------
    The fit at the pairs, (n,); the mean over coalition sizes of s(u) γ, (N,); and the fit's derivatives by
    what was chosen, (n, N + 2), besides the levels.
    """
    n, n_players = centred.shape
    if n < 4 * n_players:  # too few to tell curvature from chance
        return np.zeros(n), np.zeros(n_players), np.zeros((n, 0))
    even = np.stack([np.ones(n), u**2, u**4], axis=1)
    scale: Array = np.ones(n)
    for _ in range(3):
        slopes: Array = _least_squares(np.hstack([scale[:, None] * centred, levels]), unequal, root)[:n_players]
        along = centred @ slopes
        factors = _least_squares(np.hstack([along[:, None] * even, levels]), unequal, root)
        scale = even @ factors[:3]
    fit: Array = along * scale + levels @ factors[3:]
    sizes = 1 - 2 * np.arange(1, n_players) / n_players
    mean_scale = factors[0] + factors[1] * np.mean(sizes**2) + factors[2] * np.mean(sizes**4)
    return fit, mean_scale * slopes, np.hstack([scale[:, None] * centred, along[:, None] * even[:, 1:]])


def _leverages(columns: Array) -> Array:
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    leverages: Array = (left[:, sizes > 1e-10 * sizes.max()] ** 2).sum(axis=1)
    return leverages


def _least_squares(columns: Array, values: Array, root: Array) -> Array:
    return np.asarray(np.linalg.lstsq(root[:, None] * columns, root * values, rcond=1e-10)[0], dtype=np.float64)


def _variance_of_sum(terms: Array, pairs: Pairs) -> Array:
    """Variance of Σ_j terms[:, j] when the pairs of each size are drawn without replacement; (N,)."""
    sizes, where, counts = np.unique(pairs.sizes, return_inverse=True, return_counts=True)
    missing = np.array(
        [1 - count / pairs_of_size(int(k), pairs.n_players) for k, count in zip(sizes, counts, strict=True)]
    )
    variance: Array = terms**2 @ missing[where]
    freedom = max(0, len(pairs.sizes) - pairs.n_players - 1)
    pooled: Array = (freedom * variance + _POOLED_PAIRS * variance.mean()) / (freedom + _POOLED_PAIRS)
    return pooled


def interactions(pairs: Pairs, phi: Array) -> Array:
    """Fit the pairwise interactions I of the loss increase to the sums of pairs; (N, N), nats per token.

    In a pairwise game g = Σ_i a_i x_i + Σ_{i<j} I_ij x_i x_j, with x = 1 at 2 bit, a pair's sum falls
    short of g(all at 2 bit) by the interactions between the sides: Σ_{i<j} I_ij 1[z_i ≠ z_j].
    Ridge regression with the penalty that leaves the least leave-one-out error; free of penalty are
    a common interaction, one in proportion to φ_i φ_j (what a curved function of additive damage gives
    first), and a term in (k (N − k))² for that function's fourth order, which is no pair's and is left out
    of I. When all pairs are known there is no penalty.

    Costs an eigendecomposition of n × n, so that of many pairs the first :data:`FITTED_PAIRS` are used: any
    prefix of the draws is balanced over sizes.
    """
    pairs = pairs.first(FITTED_PAIRS)
    z, n_players = pairs.signs, pairs.n_players
    root = np.sqrt(pairs.weights * len(z))
    between = (n_players**2 - z.sum(axis=1) ** 2) / 4  # Σ_{i<j} 1[z_i ≠ z_j] = k (N − k)
    weighted = (phi.sum() ** 2 - (z @ phi) ** 2) / 4  # Σ_{i<j} φ_i φ_j 1[z_i ≠ z_j]
    rich = len(z) >= 6 and n_players >= 4
    free = np.stack([between, weighted, between**2] if rich else [between], axis=1)
    free_norms = np.linalg.norm(root[:, None] * free, axis=0)
    free = free / np.where(free_norms > 0, free_norms, 1)

    def pairs_in(products: Array) -> Array:
        return (products**2 - n_players) / 2  # Σ_{i<j} of the products, from their sum over i

    single = pairs_in(z.sum(axis=1))
    kernel = (math.comb(n_players, 2) - single[:, None] - single + pairs_in(z @ z.T)) / 4
    kernel *= root[:, None] * root
    dual = root * _ridge(kernel, root[:, None] * free, root * pairs.cuts, penalised=not pairs.are_complete)
    penalised = (dual.sum() - z.T @ (dual[:, None] * z)) / 2  # Σ_n dual_n 1[z_ni ≠ z_nj]

    explained = np.einsum("ni,ij,nj->n", 1 - z, penalised, 1 + z) / 4
    found = _least_squares(free, pairs.cuts - explained, root)
    found = found / np.where(free_norms > 0, free_norms, 1)
    result: Array = penalised + found[0] + (found[1] * np.outer(phi, phi) if rich else 0)
    np.fill_diagonal(result, 0)
    return (result + result.T) / 2  # a product's two halves may be rounded differently


def _ridge(kernel: Array, free: Array, values: Array, *, penalised: bool) -> Array:
    """Solve ridge regression with unpenalised columns in its dual form; (n,) coefficients, orthogonal to ``free``.

    Leave-one-out residuals are r_i/(1 − h_i); both are computed from the shrunken share t/(λ + t), which
    stays accurate as the penalty t goes to 0.
    """
    left, sizes, _ = np.linalg.svd(free, full_matrices=True)
    rank = int((sizes > 1e-9 * sizes.max()).sum())
    outside = left[:, rank:]
    if not outside.size:
        return np.zeros(len(values))
    eigenvalues, vectors = np.linalg.eigh(outside.T @ kernel @ outside)
    eigenvalues = np.maximum(eigenvalues, 0)
    vectors = outside @ vectors
    rotated = vectors.T @ values
    scale = float(eigenvalues.mean())
    if scale == 0 or not penalised:
        known = eigenvalues > 1e-10 * eigenvalues.max()
        return np.asarray(vectors[:, known] @ (rotated[known] / eigenvalues[known]))
    errors = {}
    for penalty in scale * np.logspace(-8, 4, 49):
        shrunken = penalty / (eigenvalues + penalty)
        residuals, kept = vectors @ (shrunken * rotated), vectors**2 @ shrunken
        errors[penalty] = float(np.mean((residuals / np.maximum(kept, 1e-300)) ** 2))
    best = min(errors, key=errors.__getitem__)
    return np.asarray(vectors @ (rotated / (eigenvalues + best)))


def covariance_of_marginals(pairwise: Array) -> Array:
    """Return the covariance of a pairwise game's marginals over all orders of the players; (N, N), nats².

    A player's marginal is Δ_i = a_i + Σ_j I_ij 1[j before i]. Over uniformly random orders,
    1[j before i] has variance 1/4 and covariance −1/4 with 1[i before j]; indicators that share one
    player covary by 1/12 when it stands at the same end of both and by −1/12 when not; those that share
    none are independent. With R_i = Σ_j I_ij and Q_i = Σ_j I_ij², adding up gives

    - 12 C_ii = 2 Q_i + R_i²
    - 12 C_ij = (I²)_ij − I_ij² − I_ij (R_i + R_j)

    and so C·1 = 0, as it must be. NumPy computes I Iᵀ to be symmetric to the last bit, of a symmetric I.
    """
    rows = pairwise.sum(axis=1)
    squares = pairwise**2
    result: Array = pairwise @ pairwise.T - squares - pairwise * (rows[:, None] + rows)
    np.fill_diagonal(result, 2 * squares.sum(axis=1) + rows**2)
    return result / 12
