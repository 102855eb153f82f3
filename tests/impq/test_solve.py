from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Constraint, Problem, published_objective
from impq_edge.impq.solve import solve


def random_problem(seed: int, n_blocks: int, n_constraints: int = 1, cost_scale: int = 10**6) -> Problem:
    rng = np.random.default_rng(seed)
    walks = rng.normal(size=(int(rng.integers(2, 12)), n_blocks)) * 10.0 ** rng.integers(-5, 1)
    walks += rng.random(n_blocks) * 0.1 * rng.integers(0, 2)
    phi = walks.mean(axis=0)
    covariance = (walks - phi).T @ (walks - phi) / len(walks)
    linear, quadratic = published_objective(phi, covariance, float(rng.choice([0.0, 0.5, 1.0])))
    constraints = []
    for index in range(n_constraints):
        costs = tuple(int(c) for c in rng.integers(1, cost_scale, size=n_blocks))
        constraints.append(Constraint(f"budget {index}", "bytes", costs, int(rng.integers(0, sum(costs) + 2))))
    return Problem(tuple(linear.tolist()), tuple(map(tuple, quadratic.tolist())), tuple(constraints))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_blocks=st.integers(1, 9), n_constraints=st.integers(1, 2))
def test_equals_enumeration(seed: int, n_blocks: int, n_constraints: int) -> None:
    problem = random_problem(seed, n_blocks, n_constraints)
    solution = solve(problem)
    best = min(problem.objective(q) for q in product((0, 1), repeat=n_blocks) if problem.is_feasible(q))
    scale = max(np.abs(problem.linear).max(), np.abs(problem.quadratic).max())
    assert problem.is_feasible(solution.demoted)
    assert solution.objective == pytest.approx(best, abs=1e-6 * scale)
    assert solution.lower_bound <= best + 1e-6 * scale
    assert solution.relaxation_bound <= best + 1e-6 * scale


def test_published_objective_is_mean_plus_variance_penalty_when_rows_have_one_sum() -> None:
    """Marginals of a permutation add up to a constant, so C·1 = 0 and a_i + K_ii = φ_i + (2 − α) C_ii."""
    walks = np.random.default_rng(0).normal(size=(20, 6))
    walks -= walks.mean(axis=1, keepdims=True)
    phi, covariance = walks.mean(axis=0), np.cov(walks.T, bias=True)
    for alpha in (0.0, 0.5, 1.0):
        linear, quadratic = published_objective(phi, covariance, alpha)
        assert np.allclose(linear + np.diag(quadratic), phi + (2 - alpha) * np.diag(covariance))


def test_no_interactions_at_alpha_one() -> None:
    covariance = np.array([[2.0, 1.0], [1.0, 3.0]])
    linear, quadratic = published_objective(np.array([1.0, 1.0]), covariance, alpha=1.0)
    assert np.array_equal(quadratic, np.diag([2.0, 3.0])) and np.array_equal(linear, [1.0, 1.0])


def test_negative_budget_says_by_how_much() -> None:
    problem = Problem((1.0,), ((0.0,),), (Constraint("device memory", "bytes", (10,), -7),))
    with pytest.raises(AllocationError, match="device memory is 7 bytes too small"):
        solve(problem)


@pytest.mark.parametrize("short", [1, 8, 31])
@pytest.mark.parametrize("common", [200_000_000, 199_999_999])
def test_budgets_a_few_bytes_short_of_another_block(short: int, common: int) -> None:
    """Less than the solver's tolerance of a cost, with equal costs and with costs that have no common divisor."""
    costs = tuple(common + (i % 2 if common % 2 else 0) for i in range(6))
    phi = (0.3, 0.1, 0.2, 0.25, 0.15, 0.05)
    budget = sum(sorted(costs)[:3]) - short
    problem = Problem(phi, ((0.0,) * 6,) * 6, (Constraint("device memory", "bytes", costs, budget),))
    solution = solve(problem)
    best = min(problem.objective(q) for q in product((0, 1), repeat=6) if problem.is_feasible(q))
    assert problem.is_feasible(solution.demoted) and solution.objective == pytest.approx(best)


def test_scale_of_the_losses_does_not_matter() -> None:
    problem = random_problem(3, 8)
    for factor in (1e-9, 1e-4, 1e6):
        scaled = Problem(
            tuple(factor * a for a in problem.linear),
            tuple(tuple(factor * k for k in row) for row in problem.quadratic),
            problem.constraints,
        )
        assert solve(scaled).demoted == solve(problem).demoted


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_players=st.integers(2, 9))
def test_any_symmetric_matrix_will_do(seed: int, n_players: int) -> None:
    """A fitted pairwise model is no covariance and need not be convex."""
    rng = np.random.default_rng(seed)
    pairs = rng.normal(size=(n_players, n_players))
    budget = Constraint("budget", "bytes", tuple(int(c) for c in rng.integers(1, 9, n_players)), 3 * n_players)
    quadratic = tuple(map(tuple, (pairs + pairs.T).tolist()))
    problem = Problem(tuple(rng.normal(size=n_players).tolist()), quadratic, (budget,))
    solution = solve(problem)
    best = min(problem.objective(q) for q in product((0, 1), repeat=n_players) if problem.is_feasible(q))
    assert solution.objective == pytest.approx(best, abs=1e-6 * max(1.0, np.abs(quadratic).max()))
    assert solution.lower_bound <= solution.objective and solution.relaxation_bound <= best + 1e-6


def test_two_hundred_players() -> None:
    """As many as a 30-block model has matrices; the bound proves the answer."""
    rng = np.random.default_rng(0)
    typical = rng.exponential(0.01, size=210)
    walks = typical * (1 + 0.3 * rng.normal(size=(100, 210)))
    phi = walks.mean(axis=0)
    linear, quadratic = published_objective(phi, np.cov(walks.T, bias=True), 0.5)
    costs = tuple(int(c) for c in rng.integers(1, 9, 210) * 65_536)
    problem = Problem(
        tuple(linear.tolist()),
        tuple(map(tuple, quadratic.tolist())),
        (Constraint("b", "bytes", costs, sum(costs) // 2),),
    )
    solution = solve(problem)
    assert problem.is_feasible(solution.demoted)
    assert solution.objective - solution.lower_bound <= 1e-6 * np.abs(linear).max()
