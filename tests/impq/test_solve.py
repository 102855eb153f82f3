import ctypes
from collections.abc import Iterable
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Choice, Constraint, Problem, ladder_objective, published_objective
from impq_edge.impq.quiet import c_stdout_dropped
from impq_edge.impq.solve import _convexifying, least, solve

Rows = Iterable[Iterable[float]]


def published(linear: Iterable[float], quadratic: Rows, *constraints: tuple[str, Iterable[int], int]) -> Problem:
    """The paper's program: two types, the lower at a loss and the higher at a cost."""
    return Problem(
        tuple((float(a), 0.0) for a in linear),
        tuple(tuple(map(float, row)) for row in quadratic),
        tuple(
            Constraint(name, "bytes", tuple((0, int(cost)) for cost in costs), budget)
            for name, costs, budget in constraints
        ),
    )


def feasible(problem: Problem) -> list[Choice]:
    """Every choice that keeps the budgets."""
    types = range(len(problem.losses[0]))
    return [choice for choice in product(types, repeat=len(problem.losses)) if problem.is_feasible(choice)]


def best_objective(problem: Problem) -> float:
    return min(map(problem.objective, feasible(problem)))


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
        constraints.append((f"budget {index}", costs, int(rng.integers(0, sum(costs) + 2))))
    return published(linear, quadratic, *constraints)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n_blocks=st.integers(1, 9), n_constraints=st.integers(1, 2))
def test_equals_enumeration(seed: int, n_blocks: int, n_constraints: int) -> None:
    problem = random_problem(seed, n_blocks, n_constraints)
    solution = solve(problem)
    best = best_objective(problem)
    scale = max(np.abs(problem.losses).max(), np.abs(problem.quadratic).max())
    assert problem.is_feasible(solution.choice)
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
    problem = published([1], [[0]], ("device memory", [10], -7))
    with pytest.raises(AllocationError, match="device memory is 7 bytes too small"):
        solve(problem)


@pytest.mark.parametrize("short", [1, 8, 31])
@pytest.mark.parametrize("common", [200_000_000, 199_999_999])
def test_budgets_a_few_bytes_short_of_another_block(short: int, common: int) -> None:
    """Less than the solver's tolerance of a cost, with equal costs and with costs that have no common divisor."""
    costs = tuple(common + (i % 2 if common % 2 else 0) for i in range(6))
    phi = (0.3, 0.1, 0.2, 0.25, 0.15, 0.05)
    budget = sum(sorted(costs)[:3]) - short
    problem = published(phi, np.zeros((6, 6)), ("device memory", costs, budget))
    solution = solve(problem)
    assert problem.is_feasible(solution.choice) and solution.objective == pytest.approx(best_objective(problem))


def test_scale_of_the_losses_does_not_matter() -> None:
    problem = random_problem(3, 8)
    for factor in (1e-9, 1e-4, 1e6):
        scaled = Problem(
            tuple(tuple(factor * loss for loss in row) for row in problem.losses),
            tuple(tuple(factor * k for k in row) for row in problem.quadratic),
            problem.constraints,
        )
        assert solve(scaled).choice == solve(problem).choice


@settings(max_examples=30)
@example(seed=15619, n_players=9)  # on which HiGHS once ended in an error
@given(seed=st.integers(0, 2**32 - 1), n_players=st.integers(2, 9))
def test_any_symmetric_matrix_will_do(seed: int, n_players: int) -> None:
    """A fitted pairwise model is no covariance and need not be convex."""
    rng = np.random.default_rng(seed)
    pairs = rng.normal(size=(n_players, n_players))
    budget = ("budget", rng.integers(1, 9, n_players), 3 * n_players)
    problem = published(rng.normal(size=n_players), pairs + pairs.T, budget)
    solution = solve(problem)
    best = best_objective(problem)
    assert solution.objective == pytest.approx(best, abs=1e-6 * max(1.0, np.abs(problem.quadratic).max()))
    assert solution.lower_bound <= solution.objective and solution.relaxation_bound <= best + 1e-6


