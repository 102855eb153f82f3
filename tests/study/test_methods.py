"""The methods of the study, on games small enough to enumerate."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from impq_edge.impq.problem import Constraint
from impq_edge.spqe.sampling import Coalition
from impq_edge.study import methods
from impq_edge.study.lab import Asked
from impq_edge.study.methods import Setting

N = 8
COSTS = (2, 1, 3, 1, 2, 2, 1, 3)
BUDGETS = (3, 7, 11)


class Lab:
    """What :class:`impq_edge.study.lab.Lab` is to a method: loss and divergence of coalitions, and the players."""

    players = tuple(range(N))

    def __init__(self, value: Callable[[np.ndarray], float]) -> None:
        self._value = value
        self.asked: set[Coalition] = set()

    def ask(self, coalitions: Sequence[Coalition]) -> np.ndarray:
        self.asked.update(coalitions)
        values = [self._value(np.array([bits == 2 for bits in c], float)) for c in coalitions]
        return np.array([[4 + value, 10 * value] for value in values]).reshape(-1, 2)


HARM = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.4, 0.6])
PAIRS = np.triu(np.random.default_rng(3).normal(size=(N, N)), 1) * 0.25


def additive(lowest: np.ndarray) -> float:
    return float(lowest @ HARM)


def pairwise(lowest: np.ndarray) -> float:
    return float(lowest @ HARM + lowest @ PAIRS @ lowest)


def played(value: Callable[[np.ndarray], float], evaluations: int = 120) -> tuple[Any, Setting]:
    constraints = tuple(Constraint("size", "bytes", tuple((0, cost) for cost in COSTS), budget) for budget in BUDGETS)
    return Asked(Lab(value), "loss"), Setting(constraints, evaluations, 1)  # type: ignore[arg-type]


def best(value: Callable[[np.ndarray], float]) -> list[float]:
    rows = np.array(list(itertools.product((0.0, 1.0), repeat=N)))
    values = np.array([value(row) for row in rows])
    return [float(values[(1 - rows) @ COSTS <= budget].min()) for budget in BUDGETS]


def reached(value: Callable[[np.ndarray], float], answers: Sequence[Coalition]) -> list[float]:
    rows = np.array(answers) == 2
    assert ((1 - rows) @ np.array(COSTS) <= BUDGETS).all(), "every budget is kept"
    return [value(row.astype(float)) for row in rows]


ON_ADDITIVE: dict[str, Callable[[Any, Setting], list[Coalition]]] = {
    "singles": lambda asked, setting: methods.by_scores(methods.singles(asked), setting),
    "leave-one-out": lambda asked, setting: methods.by_scores(methods.leave_one_out(asked), setting),
    "phi": lambda asked, setting: methods.by_scores(methods.shapley(asked, setting, 4).phi, setting),
    "impq": lambda asked, setting: methods.impq(methods.shapley(asked, setting, 4), setting, 0.5),
    "shuffled": lambda asked, setting: methods.shuffled(methods.shapley(asked, setting, 4), setting, 0.5),
    "variance": lambda asked, setting: methods.with_variance(methods.shapley(asked, setting, 4), setting, 0.5),
    "stratified": methods.stratified,
    "pairwise": methods.pairwise,
    "clado": methods.clado,
    "rounds": methods.rounds,
}


@pytest.mark.parametrize("name", ON_ADDITIVE)
def test_an_additive_game_is_solved_by_all(name: str) -> None:
    asked, setting = played(additive)
    np.testing.assert_allclose(reached(additive, ON_ADDITIVE[name](asked, setting)), best(additive))


@pytest.mark.parametrize("limit_s", [1.0, 0.0])  # the second leaves no time for a proof
@pytest.mark.parametrize("method", [methods.clado, methods.rounds])
def test_a_pairwise_game_is_solved_by_what_measures_pairs(
    method: Callable[[Any, Setting], list[Coalition]], limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "_SOLVE_S", limit_s)
    asked, setting = played(pairwise)
    np.testing.assert_allclose(reached(pairwise, method(asked, setting)), best(pairwise), atol=1e-9)


def test_a_pairwise_fit_to_all_pairs_is_exact() -> None:
    asked, setting = played(pairwise, 2**N)
    np.testing.assert_allclose(reached(pairwise, methods.pairwise(asked, setting)), best(pairwise), atol=1e-6)


@pytest.mark.parametrize(
    "method", [methods.evolution, methods.evolution_from_singles, methods.random_best, methods.rounds]
)
def test_no_more_is_evaluated_than_allowed(method: Callable[[Any, Setting], list[Coalition]]) -> None:
    asked, setting = played(pairwise, 60)
    answers = method(asked, setting)
    reached(pairwise, answers)
    assert asked.evaluations == len(asked.seen) <= 60
    assert set(answers) <= set(asked.seen), "what is answered was measured"


def test_evolution_gets_better_than_chance() -> None:
    asked, setting = played(pairwise, 150)
    other, _ = played(pairwise, 150)
    found, drawn = (reached(pairwise, method(a, setting)) for method, a in (
        (methods.evolution, asked), (methods.random_best, other)))  # fmt: skip
    assert sum(found) <= sum(drawn)


def test_random_allocations_leave_no_room_for_another_player() -> None:
    _, setting = played(additive)
    seen = set()
    for index in range(20):
        for answer, budget in zip(methods.random_answers(N, setting, index), BUDGETS, strict=True):
            at_4 = sum(cost for cost, bits in zip(COSTS, answer, strict=True) if bits == 4)
            at_2 = [cost for cost, bits in zip(COSTS, answer, strict=True) if bits == 2]
            assert at_4 <= budget < at_4 + min(at_2)
            seen.add(answer)
    assert len(seen) > 20, "and they differ"


def test_shuffling_keeps_the_diagonal_and_the_values() -> None:
    asked, setting = played(pairwise)
    found = methods.shapley(asked, setting, 6)
    kept: list[np.ndarray] = []
    original = methods.impq
    methods.impq = lambda estimate, *_: kept.append(estimate.covariance) or []  # type: ignore[assignment,func-returns-value]
    try:
        methods.shuffled(found, setting, 0.5)
    finally:
        methods.impq = original
    shuffled, upper = kept[0], np.triu_indices(N, 1)
    np.testing.assert_array_equal(np.diag(shuffled), np.diag(found.covariance))
    np.testing.assert_array_equal(np.sort(shuffled[upper]), np.sort(found.covariance[upper]))
    np.testing.assert_array_equal(shuffled, shuffled.T)
    assert not np.array_equal(shuffled, found.covariance)


def test_the_search_that_stands_in_for_a_proof_finds_the_optimum() -> None:
    generator = np.random.default_rng(7)
    for _ in range(5):
        linear, half = generator.normal(size=N), generator.normal(size=(N, N))
        quadratic = half + half.T
        constraint = Constraint("size", "bytes", tuple((0, cost) for cost in COSTS), 7)
        found = np.array(methods._searched(linear, quadratic, constraint)) == 2
        rows = np.array(list(itertools.product((0.0, 1.0), repeat=N)))
        values = rows @ linear + np.einsum("ni,ij,nj->n", rows, quadratic, rows)
        assert found @ linear + found @ quadratic @ found == pytest.approx(values[(1 - rows) @ COSTS <= 7].min())


def test_counting_is_each_methods_own() -> None:
    lab = Lab(additive)
    one, other = Asked(lab, "loss"), Asked(lab, "divergence")  # type: ignore[arg-type]
    methods.singles(one)
    assert (one.evaluations, other.evaluations) == (N + 2, 0)
    assert other.anchors() == (0.0, pytest.approx(10 * HARM.sum())), "its own objective"
    assert other.evaluations == 2
