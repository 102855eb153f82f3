import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations as all_orders
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.spqe.complements import covariance_of_marginals
from impq_edge.spqe.estimate import Estimate, estimate, marginals
from impq_edge.spqe.sampling import ESTIMATORS, Coalition, Draw, Estimator, draws, draws_for, uniform

Losses = dict[Coalition, float]
ALL = 10**6
"""More draws than there are complement pairs."""


def every_coalition(n_players: int) -> Iterator[Coalition]:
    two, four = uniform(2, 1), uniform(4, 1)
    return (tuple(b for (b,) in bits) for bits in product((two, four), repeat=n_players))


def game_of(n_players: int, loss: Callable[[NDArray[np.float64]], float]) -> Losses:
    """v of every coalition; ``loss`` takes a vector with 1 for players at 2 bit."""
    return {c: float(loss((np.array(c) == 2).astype(float))) for c in every_coalition(n_players)}


@cache
def game(kind: str, n_players: int, seed: int) -> Losses:
    rng = np.random.default_rng(seed)
    costs = rng.gamma(2, size=n_players)
    costs /= costs.sum()
    pairs = np.triu(rng.normal(size=(n_players, n_players)), 1) * 2 / n_players
    triples = rng.normal(size=(n_players,) * 3) / n_players**2
    values = rng.random(2**n_players)

    def pairwise(x: NDArray[np.float64]) -> float:
        return float(x @ costs + x @ pairs @ x)

    losses: dict[str, Callable[[NDArray[np.float64]], float]] = {
        "additive": lambda x: float(x @ costs),
        "pairwise": pairwise,
        "triples": lambda x: pairwise(x) + float(np.einsum("i,j,k,ijk", x, x, x, triples)),
        "saturating": lambda x: 1 - math.exp(-4 * float(x @ costs)),
        "sigmoid": lambda x: 1 / (1 + math.exp(-12 * (float(x @ costs) - 0.5))),
        "bent pairs": lambda x: math.tanh(pairwise(x)),
        "no structure": lambda x: float(values[int(sum(2**i * b for i, b in enumerate(x)))]),
    }
    return game_of(n_players, losses[kind])


KINDS = ["additive", "pairwise", "triples", "saturating", "sigmoid", "bent pairs", "no structure"]


def exact_shapley(losses: Losses) -> NDArray[np.float64]:
    n_players = len(next(iter(losses)))
    phi = np.zeros(n_players)
    for coalition, loss in losses.items():
        demoted = coalition.count(2)
        for player in range(n_players):
            if coalition[player] == 4:
                lower = (*coalition[:player], 2, *coalition[player + 1 :])
                weight = math.factorial(demoted) * math.factorial(n_players - demoted - 1) / math.factorial(n_players)
                phi[player] += weight * (losses[lower] - loss)
    return phi


def exact_covariance(losses: Losses) -> NDArray[np.float64]:
    n_players = len(next(iter(losses)))
    increases = marginals(np.array(list(all_orders(range(n_players)))), losses)
    centred: NDArray[np.float64] = increases - increases.mean(axis=0)
    return centred.T @ centred / len(centred)


def sampled(estimator: Estimator, losses: Losses, count: int, seed: int = 0) -> Estimate:
    n_players = len(next(iter(losses)))
    return estimate(estimator, n_players, draws(estimator, n_players, count, seed), losses)


