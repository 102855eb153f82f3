"""Exact solution by HiGHS, through a sequence of mixed-integer linear programs.

A binary z_it says that player i takes type t, and Σ_t z_it = 1; x_i = z_i0. On binaries x_i² = x_i, so the diagonal
of K can be shifted until the quadratic form is convex; a convex function lies above its tangents, so the program with
s ≥ tangents in place of s = xᵀKx bounds the optimum from below (outer approximation: Duran & Grossmann 1986).
Tangents are added where answers are found, the first one at the optimum of the continuous relaxation, until bound and
answer meet. The paper instead introduces y_ij = x_i x_j for every pair, which needs N² variables and bounds weakly: it
took longer from 16 players on. Tangents hold every pair, so none has to be left out, however many types there are.
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import qpsolvers
from numpy.typing import NDArray
from scipy import optimize, sparse

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Choice, Constraint, Problem
from impq_edge.impq.quiet import c_stdout_dropped

_PROVEN_GAP = 1e-6
"""Objective and bound may differ by this share of the objective's scale: HiGHS works to 1e-6 or 1e-7."""
_MAX_CUTS = 100
_INFEASIBLE, _SOLVE_ERROR = 2, 4  # of scipy.optimize.milp's statuses
_ATTEMPTS = ((True, 1.0), (False, 1.0), (True, 0.1), (False, 10.0))
"""Presolve, and the objective's unit: HiGHS can end in "Solve error" on a program that it solves put otherwise."""

_SCALED_TO = 1e3  # HiGHS's tolerances are absolute; losses in nats are far below 1


@dataclasses.dataclass(frozen=True)
class Solution:
    """An answer with what proves it."""

    choice: Choice  # (N,): index of every player's type
    objective: float  # recomputed from the problem, not the solver's word
    lower_bound: float  # no feasible choice is better: branch and bound's dual bound
    relaxation_bound: float  # of the continuous relaxation: how much of the proof convexity alone gives

    @property
    def gap(self) -> float:
        """By how much a better answer could at most be better, in nats per token."""
        return self.objective - self.lower_bound


def solve(problem: Problem, relative_gap: float = 0.0, time_limit_s: float = 600.0) -> Solution:
    """Solve the program to proven optimality.

    Parameters
    ----------
    relative_gap
        Share of the objective that may stay between it and its bound, beyond the solver's precision.

    Raises
    ------
    AllocationError
        When no choice keeps every budget, or optimality is not proven within the time limit.
    """
    for constraint in problem.constraints:
        missing = sum(map(min, constraint.costs)) - constraint.budget
        if missing > 0:
            raise AllocationError(
                f"The {constraint.name} is {missing} {constraint.unit} too small even with every player at the type "
                "that takes the least; raise it by at least that much."
            )
    return _OuterApproximation(problem, relative_gap, time_limit_s).solve()


def least(constraint: Constraint, others: tuple[Constraint, ...]) -> Choice:
    """Return the choice that takes the least of a constraint's budget and keeps those of ``others``.

    Raises
    ------
    AllocationError
        As :func:`solve`, when none keeps those.
    """
    choice = tuple(row.index(min(row)) for row in constraint.costs)
    if all(other.used(choice) <= other.budget for other in others):
        return choice
    return solve(Problem(tuple(tuple(map(float, row)) for row in constraint.costs), (), others)).choice