def test_two_hundred_players() -> None:
    """As many as a 30-block model has matrices; the bound proves the answer."""
    rng = np.random.default_rng(0)
    typical = rng.exponential(0.01, size=210)
    walks = typical * (1 + 0.3 * rng.normal(size=(100, 210)))
    phi = walks.mean(axis=0)
    linear, quadratic = published_objective(phi, np.cov(walks.T, bias=True), 0.5)
    costs = rng.integers(1, 9, 210) * 65_536
    problem = published(linear, quadratic, ("b", costs, int(costs.sum()) // 2))
    solution = solve(problem)
    assert problem.is_feasible(solution.choice)
    assert solution.objective - solution.lower_bound <= 1e-6 * np.abs(linear).max()


TYPES = np.array([2, 3, 4, 5, 6, 8])


def random_ladder(seed: int, n_players: int, n_types: int, n_constraints: int, noise: float = 0.5) -> Problem:
    """Losses that fall with the bits but for noise, costs of either sign, pairs of either sign."""
    rng = np.random.default_rng(seed)
    bits = TYPES[:n_types]
    losses = rng.lognormal(size=(n_players, 1)) * 4.0**-bits * np.exp(noise * rng.normal(size=(n_players, n_types)))
    n_pairs = int(rng.integers(0, n_players + 1))
    pairs = rng.normal(size=(n_pairs, n_pairs)) * 10.0 ** rng.integers(-5, 0)
    constraints = []
    for index in range(n_constraints):
        costs = rng.integers(1, 1000, size=(n_players, 1)) * (bits - bits[0])
        costs += np.where(costs > 0, rng.integers(-2000, 500, size=costs.shape), 0) * int(rng.integers(0, 2))
        budget = int(rng.integers(0, max(1, int(costs.max(axis=1).sum())) + 2))
        constraints.append(Constraint(f"budget {index}", "bytes", tuple(map(tuple, costs.tolist())), budget))
    quadratic = tuple(map(tuple, (pairs + pairs.T).tolist()))
    return Problem(tuple(map(tuple, losses.tolist())), quadratic, tuple(constraints))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 6), (2, 5), (3, 6), (4, 4), (5, 3), (6, 3), (4, 6)]),
    n_constraints=st.integers(1, 3),
    noise=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_a_ladder_equals_enumeration(seed: int, shape: tuple[int, int], n_constraints: int, noise: float) -> None:
    problem = random_ladder(seed, *shape, n_constraints, noise)
    solution = solve(problem)
    best = best_objective(problem)
    scale = max(np.abs(problem.losses).max(), np.abs(np.array(problem.quadratic)).max(initial=0))
    assert problem.is_feasible(solution.choice) and len(solution.choice) == shape[0]
    assert solution.objective == problem.objective(solution.choice) == pytest.approx(best, abs=1e-6 * scale)
    assert solution.lower_bound <= best + 1e-6 * scale and solution.relaxation_bound <= best + 1e-6 * scale
    rough = solve(problem, relative_gap=0.1)
    assert problem.is_feasible(rough.choice) and rough.lower_bound <= best + 1e-6 * scale
    assert 0 <= rough.gap == rough.objective - rough.lower_bound <= max(0.1 * abs(rough.objective), 1e-6 * scale)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_third_type_that_never_pays_changes_nothing(seed: int) -> None:
    """The paper's program is the ladder of two types; one that is worse than the lowest and costs more is not taken."""
    problem = random_problem(seed, 6, 2)
    most = 1 + sum(abs(loss) for row in problem.losses for loss in row) + np.abs(problem.quadratic).sum()
    more = Problem(
        tuple((low, float(most), high) for low, high in problem.losses),
        problem.quadratic,
        tuple(
            Constraint(c.name, c.unit, tuple((0, 9, cost) for _, cost in c.costs), c.budget)
            for c in problem.constraints
        ),
    )
    scale = max(np.abs(problem.losses).max(), np.abs(problem.quadratic).max())
    found = solve(more)
    assert 1 not in found.choice
    assert problem.objective([kind // 2 for kind in found.choice]) == pytest.approx(
        best_objective(problem), abs=1e-6 * scale
    )


@pytest.mark.parametrize("slack", [0, 1, 10**12])
def test_where_everything_fits_each_player_has_its_best_type(slack: int) -> None:
    """Which is not the highest where that was measured to be worse."""
    losses = ((0.5, 0.01, 0.02), (0.3, 0.2, 0.1), (0.0, 0.1, 0.2))
    costs = ((0, 5, 9), (0, 50, 90), (0, 500, 900))
    found = solve(Problem(losses, (), (Constraint("file budget", "bytes", costs, 95 + slack),)))
    assert found.choice == (1, 2, 0)
    tight = solve(Problem(losses, (), (Constraint("file budget", "bytes", costs, 94),)))
    assert tight.choice == (1, 1, 0)


def test_pairs_act_on_the_lowest_type_alone() -> None:
    problem = Problem(((0.0, 0.1, 9.0), (0.0, 0.1, 9.0), (0.0, 0.1, 9.0)), ((0.0, 0.5), (0.5, 0.0)), ())
    assert [problem.objective(c) for c in ((0, 0, 0), (0, 1, 0), (1, 1, 1))] == pytest.approx([1.0, 0.1, 0.3])
    roomy = Constraint("file budget", "bytes", ((0, 1, 2),) * 3, 6)
    kept = Problem(problem.losses, problem.quadratic, (roomy,))
    assert solve(kept).objective == pytest.approx(0.1)
    negative = Problem(problem.losses, ((0.0, -0.5), (-0.5, 0.0)), (roomy,))
    assert solve(negative).choice == (0, 0, 0) and solve(negative).objective == pytest.approx(-1.0)


def test_a_budget_below_the_cheapest_types_says_by_how_much() -> None:
    """A type above the lowest may be the one that takes the least."""
    costs = ((0, -4, 10), (0, 7, -1))
    losses = ((0.1, 0.0, 0.0),) * 2
    assert solve(Problem(losses, (), (Constraint("device memory", "bytes", costs, -5),))).choice == (1, 2)
    with pytest.raises(AllocationError, match="device memory is 2 bytes too small"):
        solve(Problem(losses, (), (Constraint("device memory", "bytes", costs, -7),)))


@pytest.mark.filterwarnings("ignore:Clarabel.rs terminated with status PrimalInfeasible")
def test_budgets_that_exclude_one_another_are_named() -> None:
    memory = Constraint("device memory", "bytes", ((0, -4),), -1)
    file = Constraint("file budget", "bytes", ((0, 4),), 3)
    with pytest.raises(AllocationError, match="device memory and file budget at once; raise"):
        solve(Problem(((0.0, 1.0),), (), (memory, file)))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n_players=st.integers(1, 5))
