"""Exact solution by HiGHS, through a sequence of mixed-integer linear programs.

On binaries q_i² = q_i, so the diagonal can be shifted until the quadratic form is convex; a convex function lies
above its tangents, so the program with t ≥ tangents in place of t = qᵀKq bounds the optimum from below (outer
approximation: Duran & Grossmann 1986). Tangents are added where answers are found, the first one at the optimum
of the continuous relaxation, until bound and answer meet. The paper instead introduces y_ij = q_i q_j for every
pair, which needs N² variables and bounds weakly: it took longer from 16 players on.
"""

import dataclasses
import math
import time

import numpy as np
import qpsolvers
from numpy.typing import NDArray
from scipy import optimize, sparse

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Problem

_PROVEN_GAP = 1e-6
"""Objective and bound may differ by this share of the objective's scale: HiGHS works to 1e-6 or 1e-7."""
_MAX_CUTS = 100
_SOLVE_ERROR = 4  # of scipy.optimize.milp's statuses
_SCALED_TO = 1e3  # HiGHS's tolerances are absolute; losses in nats are far below 1


@dataclasses.dataclass(frozen=True)
class Solution:
    """An answer with what proves it."""

    demoted: tuple[int, ...]  # q, (N,): 1 puts the player at 2 bit
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
    return _OuterApproximation(problem, time_limit_s).solve()


class _OuterApproximation:
    """min lᵀq + qᵀQq with Q convex, scaled so that the solvers' absolute tolerances mean something."""

    def __init__(self, problem: Problem, time_limit_s: float) -> None:
        self._problem = problem
        self._deadline = time.monotonic() + time_limit_s
        self._limit_s = time_limit_s
        self._factor = _SCALED_TO / _scale(problem)
        quadratic = np.array(problem.quadratic) * self._factor
        least = float(np.linalg.eigvalsh(quadratic)[0])  # above zero for a covariance: then the shift tightens
        self._quadratic = quadratic - least * np.eye(len(quadratic))
        self._linear = np.array(problem.linear) * self._factor + least
        self._budgets = _budgets(problem)
        self._tangents: list[NDArray[np.float64]] = []  # points q at which t is bounded

    def solve(self) -> Solution:
        """Add tangents, and cut off answers that miss a budget by less than the solver's tolerance."""
        relaxation = self._relaxation()
        best: tuple[int, ...] | None = None
        refused: list[tuple[int, ...]] = []
        while len(refused) < _MAX_CUTS:
            demoted, bound = self._linear_program(refused)
            if not self._problem.is_feasible(demoted):  # only such answers are cut off: the bound holds for all others
                refused.append(demoted)
                continue
            if best is None or self._problem.objective(demoted) < self._problem.objective(best):
                best = demoted
            objective = self._problem.objective(best)
            if objective - bound <= _PROVEN_GAP * _scale(self._problem):
                return Solution(best, objective, min(bound, objective), min(relaxation, objective))
            if time.monotonic() > self._deadline:
                raise AllocationError(
                    f"HiGHS did not prove optimality within {self._limit_s:g} s: objective {objective:g}, bound "
                    f"{bound:g}; drop the interactions with --alpha 1, or allow more time."
                )
            self._tangents.append(np.array(demoted, dtype=np.float64))
        raise AllocationError(f"HiGHS's answers miss a budget by a few bytes {_MAX_CUTS} times; lower it a little.")

    def _linear_program(self, refused: list[tuple[int, ...]]) -> tuple[tuple[int, ...], float]:
        """Minimise lᵀq + t over q and t ≥ 2 pᵀQ q − pᵀQ p for every tangent's point p."""
        n_players = len(self._linear)
        points = np.array(self._tangents)
        slopes = np.column_stack([2 * points @ self._quadratic, -np.ones(len(points))])
        offsets = np.einsum("pi,ij,pj->p", points, self._quadratic, points)
        largest = np.abs(self._quadratic).sum()  # no t needs to be above
        for presolve in (True, False):  # HiGHS's presolve can end in "Solve error" on a program it then solves
            result = optimize.milp(
                np.append(self._linear, 1.0),
                integrality=np.append(np.ones(n_players), 0),
                bounds=optimize.Bounds(0, np.append(np.ones(n_players), largest)),
                constraints=[
                    optimize.LinearConstraint(slopes, ub=offsets),
                    *self._budgets,
                    *(_other_than(answer) for answer in refused),
                ],
                options={
                    "mip_rel_gap": 0.0,
                    "time_limit": max(1.0, self._deadline - time.monotonic()),
                    "presolve": presolve,
                },
            )
            if result.status != _SOLVE_ERROR:
                break
        if result.x is None:
            raise AllocationError(f"HiGHS found no allocation ({result.message}); raise the budget or the time limit.")
        demoted = tuple(int(value > 0.5) for value in result.x[:n_players])
        return demoted, float(result.mip_dual_bound) / self._factor

    def _relaxation(self) -> float:
        """Return a bound of the continuous relaxation, whose optimum becomes the first tangent's point.

        The primal value less the duality gap is a bound even where the solver stopped early.
        """
        ones = np.ones(len(self._linear))
        task = qpsolvers.Problem(
            P=sparse.csc_matrix(2 * self._quadratic),
            q=self._linear,
            G=sparse.csc_matrix(np.concatenate([c.A for c in self._budgets])[:, :-1]),
            h=np.concatenate([c.ub for c in self._budgets]),
            lb=0 * ones,
            ub=ones,
        )
        solution = qpsolvers.solve_problem(task, solver="clarabel")
        if solution.x is None:
            raise AllocationError("The continuous relaxation has no solution; check the profile's covariance.")
        self._tangents.append(np.clip(solution.x, 0, 1))
        value = solution.x @ self._quadratic @ solution.x + self._linear @ solution.x
        return float(value - abs(solution.duality_gap())) / self._factor


def _budgets(problem: Problem) -> list[optimize.LinearConstraint]:
    """Σ c_i (1 − q_i) ≤ B as −Σ c_i q_i ≤ B − Σ c_i, divided by the largest cost for the solver's tolerances.

    The last column is t's.
    """
    constraints = []
    for constraint in problem.constraints:
        costs = np.array(constraint.costs, dtype=np.float64)
        unit = math.gcd(*constraint.costs) or 1  # players of one size then cost 1 each, exactly
        scale = max(1.0, costs.max(initial=0.0))
        row = np.append(-costs, 0.0) / scale
        limit = (constraint.budget // unit * unit - costs.sum()) / scale
        constraints.append(optimize.LinearConstraint(row[None, :], ub=np.array([limit])))
    return constraints


def _other_than(answer: tuple[int, ...]) -> optimize.LinearConstraint:
    """Σ over ones (1 − q_i) + Σ over zeros q_i ≥ 1: any q but this one."""
    signs = np.array([-1.0 if q else 1.0 for q in answer])
    return optimize.LinearConstraint(np.append(signs, 0.0)[None, :], lb=1.0 - sum(answer))


def _scale(problem: Problem) -> float:
    largest = max(np.abs(problem.linear).max(initial=0.0), np.abs(np.array(problem.quadratic)).max(initial=0.0))
    return float(largest) or 1.0
