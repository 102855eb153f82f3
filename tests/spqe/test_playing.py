"""The method on games small enough to be known whole: what is evaluated first, and what rounds then find."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from impq_edge.impq.allocate import bits_within
from impq_edge.impq.problem import Constraint
from impq_edge.spqe.playing import (
    SHARE,
    Budget,
    Rounds,
    as_coalition,
    binding,
    evaluations_for,
    fitting,
    holds_all_4,
    play_rounds,
)
from impq_edge.spqe.rounds import BATCH, Room, best_measured, design, from_row, neighbours
from impq_edge.spqe.sampling import (
    Coalition,
    alone,
    coalitions_of,
    complement,
    draws,
    draws_for,
    evaluation_order,
    uniform,
)

Value = Callable[[Coalition], float]


def game_of(n_players: int, seed: int) -> Value:
    """Damage with interactions of either sign, under a loss that bends and saturates."""
    generator = np.random.default_rng(seed)
    apart = generator.gamma(0.5, 1, n_players)
    pairs = np.triu(generator.normal(0, 0.3, (n_players, n_players)), 1) * np.sqrt(np.outer(apart, apart))

    def value(coalition: Coalition) -> float:
        x = (np.array(coalition) == 2).astype(float)
        return float(4 + 3 * (1 - np.exp(-(max(apart @ x + x @ pairs @ x, 0) ** 1.2) / 3)))

    return value


def limit(costs: Sequence[int], budget: int, name: str = "size") -> Constraint:
    return Constraint(name, "bytes", tuple((0, cost) for cost in costs), budget)


class Played:
    """A game that is asked, and counts."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self.seen: dict[Coalition, float] = {}
        self.batches: list[int] = []

    def ask(self, coalitions: Sequence[Coalition]) -> NDArray[np.float64]:
        assert not set(coalitions) & set(self.seen) and len(set(coalitions)) == len(coalitions)
        self.seen.update((c, self._value(c)) for c in coalitions)
        self.batches.append(len(coalitions))
        return np.array([self.seen[c] for c in coalitions])


def play(value: Value, n_players: int, budgets: list[Budget], evaluations: int, seed: int = 0) -> Played:
    played = Played(value)
    first, pairs = design(n_players, evaluations, SHARE, seed)
    played.ask(first)
    play_rounds(played.ask, played.seen, pairs, Rounds.within(budgets, evaluations), evaluations)
    return played


def everything(n_players: int) -> list[Coalition]:
    return list(itertools.product((2, 4), repeat=n_players))  # type: ignore[arg-type]