def test_least_is_the_smallest_that_keeps_the_others(seed: int, n_players: int) -> None:
    constraint, *others = random_ladder(seed, n_players, 4, 3).constraints
    choices = [c for c in product(range(4), repeat=n_players) if all(o.used(c) <= o.budget for o in others)]
    found = least(constraint, tuple(others))
    assert found in choices and constraint.used(found) == min(map(constraint.used, choices))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from([0.0, 0.5]))
def test_a_ladders_interactions_are_the_papers(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    losses, walks = rng.random((5, 4)), rng.normal(size=(9, 3))
    covariance = np.cov(walks.T, bias=True)
    corrected, quadratic = ladder_objective(losses, covariance, alpha)
    problem = Problem(tuple(map(tuple, corrected.tolist())), tuple(map(tuple, quadratic.tolist())), ())
    _, published_quadratic = published_objective(losses[:3, 0], covariance, alpha)
    pairs = published_quadratic - np.diag(np.diag(published_quadratic))
    for _ in range(5):
        choice = rng.integers(0, 4, size=5)
        lowest = (choice[:3] == 0).astype(float)
        expected = losses[range(5), choice].sum() + lowest @ pairs @ lowest - pairs.sum(axis=1) @ lowest
        assert problem.objective(choice.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize("covariance", [None, np.eye(3)])
def test_a_ladder_without_interactions_is_its_losses(covariance: NDArray[np.float64] | None) -> None:
    losses = np.random.default_rng(0).random((4, 3))
    corrected, quadratic = ladder_objective(losses, covariance, 1.0)
    assert np.array_equal(corrected, losses) and quadratic.size == 0


def test_the_ladder_of_an_8b_model() -> None:
    """226 matrices, 6 types, interactions of the blocks' and two budgets, proven within 1e-4."""
    rng = np.random.default_rng(0)
    block = [4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096, *(3 * [14336 * 4096])]
    weights = np.array([*(32 * block), *(2 * [128256 * 4096])])
    losses = weights[:, None] * rng.lognormal(size=(226, 1)) * 4.0**-TYPES * np.exp(0.15 * rng.normal(size=(226, 6)))
    losses *= 3 / losses[:, 0].sum()
    walks = losses[:224, 0] * (1 + 0.3 * rng.normal(size=(100, 224)))
    walks *= losses[:224, 0].sum() / walks.sum(axis=1, keepdims=True)
    corrected, quadratic = ladder_objective(losses, np.cov(walks.T, bias=True), 0.5)
    per_256 = np.array([84, 110, 144, 176, 210, 272])
    file = weights[:, None] // 256 * (per_256 - 84)
    memory = weights[:, None] // 256 * (per_256 + np.array([0, 0, 144, 0, 0, 0]) - 84)  # Q4_K is held twice
    budget = int(0.2 * file[:, -1].sum())
    problem = Problem(
        tuple(map(tuple, corrected.tolist())),
        tuple(map(tuple, quadratic.tolist())),
        tuple(
            Constraint(name, "bytes", tuple(map(tuple, costs.tolist())), limit)
            for name, costs, limit in (("file budget", file, budget), ("device memory", memory, 21 * budget // 20))
        ),
    )
    solution = solve(problem, relative_gap=1e-4)
    assert problem.is_feasible(solution.choice)
    assert solution.relaxation_bound <= solution.lower_bound <= solution.objective
    assert solution.gap <= 1e-4 * solution.objective


def test_what_c_prints_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    """Which is what HiGHS does in spite of its options, and stdout may be a record."""
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with c_stdout_dropped():
        libc.puts(b"meanwhile")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("seed", range(6))
def test_what_goes_into_the_linear_term_leaves_a_convex_rest(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(2, 12))
    half = generator.normal(size=(n, n)) * generator.gamma(0.3, size=n)[:, None]  # diagonals of very different size
    covariance = half @ (np.eye(n) - 1 / n) @ half.T
    for matrix in (covariance, 0.5 * covariance + 0.5 * np.diag(np.diag(covariance)), half + half.T):
        shift = _convexifying(matrix)
        scale = np.abs(matrix).max()
        rest = np.linalg.eigvalsh(matrix - np.diag(shift))
        assert rest[0] > -1e-9 * scale
        assert rest[0] < 1e-6 * scale, "as much as a multiple of the identity allows"
    diagonal = np.diag(generator.gamma(1.0, size=n))
    np.testing.assert_allclose(_convexifying(diagonal), np.diag(diagonal))


def test_half_of_the_diagonal_of_the_published_form_needs_no_tangents() -> None:
    half = np.random.default_rng(0).normal(size=(9, 9))
    covariance = half @ half.T
    _, quadratic = published_objective(np.zeros(9), covariance, 0.5)
    assert (_convexifying(quadratic) >= 0.5 * np.diag(covariance) - 1e-9).all()