class _OuterApproximation:
    """min Σ l_it z_it + xᵀQx with Q convex, scaled so that the solvers' absolute tolerances mean something.

    The solver's variables are z, player by player, and s.
    """

    def __init__(self, problem: Problem, relative_gap: float, time_limit_s: float) -> None:
        self._problem = problem
        self._relative_gap = relative_gap
        self._deadline = time.monotonic() + time_limit_s
        self._limit_s = time_limit_s
        self._scale = _scale(problem)
        self._factor = _SCALED_TO / self._scale
        n_pairs = len(problem.quadratic)
        losses = np.array(problem.losses) * self._factor
        quadratic = np.array(problem.quadratic).reshape(n_pairs, n_pairs) * self._factor
        if n_pairs:
            shift = _convexifying(quadratic)
            quadratic = quadratic - np.diag(shift)
            losses[:n_pairs, 0] += shift
        self._n_players, self._n_types = losses.shape
        self._losses = losses.ravel()
        self._quadratic = quadratic
        self._lowest = self._n_types * np.arange(n_pairs)  # where x is among the z
        self._budgets, self._limits = _budgets(problem)
        self._one_each = sparse.kron(sparse.eye(self._n_players), np.ones((1, self._n_types)), format="csr")
        self._tangents: list[NDArray[np.float64]] = []  # points x at which s is bounded

    def solve(self) -> Solution:
        """Add tangents, and cut off answers that miss a budget by less than the solver's tolerance."""
        relaxation = self._relaxation()
        best: Choice | None = None
        refused: list[Choice] = []
        while len(refused) < _MAX_CUTS:
            choice, bound = self._linear_program(refused)
            if not self._problem.is_feasible(choice):  # only such answers are cut off: the bound holds for all others
                refused.append(choice)
                continue
            if best is None or self._problem.objective(choice) < self._problem.objective(best):
                best = choice
            objective = self._problem.objective(best)
            point = np.array([float(kind == 0) for kind in choice[: len(self._lowest)]])
            # A ladder's objective can be far below its scale; but where s is exact, another tangent gains nothing.
            exact = any(np.array_equal(point, tangent) for tangent in self._tangents)
            precision = _PROVEN_GAP * self._scale if exact or not self._relative_gap else 0.0
            if objective - bound <= max(precision, self._relative_gap * abs(objective)):
                return Solution(best, objective, min(bound, objective), min(relaxation, objective))
            if time.monotonic() > self._deadline:
                raise AllocationError(
                    f"HiGHS did not prove optimality within {self._limit_s:g} s: objective {objective:g}, bound "
                    f"{bound:g}; drop the interactions with --alpha 1, or allow more time."
                )
            self._tangents.append(point)
        raise AllocationError(f"HiGHS's answers miss a budget by a few bytes {_MAX_CUTS} times; lower it a little.")

    def _linear_program(self, refused: list[Choice]) -> tuple[Choice, float]:
        """Minimise Σ l_it z_it + s over z and s ≥ 2 pᵀQ x − pᵀQ p for every tangent's point p."""
        size = len(self._losses)
        largest = np.abs(self._quadratic).sum()  # no s needs to be above
        for presolve, unit in _ATTEMPTS:
            with c_stdout_dropped():
                result = optimize.milp(
                    unit * np.append(self._losses, 1.0),
                    integrality=np.append(np.ones(size), 0),
                    bounds=optimize.Bounds(0, np.append(np.ones(size), largest)),
                    constraints=[
                        optimize.LinearConstraint(_with_column(self._one_each), lb=1, ub=1),
                        optimize.LinearConstraint(_with_column(self._budgets), ub=self._limits),
                        self._above_tangents(),
                        *(self._other_than(answer) for answer in refused),
                    ],
                    options={
                        "mip_rel_gap": 0.75 * self._relative_gap,  # the rest is for the tangents
                        "time_limit": max(1.0, self._deadline - time.monotonic()),
                        "presolve": presolve,
                    },
                )
            if result.status != _SOLVE_ERROR:
                break
        if result.status == _INFEASIBLE:
            names = " and ".join(constraint.name for constraint in self._problem.constraints)
            raise AllocationError(f"No choice of types keeps {names} at once; raise one of them.")
        if result.x is None:
            raise AllocationError(f"HiGHS found no allocation ({result.message}); raise the budget or the time limit.")
        chosen = result.x[:size].reshape(self._n_players, self._n_types).argmax(axis=1)
        return tuple(chosen.tolist()), float(result.mip_dual_bound) / (unit * self._factor)

    def _above_tangents(self) -> optimize.LinearConstraint:
        points = np.array(self._tangents)
        slopes = np.zeros((len(points), len(self._losses) + 1))
        slopes[:, self._lowest] = 2 * points @ self._quadratic
        slopes[:, -1] = -1
        return optimize.LinearConstraint(slopes, ub=np.einsum("pi,ij,pj->p", points, self._quadratic, points))

    def _other_than(self, answer: Choice) -> optimize.LinearConstraint:
        """Σ_i z_it ≤ N − 1 over the types of an answer: any choice but this one."""
        row = np.zeros((1, len(self._losses) + 1))
        row[0, self._n_types * np.arange(self._n_players) + np.array(answer)] = 1
        return optimize.LinearConstraint(row, ub=self._n_players - 1)

    def _relaxation(self) -> float:
        """Return a bound of the continuous relaxation, whose optimum becomes the first tangent's point.

        The primal value less the duality gap is a bound even where the solver stopped early.
        """
        size = len(self._losses)
        hessian = np.zeros((size, size))
        hessian[np.ix_(self._lowest, self._lowest)] = 2 * self._quadratic
        task = qpsolvers.Problem(
            P=sparse.csc_matrix(hessian),
            q=self._losses,
            G=sparse.csc_matrix(self._budgets),
            h=self._limits,
            A=sparse.csc_matrix(self._one_each),
            b=np.ones(self._n_players),
            lb=np.zeros(size),
            ub=np.ones(size),
        )
        solution = qpsolvers.solve_problem(task, solver="clarabel")
        if solution.x is None:
            raise AllocationError("The continuous relaxation has no solution; check the profile's covariance.")
        lowest = solution.x[self._lowest]
        self._tangents.append(np.clip(lowest, 0, 1))
        value = lowest @ self._quadratic @ lowest + self._losses @ solution.x
        return float(value - abs(solution.duality_gap())) / self._factor


def _budgets(problem: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Σ c_it z_it ≤ B for every constraint, divided by its largest cost for the solver's tolerances."""
    rows = np.zeros((len(problem.constraints), len(problem.losses) * len(problem.losses[0])))
    limits = np.zeros(len(rows))
    for index, constraint in enumerate(problem.constraints):
        costs = [cost for row in constraint.costs for cost in row]
        unit = math.gcd(*costs) or 1  # players of one size then cost 1 each, exactly
        scale = float(max(1, *map(abs, costs)))
        rows[index] = np.array(costs) / scale
        limits[index] = constraint.budget // unit * unit / scale
    return rows, limits


def _with_column(rows: Any) -> Any:
    """Append a column of zeros, for s, to a sparse or dense array."""
    return sparse.hstack([sparse.csr_matrix(rows), sparse.csr_matrix((rows.shape[0], 1))], format="csr")


def _convexifying(quadratic: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a diagonal d, (P,), for which K − diag(d) is positive semidefinite, and as large as is easily found.

    The more of K goes into the linear term, the tighter tangents are; of a diagonal K, all of it. First the largest
    multiple of K's own diagonal, then of the identity; where K is indefinite the second is below zero.
    """
    own = np.maximum(np.diag(quadratic), 0)
    root = np.sqrt(np.where(own > 0, own, 1))
    share = max(0.0, float(np.linalg.eigvalsh(quadratic / np.outer(root, root))[0]))
    rest = quadratic - share * np.diag(own)
    return share * own + float(np.linalg.eigvalsh(rest)[0])


def _scale(problem: Problem) -> float:
    largest = max(np.abs(problem.losses).max(initial=0.0), np.abs(np.array(problem.quadratic)).max(initial=0.0))
    return float(largest) or 1.0