def deviations(
    estimator: Estimator, kind: str, n_players: int, count: int, seeds: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Errors and errors in standard errors, (seeds, N) each, over three games."""
    errors, scores = [], []
    for seed in seeds:
        losses = game(kind, n_players, seed % 3)
        found = sampled(estimator, losses, count, seed)
        errors.append(found.phi - exact_shapley(losses))
        scores.append(errors[-1] / (found.phi_stderr + 1e-9))
    return np.array(errors), np.array(scores)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_players", [5, 8])
def test_agrees_with_enumeration_within_its_error_bars(estimator: Estimator, kind: str, n_players: int) -> None:
    """Over 40 runs: errors are neither larger nor much smaller than the standard errors say."""
    count = 40 if estimator != "stratified" else {5: 12, 8: 48}[n_players]
    _, scores = deviations(estimator, kind, n_players, count, range(40))
    exact = kind == "additive" or (kind == "pairwise" and estimator != "permutations")
    assert np.mean(np.abs(scores) < 2) >= (1 if exact else 0.87)
    rms = np.sqrt(np.mean(scores**2))
    assert rms < 1e-3 if exact else 0.4 < rms < 1.5


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("pairs", [3, 8, 12, 20, 31, 32])
def test_few_pairs_promise_no_more_than_they_know(kind: str, pairs: int) -> None:
    """Fewer pairs than the 8 players, about as many, and where the curved fit sets in."""
    _, scores = deviations("stratified", kind, 8, pairs, range(30))
    assert np.mean(np.abs(scores) < 2) >= 0.85


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=40)
@given(n_players=st.integers(1, 7), count=st.integers(1, 70), seed=st.integers(0, 2), kind=st.sampled_from(KINDS))
def test_efficiency_for_any_number_of_draws(
    estimator: Estimator, n_players: int, count: int, seed: int, kind: str
) -> None:
    losses = game(kind, n_players, seed)
    found = sampled(estimator, losses, count, seed)
    assert abs(found.phi.sum() - (losses[uniform(2, n_players)] - losses[uniform(4, n_players)])) < 1e-12
    assert np.abs(found.covariance.sum(axis=1)).max() < 1e-12
    assert np.array_equal(found.covariance, found.covariance.T)
    assert np.isfinite(found.phi_stderr).all() and (found.phi_stderr >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_players", range(1, 9))
def test_all_pairs_give_shapley_values_exactly(kind: str, n_players: int) -> None:
    losses = game(kind, n_players, seed=1)
    found = sampled("stratified", losses, ALL)
    assert found.phi == pytest.approx(exact_shapley(losses), abs=1e-12)
    assert found.phi_stderr == pytest.approx(np.zeros(n_players), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_additive_games_are_exact(estimator: Estimator) -> None:
    losses = game("additive", 8, seed=0)
    found = sampled(estimator, losses, 12)
    assert found.phi == pytest.approx(exact_shapley(losses), abs=1e-12)
    assert found.phi_stderr == pytest.approx(np.zeros(8), abs=1e-9)
    assert found.covariance == pytest.approx(np.zeros((8, 8)), abs=1e-12)


def symmetric_game(x: NDArray[np.float64]) -> float:
    """Players 0 and 1 are alike; player 2 changes nothing."""
    return math.tanh(x[0] + x[1] + 2 * x[0] * x[1] - 0.5 * x[3] * x[4] + x[5] * (x[0] + x[1]) - 0.3 * x[5])


def test_symmetric_players_and_dummies() -> None:
    losses = game_of(6, symmetric_game)
    orders = list(all_orders(range(6)))
    for found in (estimate("permutations", 6, orders, losses), sampled("stratified", losses, ALL)):
        assert found.phi[0] == pytest.approx(found.phi[1], abs=1e-12) and found.phi[2] == pytest.approx(0, abs=1e-12)
        assert found.covariance[0, 0] == pytest.approx(found.covariance[1, 1], abs=1e-12)
    for estimator in ESTIMATORS[:2]:
        found = sampled(estimator, losses, 20)
        assert found.phi[2] == found.phi_stderr[2] == 0 and not found.covariance[2].any()
    for estimator, count in (("permutations", 60), ("antithetic", 60), ("stratified", 26)):
        scores = []
        for seed in range(20):
            found = sampled(estimator, losses, count, seed)
            scores.append((found.phi[0] - found.phi[1]) / np.hypot(found.phi_stderr[0], found.phi_stderr[1]))
            assert abs(found.phi[2]) <= 5 * found.phi_stderr[2]
        assert np.sqrt(np.mean(np.square(scores))) < 2


@pytest.mark.parametrize("n_players", [2, 3, 4, 5, 6])
def test_covariance_of_a_pairwise_game_in_closed_form(n_players: int) -> None:
    rng = np.random.default_rng(n_players)
    single, pairs = rng.normal(size=n_players), np.triu(rng.normal(size=(n_players, n_players)), 1)
    losses = game_of(n_players, lambda x: float(single @ x + x @ pairs @ x))
    expected = exact_covariance(losses)
    assert covariance_of_marginals(pairs + pairs.T) == pytest.approx(expected, abs=1e-12)
    assert sampled("stratified", losses, ALL).covariance == pytest.approx(expected, abs=1e-10)
    orders = list(all_orders(range(n_players)))
    assert estimate("permutations", n_players, orders, losses).covariance == pytest.approx(expected, abs=1e-12)


def test_a_part_of_the_pairs_suffices_for_a_pairwise_game() -> None:
    losses = game("pairwise", 6, seed=0)  # 15 interactions; 31 pairs in all
    assert sampled("stratified", losses, 22).covariance == pytest.approx(exact_covariance(losses), abs=1e-6)


@pytest.mark.parametrize("kind", ["triples", "saturating", "bent pairs"])
def test_covariance_from_pairs_is_closer_than_from_as_many_walks(kind: str) -> None:
    errors: dict[str, list[float]] = {"permutations": [], "stratified": []}
    for seed in range(12):
        losses = game(kind, 6, seed % 3)
        for estimator in (ESTIMATORS[0], ESTIMATORS[2]):
            found = sampled(estimator, losses, draws_for(estimator, 6, 8), seed)
            errors[estimator].append(float(np.linalg.norm(found.covariance - exact_covariance(losses))))
    assert np.mean(errors["stratified"]) < np.mean(errors["permutations"]) / 1.5


@pytest.mark.parametrize("kind", ["pairwise", "triples", "saturating", "bent pairs"])
def test_better_estimators_err_less_at_equal_evaluations(kind: str) -> None:
    root_mean_square = {}
    for estimator in ESTIMATORS:
        errors, _ = deviations(estimator, kind, 8, draws_for(estimator, 8, 16), range(30))
        root_mean_square[estimator] = float(np.sqrt(np.mean(errors**2)))
    assert root_mean_square["antithetic"] < root_mean_square["permutations"] / 1.2
    assert root_mean_square["stratified"] < root_mean_square["antithetic"] + 1e-12


def test_published_estimate_is_mean_and_covariance_over_walks() -> None:
    losses = game("bent pairs", 4, seed=0)
    increases = marginals(np.array([[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]]), losses)
    assert increases[1] == pytest.approx(
        [
            losses[2, 4, 2, 4] - losses[4, 4, 2, 4],
            losses[2, 2, 2, 2] - losses[2, 4, 2, 2],
            losses[4, 4, 2, 4] - losses[4, 4, 4, 4],
            losses[2, 4, 2, 2] - losses[2, 4, 2, 4],
        ]
    )
    found = estimate("permutations", 4, [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)], losses)
    assert found.phi == pytest.approx(increases.mean(axis=0))
    assert found.phi_stderr == pytest.approx(increases.std(axis=0, ddof=1) / math.sqrt(3))
    assert found.covariance == pytest.approx(np.cov(increases.T, bias=True))


def test_an_order_without_its_reverse_is_left_out() -> None:
    losses = game("bent pairs", 6, seed=2)
    odd, even = sampled("antithetic", losses, 7), sampled("antithetic", losses, 6)
    assert np.array_equal(odd.phi, even.phi) and np.array_equal(odd.phi_stderr, even.phi_stderr)
    alone = sampled("antithetic", losses, 1)
    assert np.array_equal(alone.phi, sampled("permutations", losses, 1).phi) and not alone.phi_stderr.any()


def test_either_side_of_a_pair_may_be_named() -> None:
    losses = game("no structure", 7, seed=0)
    found = draws("stratified", 7, 30, seed=0)
    others: list[Draw] = [tuple(sorted({*range(7)} - {*draw})) for draw in found]
    one, other = estimate("stratified", 7, found, losses), estimate("stratified", 7, others, losses)
    assert one.phi == pytest.approx(other.phi) and one.phi_stderr == pytest.approx(other.phi_stderr)
    assert one.covariance == pytest.approx(other.covariance)


def test_units_and_reference_do_not_matter() -> None:
    losses = game("bent pairs", 8, seed=0)
    found = sampled("stratified", losses, 50)
    scaled = sampled("stratified", {c: 7 + 1000 * v for c, v in losses.items()}, 50)
    assert scaled.phi == pytest.approx(1000 * found.phi) and scaled.phi_stderr == pytest.approx(1000 * found.phi_stderr)
    assert scaled.covariance == pytest.approx(1e6 * found.covariance, rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_lone_player_takes_it_all_and_no_draw_is_refused(estimator: Estimator) -> None:
    found = sampled(estimator, {(4,): 1.0, (2,): 3.5}, 1)
    assert found.phi == [2.5] and found.phi_stderr == [0] and found.covariance == [[0]]
    with pytest.raises(SensitivityError, match=r"There are 0 .* evaluate at least 1"):
        estimate(estimator, 3, [], game("additive", 3, 0))
