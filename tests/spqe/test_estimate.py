from itertools import permutations as all_orders

import numpy as np
import pytest

from impq_edge.spqe.estimate import estimate, marginals
from impq_edge.spqe.sampling import Coalition, evaluation_order, permutations, walk


def random_game(n_blocks: int, seed: int) -> dict[Coalition, float]:
    """A loss for every coalition, with strong interactions."""
    rng = np.random.default_rng(seed)
    singles, pairs = rng.random(n_blocks), rng.normal(size=(n_blocks, n_blocks))
    game = {}
    for mask in range(2**n_blocks):
        demoted = np.array([mask >> i & 1 for i in range(n_blocks)])
        value = np.tanh(singles @ demoted + demoted @ pairs @ demoted / n_blocks)
        game[tuple(2 if d else 4 for d in demoted)] = float(value)
    return game


def exact_shapley(game: dict[Coalition, float], n_blocks: int) -> np.ndarray:
    every_order = np.array(list(all_orders(range(n_blocks))))
    return marginals(every_order, game).mean(axis=0)


@pytest.mark.parametrize("n_blocks", [3, 5, 7])
def test_agrees_with_enumeration_within_its_error_bars(n_blocks: int) -> None:
    game = random_game(n_blocks, seed=n_blocks)
    result = estimate(marginals(permutations(n_blocks, 400, seed=1), game))
    deviations = (result.phi - exact_shapley(game, n_blocks)) / result.phi_stderr
    assert np.abs(deviations).max() < 4
    assert np.sqrt((deviations**2).mean()) < 2


def test_efficiency_holds_for_any_number_of_permutations() -> None:
    game = random_game(6, seed=2)
    for count in (1, 3):
        result = estimate(marginals(permutations(6, count, seed=0), game))
        assert result.phi.sum() == pytest.approx(game[(2,) * 6] - game[(4,) * 6])
        assert np.allclose(result.covariance.sum(axis=1), 0)


def test_dummy_and_symmetric_blocks() -> None:
    game = {c: float((c[0] == 2) + 2 * (c[1] == c[2] == 2)) for c in random_game(4, 0)}
    phi = exact_shapley(game, 4)
    assert phi == pytest.approx([1, 1, 1, 0])
    sampled = estimate(marginals(permutations(4, 50, seed=3), game))
    assert sampled.phi[3] == 0 and sampled.phi_stderr[3] == 0 and sampled.covariance[3, 3] == 0


def test_an_additive_game_has_no_covariance() -> None:
    costs = np.array([0.5, 0.25, 1.0])
    game = {c: float(costs @ (np.array(c) == 2)) for c in random_game(3, 0)}
    result = estimate(marginals(permutations(3, 10, seed=0), game))
    assert result.phi == pytest.approx(costs) and np.allclose(result.covariance, 0)


def test_walks_share_their_ends_and_repeat_nothing() -> None:
    orders = permutations(8, 5, seed=4)
    wanted = evaluation_order(orders)
    assert len(wanted) == len(set(wanted)) <= 5 * 7 + 2
    assert set(wanted) == {coalition for order in orders for coalition in walk(order)}
    assert np.array_equal(orders, permutations(8, 5, seed=4)) and not np.array_equal(orders, permutations(8, 5, seed=5))
    assert np.array_equal(orders[:3], permutations(8, 3, seed=4))  # more permutations extend, never reshuffle