@given(n_players=st.integers(1, 12), evaluations=st.integers(2, 150), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_design_has_as_many_coalitions_as_were_asked_for(
    n_players: int, evaluations: int, share: float, seed: int
) -> None:
    found, pairs = design(n_players, evaluations, share, seed)
    limit = min(evaluations, max(4, round(share * evaluations)))
    most = max(limit, round(0.7 * evaluations))  # where players alone need it
    limit = max(limit, next((each for each in (2 + 2 * n_players, 4 + n_players) if each <= most), 0))
    assert len(found) == len(set(found)) <= limit <= evaluations
    assert len(found) >= limit - 1 or len(found) == 2**n_players  # a pair takes two places
    extremes = {uniform(4, n_players), uniform(2, n_players)}
    assert set(found[:2]) == extremes == set(found[: len(extremes)])
    sides = [set(coalitions_of("stratified", draw, n_players)) - extremes for draw in pairs]
    assert set().union(*sides) <= set(found) and len({frozenset(side) for side in sides}) == len(pairs)
    assert pairs or n_players == 1 or evaluations < 4
    assert design(n_players, evaluations, share, seed) == (found, pairs)


@pytest.mark.parametrize(("evaluations", "kinds"), [(20, 2), (18, 2), (17, 1), (12, 1), (11, 0), (4, 0)])
def test_players_alone_come_first_and_all_of_a_kind_or_none(evaluations: int, kinds: int) -> None:
    n = 8
    found, pairs = design(n, evaluations, 1.0, 0)
    apart = [[tuple(bits if p == i else 6 - bits for p in range(n)) for i in range(n)] for bits in (2, 4)]
    expected = [c for kind in apart[:kinds] for c in kind]
    assert found[2 : 2 + len(expected)] == expected
    assert kinds < 2 or pairs[:n] == [(i,) for i in range(n)]
    others = found[2 + len(expected) :]
    assert all(complement(c) in found for c in others)


@pytest.mark.parametrize(("permutations", "kinds"), [(3, 2), (2, 1)])
def test_many_players_are_measured_alone_even_where_that_is_most_of_the_evaluations(
    permutations: int, kinds: int
) -> None:
    n = 112
    found, pairs = design(n, evaluations_for(n, permutations), SHARE, 0)
    assert set(found) >= {*alone(2, n), *(alone(4, n) if kinds == 2 else ())} and pairs
    assert len(found) <= 0.7 * evaluations_for(n, permutations)


def test_rounds_begin_with_what_players_alone_would_choose() -> None:
    n = 60  # from all at 2 bit, the best that keeps the budget, the best mix is 30 steps away
    generator = np.random.default_rng(0)
    harm, costs = generator.exponential(size=n), generator.integers(1, 9, size=n).tolist()
    budget = (limit(costs, sum(costs) // 2),)
    found, pairs = design(n, 2 + 2 * n, 1.0, 0)
    played = Played(lambda c: 4 + float(harm @ (np.array(c) == 2)))
    played.ask(found)
    play_rounds(played.ask, played.seen, pairs, Rounds.within([budget], len(found) + 1), len(found) + 1)
    best = best_measured(played.seen, Room.of(budget))
    assert best == as_coalition(bits_within(budget, harm, np.zeros((n, n)))) and played.batches[1:] == [1]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), n_players=st.integers(2, 40))
def test_neighbours_keep_the_budget_and_are_all_of_them_where_players_are_few(seed: int, n_players: int) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.integers(1, 9, size=n_players)
    room = Room.of([limit(costs.tolist(), int(costs.sum() // 2))])
    lowest = np.ones(n_players)
    for player in generator.permutation(n_players):
        lowest[player] = 0
        lowest[player] = float(not room.fits(lowest[None])[0])
    every = {from_row(row) for row in neighbours(lowest, room)}
    harm = generator.exponential(size=n_players)
    few = {from_row(row) for row in neighbours(lowest, room, lambda rows: rows @ harm)}
    away = [int(((np.array(c) == 2) != (lowest == 1)).sum()) for c in every]
    assert set(away) <= {1, 2} and few <= every
    assert few == every or (lowest == 0).sum() * (lowest == 1).sum() > 256
    assert n_players > 32 or few == every
    assert {c for c, d in zip(every, away, strict=True) if d == 1} <= few


def test_pairs_are_those_that_the_estimator_draws() -> None:
    found, pairs = design(10, 200, 0.4, seed=3)
    drawn = draws("stratified", 10, len(pairs), seed=3)
    assert set(pairs) >= set(drawn[: len(pairs) - 10]) and len(found) == 80


@pytest.mark.parametrize("n_players", [1, 2, 3, 16, 30])
@pytest.mark.parametrize("permutations", [1, 8, 100])
def test_rounds_cost_what_permutations_cost(n_players: int, permutations: int) -> None:
    cost = evaluations_for(n_players, permutations)
    assert cost == max(permutations * (n_players - 1) + 2, 2 if n_players == 1 else 4)
    if n_players > 3:  # else walks meet, and all coalitions are fewer
        walks = draws("permutations", n_players, draws_for("permutations", n_players, permutations), 0)
        assert len(evaluation_order("permutations", walks, n_players)) <= cost


@settings(max_examples=12)
@given(
    n_players=st.integers(2, 6), seed=st.integers(0, 10**6), costs=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    share=st.floats(0.1, 0.9),
)  # fmt: skip
def test_allowed_to_evaluate_everything_rounds_find_the_optimum(
    n_players: int, seed: int, costs: list[int], share: float
) -> None:
    value = game_of(n_players, seed)
    budget = (limit(costs[:n_players], int(share * sum(costs[:n_players]))),)
    room = Room.of(budget)
    played = play(value, n_players, [budget], 2**n_players)
    optimum = min(value(c) for c in fitting(dict.fromkeys(everything(n_players), 0.0), room))
    assert played.seen[best_measured(played.seen, room)] == pytest.approx(optimum)


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_of_all_coalitions_is_enough_for_seven_budgets(seed: int) -> None:
    n = 10
    value, costs = game_of(n, seed), np.random.default_rng(seed).integers(3, 9, n).tolist()
    budgets: list[Budget] = [(limit(costs, sum(costs) * eighth // 8),) for eighth in range(1, 8)]
    played = play(value, n, budgets, 200)
    assert len(played.seen) <= 200
    losses = {c: value(c) for c in everything(n)}
    for budget in budgets:
        room = Room.of(budget)
        best, found = losses[fitting(losses, room)[0]], losses[best_measured(played.seen, room)]
        assert found - 4 <= 1.02 * (best - 4)


def test_no_more_is_evaluated_than_allowed() -> None:
    value, budget = game_of(12, 0), (limit([1] * 12, 5),)
    for evaluations in (4, 5, 17, 30, 31, 60):
        played = play(value, 12, [budget], evaluations)
        assert len(played.seen) == evaluations or len(played.seen) == evaluations - 1


def test_what_is_asked_follows_from_the_losses_alone() -> None:
    value, budgets = game_of(8, 1), [(limit([1] * 8, k),) for k in (2, 5)]
    one, other = (play(value, 8, budgets, 60, seed=4) for _ in range(2))  # type: ignore[arg-type]
    assert list(one.seen.items()) == list(other.seen.items()) and one.batches == other.batches


def test_a_budget_that_neither_extreme_keeps_is_searched_from_a_choice_that_does() -> None:
    """Where 4 bit is the faster type, a speed asks for players at 4 bit and memory for players at 2."""
    n = 9
    slow, full = limit([-2] * n, -11, "generation time"), limit([1] * n, 6)
    budget = (full, slow)
    room, value = Room.of(budget), game_of(n, 5)
    found, _ = design(n, 14, SHARE, 0)
    assert not fitting(dict.fromkeys(found, 0.0), room)
    played = play(value, n, [budget], 14)
    assert len(played.seen) <= 14 and best_measured(played.seen, room).count(4) == 6
    optimum = min(value(c) for c in everything(n) if c.count(4) == 6)
    more = play(value, n, [budget], 150)
    assert more.seen[best_measured(more.seen, room)] == pytest.approx(optimum)


@pytest.mark.parametrize("value", [lambda _: 4.0, lambda c: 4.0 - 0.1 * c.count(2)])
def test_a_game_in_which_2_bit_harms_nothing_needs_no_rounds(value: Value) -> None:
    played = play(value, 6, [(limit([1] * 6, 3),)], 42)
    assert len(played.seen) == len(design(6, 42, SHARE, 0)[0])


@pytest.mark.parametrize("n_players", [1, 2, 3])
def test_few_players(n_players: int) -> None:
    evaluations = evaluations_for(n_players, 8)
    played = play(game_of(n_players, 1), n_players, [(limit([3] * n_players, 3),)], evaluations)
    assert len(played.seen) <= 2**n_players
    assert best_measured(played.seen, Room.of((limit([3] * n_players, 3),))).count(4) <= 1


def test_only_budgets_that_bind_are_played() -> None:
    tight, wide = limit([2, 3, 4], 5), limit([1, 1, 1], 3, "another")
    assert not holds_all_4((tight, wide)) and holds_all_4((wide,)) and binding((tight, wide)) == (tight,)
    assert Rounds.within([(tight, wide), (wide,), (tight,)], 100).budgets == ((tight,),)
    assert Rounds.within([(wide,)], 100).budgets == ()


def test_more_evaluations_make_larger_batches() -> None:
    budget = (limit([1] * 30, 10),)
    batches = [Rounds.within([budget], evaluations).batch for evaluations in (4, 234, 967, 2902)]
    assert batches == [BATCH, BATCH, 15, 44]
    several: list[Budget] = [(limit([1] * 30, k),) for k in range(3, 24, 3)]
    assert Rounds.within(several, 967).batch == BATCH
