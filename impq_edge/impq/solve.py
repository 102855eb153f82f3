"""Exact solution by HiGHS: the products are linearised, so the program is a mixed-integer linear one."""

import dataclasses
import math
from itertools import combinations

import numpy as np
import qpsolvers
from numpy.typing import NDArray
from scipy import optimize, sparse

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Problem

_PROVEN_GAP = 1e-6
"""Objective and bound may differ by this share of the objective's scale: HiGHS works to 1e-6 or 1e-7."""
_MAX_CUTS = 100
_SCALED_TO = 1e3  # HiGHS's tolerances are absolute; losses in nats are far below 1


@dataclasses.dataclass(frozen=True)
class Solution:
    """An answer with what proves it."""

    demoted: tuple[int, ...]  # q, (L,): 1 puts the block at 2 bit
    objective: float  # recomputed from the problem, not the solver's word
    lower_bound: float  # no feasible q is better: branch and bound's dual bound
    relaxation_bound: float  # of the continuous relaxation: how much of the proof convexity alone gives


def solve(problem: Problem, time_limit_s: float = 600.0) -> Solution:
    """Solve the program to proven optimality.

    Raises
    ------
    AllocationError
        When a budget is below zero, or optimality is not proven within the time limit.
    """
    for constraint in problem.constraints:
        if constraint.budget < 0:
            raise AllocationError(
                f"The {constraint.name} is {-constraint.budget} {constraint.unit} too small even with every block "
                "at 2 bit; raise it by at least that much."
            )
    demoted, bound = _feasible_optimum(problem, time_limit_s)
    objective = problem.objective(demoted)
    if objective - bound > _PROVEN_GAP * _scale(problem):
        raise AllocationError(
            f"HiGHS did not prove optimality within {time_limit_s:g} s: objective {objective:g}, bound {bound:g}; "
            "drop the interactions with --alpha 1, or allow more time."
        )
    return Solution(demoted, objective, min(bound, objective), min(_relaxation_bound(problem), objective))


def _feasible_optimum(problem: Problem, time_limit_s: float) -> tuple[tuple[int, ...], float]:
    """Solve, and cut off answers that miss a budget by less than the solver's tolerance, until one keeps all.

    Only such answers are cut off, so the last dual bound holds for every q that keeps the budgets.
    """
    refused: list[tuple[int, ...]] = []
    while len(refused) < _MAX_CUTS:
        demoted, bound = _branch_and_bound(problem, refused, time_limit_s)
        if problem.is_feasible(demoted):
            return demoted, bound
        refused.append(demoted)
    raise AllocationError(f"HiGHS's answers miss a budget by a few bytes {_MAX_CUTS} times; lower it a little.")


def _branch_and_bound(
    problem: Problem, refused: list[tuple[int, ...]], time_limit_s: float
) -> tuple[tuple[int, ...], float]:
    """Solve over q_i and y_ij = q_i q_j; a pair is bounded only on the side the objective pushes it to.

    For a positive coefficient, y_ij ≥ q_i + q_j − 1 and y_ij ≥ 0; for a negative one, y_ij ≤ q_i and
    y_ij ≤ q_j. Both make y exact at every binary optimum.
    """
    quadratic = np.array(problem.quadratic)
    n_blocks = len(problem.linear)
    pairs = [(i, j) for i, j in combinations(range(n_blocks), 2) if quadratic[i, j] != 0]
    weights = [2 * quadratic[i, j] for i, j in pairs]
    factor = _SCALED_TO / _scale(problem)
    costs = np.concatenate([np.array(problem.linear) + np.diag(quadratic), weights]) * factor  # q_i² = q_i
    result = optimize.milp(
        costs,
        integrality=(np.arange(len(costs)) < n_blocks).astype(np.int64),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            *_products(pairs, weights, n_blocks),
            *_budgets(problem, len(pairs)),
            *(_other_than(answer, len(pairs)) for answer in refused),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
    )
    if result.x is None:
        raise AllocationError(f"HiGHS found no allocation ({result.message}); raise the budget or the time limit.")
    demoted = tuple(int(value > 0.5) for value in result.x[:n_blocks])
    return demoted, float(result.mip_dual_bound) / factor


