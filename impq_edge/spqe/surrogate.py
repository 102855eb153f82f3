"""A model of the game near one budget, from whatever has been evaluated: link, main effects, pairs, and a remainder.

A Gaussian process on a monotone link of the loss increase (a "warped" process: Snelson, Rasmussen & Ghahramani 2003).
Main effects are all but free, products of two players are shrunk, and a kernel that falls with the number of players
that differ (as for combinatorial spaces: Oh et al. 2019, "Combinatorial Bayesian optimization using the graph Cartesian
product") holds what neither explains. How far to shrink, and which link, is what makes the losses that were
measured most likely; where pairs explain nothing, their share is zero.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]

NEAREST = 300
"""Evaluations that a fit takes into account: those whose cost is nearest the budget's."""

_MAIN = 25.0  # prior variance of main effects, of standardised values: all but free
_NOISES = (1e-3, 2e-2)  # of what no function of the players near this budget explains
_REACH = 8.0  # players that differ until the remainder's correlation has fallen to 1/e; 4 and 16 predict no better
_FAR = 0.2  # in shares of all costs: evaluations so far from the budget count e times less


@dataclasses.dataclass(frozen=True)
class Prior:
    """What a surrogate may believe; each is tried, and the likeliest is taken."""

    powers: tuple[float, ...] = (0.0, 0.35, 0.7, 1.0)  # of the link: 0 is the logarithm, 1 leaves the increase as it is
    ceilings: tuple[float, ...] = (np.inf, 1.6, 1.1)  # of the link, in multiples of the largest increase seen
    pairs: tuple[float, ...] = (0.0, 0.03, 0.3)  # prior variance of products of two players
    rests: tuple[float, ...] = (0.02, 0.15, 0.6)  # of the remainder


ADDITIVE = Prior(powers=(1.0,), ceilings=(np.inf,), pairs=(0.0,), rests=(0.0,))
"""Main effects alone, of the increase itself: what is left of the method without any interaction."""


@dataclasses.dataclass(frozen=True)
class Link:
    """z = ((u^p) − 1)/p or log u with u = −c log(1 − Δ/c): a loss increase Δ on a scale where effects add up better."""

    power: float
    ceiling: float  # c, nats per token

    def __call__(self, increase: Array) -> Array:
        """Return z of increases Δ > 0."""
        unbent = self._unbent(increase)
        bent: Array = np.log(unbent) if self.power == 0 else (unbent**self.power - 1) / self.power
        return bent

    def log_slope(self, increase: Array) -> Array:
        """Return log dz/dΔ."""
        slope = (self.power - 1) * np.log(self._unbent(increase))
        return slope if np.isinf(self.ceiling) else slope - np.log1p(-increase / self.ceiling)

    def _unbent(self, increase: Array) -> Array:
        if np.isinf(self.ceiling):
            return increase
        unbent: Array = -self.ceiling * np.log1p(-increase / self.ceiling)
        return unbent


