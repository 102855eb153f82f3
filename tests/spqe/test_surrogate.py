"""The surrogate: what it knows it returns, what it was told of interactions it finds, and links are monotone."""

import numpy as np
import pytest

from impq_edge.spqe.surrogate import ADDITIVE, Link, Prior, Surrogate

N = 12
GENERATOR = np.random.default_rng(5)
HARM = GENERATOR.gamma(1.0, size=N)
PAIRS = np.triu(GENERATOR.normal(size=(N, N)), 1) * 0.8


def coalitions(count: int, seed: int) -> np.ndarray:
    """Rows with 4 to 8 players at 2 bit, none twice."""
    generator = np.random.default_rng(seed)
    rows: dict[tuple[float, ...], None] = {}
    while len(rows) < count:
        row = np.zeros(N)
        row[generator.permutation(N)[: generator.integers(4, 9)]] = 1
        rows[tuple(row)] = None
    return np.array(list(rows))


def additive(lowest: np.ndarray) -> np.ndarray:
    return lowest @ HARM


def pairwise(lowest: np.ndarray) -> np.ndarray:
    return lowest @ HARM + np.einsum("ni,ij,nj->n", lowest, PAIRS, lowest) + 4


def saturating(lowest: np.ndarray) -> np.ndarray:
    return 7 * (1 - np.exp(-lowest @ HARM / 3))


def order(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; no ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def surrogate(game: object, rows: np.ndarray, prior: Prior | None = None) -> Surrogate:
    return Surrogate(rows, game(rows), np.ones(N), N / 2, prior)  # type: ignore[operator]


@pytest.mark.parametrize("game", [additive, pairwise, saturating])
def test_what_was_measured_is_known(game: object) -> None:
    rows = coalitions(90, 0)
    mean, deviation = surrogate(game, rows).predict(rows)
    assert order(mean, game(rows)) > 0.98  # type: ignore[operator]
    far = coalitions(300, 9)
    far = far[(far[:, None] != rows).sum(axis=2).min(axis=1) >= 3]
    assert deviation.mean() < surrogate(game, rows).predict(far)[1].mean(), "the unknown is less certain"


@pytest.mark.parametrize("game", [additive, pairwise, saturating])
def test_what_was_not_measured_is_put_in_order(game: object) -> None:
    rows, unseen = coalitions(90, 0), coalitions(200, 1)
    mean, _ = surrogate(game, rows).predict(unseen)
    assert order(mean, game(unseen)) > 0.93  # type: ignore[operator]


def test_pairs_are_found_where_there_are_some() -> None:
    rows, unseen = coalitions(90, 0), coalitions(200, 1)
    full, flat = (surrogate(pairwise, rows, prior).predict(unseen)[0] for prior in (None, ADDITIVE))
    assert order(full, pairwise(unseen)) > order(flat, pairwise(unseen)) + 0.02


def test_a_saturating_game_is_unbent() -> None:
    rows = coalitions(90, 0)
    assert surrogate(saturating, rows).link.ceiling < np.inf
    straight = surrogate(additive, rows)
    assert straight.link == Link(1.0, np.inf)
    assert straight.shares[0] == 0, "an additive game has no pairs"


@pytest.mark.parametrize("power", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("ceiling", [np.inf, 8.0])
def test_links_are_monotone_and_their_slope_is_right(power: float, ceiling: float) -> None:
    link, increases, step = Link(power, ceiling), np.linspace(0.1, 7.5, 50), 1e-6
    values = link(increases)
    assert (np.diff(values) > 0).all()
    slopes = (link(increases + step) - link(increases - step)) / (2 * step)
    np.testing.assert_allclose(link.log_slope(increases), np.log(slopes), atol=1e-5)


def test_the_unit_of_costs_and_losses_does_not_matter() -> None:
    rows, unseen = coalitions(90, 0), coalitions(50, 1)
    one = Surrogate(rows, pairwise(rows), np.ones(N), N / 2, Prior(powers=(1.0,), ceilings=(np.inf,)))
    other = Surrogate(rows, 1e-3 * pairwise(rows), np.full(N, 7e6), 7e6 * N / 2, Prior((1.0,), (np.inf,)))
    np.testing.assert_allclose(one.predict(unseen)[0], other.predict(unseen)[0], atol=1e-6)


def test_increases_below_zero_are_taken_as_next_to_nothing() -> None:
    rows = coalitions(40, 0)
    increases = additive(rows)
    increases[:3] = [-0.2, 0.0, -1e-9]
    mean, deviation = Surrogate(rows, increases, np.ones(N), N / 2).predict(rows)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()