def _products(pairs: list[tuple[int, int]], weights: list[float], n_blocks: int) -> list[optimize.LinearConstraint]:
    if not pairs:
        return []
    rows: list[tuple[dict[int, float], float]] = []
    for index, ((i, j), weight) in enumerate(zip(pairs, weights, strict=True)):
        y = n_blocks + index
        if weight > 0:
            rows.append(({i: 1.0, j: 1.0, y: -1.0}, 1.0))
        else:
            rows += [({y: 1.0, i: -1.0}, 0.0), ({y: 1.0, j: -1.0}, 0.0)]
    matrix = sparse.lil_matrix((len(rows), n_blocks + len(pairs)))
    for row, (entries, _) in enumerate(rows):
        for column, value in entries.items():
            matrix[row, column] = value
    return [optimize.LinearConstraint(matrix.tocsr(), ub=np.array([limit for _, limit in rows]))]


def _budgets(problem: Problem, n_pairs: int) -> list[optimize.LinearConstraint]:
    """Σ c_i (1 − q_i) ≤ B as −Σ c_i q_i ≤ B − Σ c_i, divided by the largest cost for the solver's tolerances."""
    constraints = []
    for constraint in problem.constraints:
        costs = np.array(constraint.costs, dtype=np.float64)
        unit = math.gcd(*constraint.costs) or 1  # blocks of one shape then cost 1 each, exactly
        scale = max(1.0, costs.max(initial=0.0))
        row = np.concatenate([-costs, np.zeros(n_pairs)]) / scale
        limit = (constraint.budget // unit * unit - costs.sum()) / scale
        constraints.append(optimize.LinearConstraint(row[None, :], ub=np.array([limit])))
    return constraints


def _other_than(answer: tuple[int, ...], n_pairs: int) -> optimize.LinearConstraint:
    """Σ over ones (1 − q_i) + Σ over zeros q_i ≥ 1: any q but this one."""
    signs = np.array([-1.0 if q else 1.0 for q in answer])
    return optimize.LinearConstraint(np.concatenate([signs, np.zeros(n_pairs)])[None, :], lb=1.0 - sum(answer))


def _relaxation_bound(problem: Problem) -> float:
    """Return the minimum over q ∈ [0, 1]^L: K is a convex mixture of covariances, so this is a convex QP.

    The primal value less the duality gap is a bound even where the solver stopped early.
    """
    factor = _SCALED_TO / _scale(problem)
    quadratic, linear = np.array(problem.quadratic) * factor, np.array(problem.linear) * factor
    costs: NDArray[np.float64] = np.array([c.costs for c in problem.constraints], dtype=np.float64)
    scale = np.maximum(1.0, costs.max(axis=1, initial=0.0))
    limits = (np.array([c.budget for c in problem.constraints]) - costs.sum(axis=1)) / scale
    ones = np.ones(len(linear))
    task = qpsolvers.Problem(
        P=sparse.csc_matrix(2 * quadratic),
        q=linear,
        G=sparse.csc_matrix(-costs / scale[:, None]),
        h=limits,
        lb=0 * ones,
        ub=ones,
    )
    solution = qpsolvers.solve_problem(task, solver="clarabel")
    if solution.x is None:
        raise AllocationError("The continuous relaxation has no solution; check the profile's covariance.")
    value = 0.5 * solution.x @ (2 * quadratic) @ solution.x + linear @ solution.x
    return float(value - abs(solution.duality_gap())) / factor


def _scale(problem: Problem) -> float:
    largest = max(np.abs(problem.linear).max(initial=0.0), np.abs(np.array(problem.quadratic)).max(initial=0.0))
    return float(largest) or 1.0