class Surrogate:
    """What evaluations say of coalitions near a budget.

    Parameters
    ----------
    lowest
        (n, N), 1.0 where a player is at 2 bit.
    increases
        (n,), loss over all at 4 bit, nats per token; those not above 0 count as a thousandth of the largest.
    cost
        (N,), of a player at 4 bit; below 0 where 4 bit takes less than 2, as time may.
    budget
        Of Σ cost over the players at 4 bit.
    prior
        What may be believed.
    """

    def __init__(self, lowest: Array, increases: Array, cost: Array, budget: float, prior: Prior | None = None) -> None:
        scale = float(np.abs(cost).sum()) or 1.0
        away = np.abs((1 - lowest) @ cost - budget) / scale
        chosen = np.sort(np.argsort(away, kind="stable")[:NEAREST])
        self._points, away = lowest[chosen], away[chosen]
        top = float(increases.max())
        self._increases = np.maximum(increases[chosen], 1e-3 * top)
        self._centre = 1 - float(np.clip(budget / scale, 0, 1))
        self._blur = np.exp(np.minimum(away / _FAR, 6.0))
        self._fitted = self._most_likely(top, prior or Prior())

    @property
    def link(self) -> Link:
        """The link that fits best."""
        return self._fitted.link

    @property
    def shares(self) -> tuple[float, float, float]:
        """Prior variances of pairs, remainder and noise that fit best."""
        return self._fitted.shares

    def predict(self, lowest: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of the link of the increase, both (m,), standardised; lower is better."""
        fitted = self._fitted
        cross = self._kernel(lowest, fitted.shares)
        mean: Array = cross @ fitted.weights
        solved = linalg.solve_triangular(fitted.factor, cross.T, lower=True, check_finite=False)
        prior = self._diagonal(lowest, fitted.shares)
        return mean, np.sqrt(np.maximum(prior - (solved**2).sum(axis=0), 1e-12))

    def mean(self, lowest: Array) -> Array:
        """Return the mean alone, which is many times faster."""
        mean: Array = self._kernel(lowest, self._fitted.shares) @ self._fitted.weights
        return mean

    def _most_likely(self, top: float, prior: Prior) -> "_Fitted":
        """Choose the link, then how far to shrink, then the link again."""
        own = functools.cache(lambda pairs, rest: self._kernel(self._points, (pairs, rest, 0.0)))  # of one fit only
        links = [Link(power, ceiling * top) for power, ceiling in itertools.product(prior.powers, prior.ceilings)]
        shares = list(itertools.product(prior.pairs, prior.rests, _NOISES))
        found = max((self._fit(link, shares[-1], own) for link in links), key=_evidence)
        found = max((self._fit(found.link, each, own) for each in shares), key=_evidence)
        return max((self._fit(link, found.shares, own) for link in links), key=_evidence)

    def _fit(self, link: Link, shares: tuple[float, float, float], own: Callable[[float, float], Array]) -> "_Fitted":
        pairs, rest, noise = shares
        values = link(self._increases)
        spread = float(values.std()) or 1.0
        z = (values - values.mean()) / spread
        kernel = own(pairs, rest) + np.diag(noise * self._blur)
        factor = np.linalg.cholesky(kernel + 1e-9 * np.eye(len(z)))
        weights = linalg.cho_solve((factor, True), z, check_finite=False)
        slopes = float(link.log_slope(self._increases).sum()) - len(z) * np.log(spread)
        evidence = float(-0.5 * z @ weights - np.log(np.diag(factor)).sum() + slopes)
        return _Fitted(link, shares, factor, weights, evidence)

    def _kernel(self, lowest: Array, shares: tuple[float, float, float]) -> Array:
        pairs, rest, _ = shares
        n = lowest.shape[1]
        one, other = lowest - self._centre, self._points - self._centre
        products = one @ other.T / n
        kernel = 1.0 + _MAIN * products
        if pairs:
            kernel = kernel + pairs * n * (products**2 - (one**2 @ (other**2).T) / n**2)
        if rest:
            differ = lowest @ (1 - self._points).T + (1 - lowest) @ self._points.T
            kernel = kernel + rest * np.exp(-differ / _REACH)
        result: Array = kernel
        return result

    def _diagonal(self, lowest: Array, shares: tuple[float, float, float]) -> Array:
        pairs, rest, _ = shares
        n = lowest.shape[1]
        square = (lowest - self._centre) ** 2
        products = square.sum(axis=1) / n
        result: Array = 1 + _MAIN * products + pairs * n * (products**2 - (square**2).sum(axis=1) / n**2) + rest
        return result


@dataclasses.dataclass(frozen=True)
class _Fitted:
    link: Link
    shares: tuple[float, float, float]
    factor: Array  # lower Cholesky factor of the kernel at the points
    weights: Array
    evidence: float  # log marginal likelihood of the increases


def _evidence(fitted: _Fitted) -> float:
    return fitted.evidence
