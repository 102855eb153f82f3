"""Rounds on the curve: budgets are kept, evaluations are counted, and small games are solved."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from impq_edge.impq.problem import Constraint
from impq_edge.spqe.rounds import Room, best_measured, neighbours, search_rounds
from impq_edge.spqe.sampling import Coalition, coalitions_of, draws, uniform

N = 10
ALL: list[Coalition] = list(itertools.product((2, 4), repeat=N))


class Played:
    """A game with strong pairs and a saturating loss, all of whose coalitions can be enumerated."""

    def __init__(self, seed: int, n_players: int = N) -> None:
        generator = np.random.default_rng(seed)
        self._harm = generator.gamma(0.6, size=n_players)
        self._pairs = np.triu(generator.normal(size=(n_players,) * 2), 1) * 0.3
        self.seen: dict[Coalition, float] = {}
        self.batches: list[int] = []

    def value(self, coalition: Coalition) -> float:
        lowest = np.array([bits == 2 for bits in coalition], float)
        return float(4 + 6 * np.tanh(max(0.0, lowest @ self._harm + lowest @ self._pairs @ lowest) / 6))

    def __call__(self, coalitions: Sequence[Coalition]) -> np.ndarray:
        self.batches.append(len(coalitions))
        assert not any(coalition in self.seen for coalition in coalitions), "nothing is measured twice"
        self.seen.update((coalition, self.value(coalition)) for coalition in coalitions)
        return np.array([self.seen[coalition] for coalition in coalitions])

    def begin(self, pairs: int) -> None:
        n = len(self._harm)
        found = dict.fromkeys([uniform(4, n), uniform(2, n)])
        for draw in draws("stratified", n, pairs, 0):
            found |= dict.fromkeys(coalitions_of("stratified", draw, n))
        self(list(found))


def room(costs: Sequence[int], *budgets: int) -> Room:
    return Room.of([Constraint("size", "bytes", tuple((0, cost) for cost in costs), budget) for budget in budgets])


def best_of_all(game: Played, within: Room) -> float:
    lowest = np.array(ALL) == 2
    fits = within.fits(lowest.astype(float))
    return min(game.value(coalition) for coalition, fit in zip(ALL, fits, strict=True) if fit)


@pytest.mark.parametrize("seed", range(4))
def test_small_games_are_solved_with_a_fraction_of_their_coalitions(seed: int) -> None:
    game, costs = Played(seed), [3, 1, 2, 5, 1, 1, 4, 2, 3, 2]
    rooms = [room(costs, budget) for budget in (6, 12, 18)]
    game.begin(25)
    search_rounds(game, game.seen, rooms, 160)
    assert len(game.seen) <= 160 < len(ALL) / 6
    for within in rooms:
        chosen = best_measured(game.seen, within)
        assert within.fits((np.array([chosen]) == 2).astype(float)).all()
        assert game.seen[chosen] == pytest.approx(best_of_all(game, within), abs=1e-9)


def test_evaluations_are_spent_to_the_last_and_never_beyond() -> None:
    game = Played(1)
    game.begin(10)
    for limit in (30, 31, 47):
        search_rounds(game, game.seen, [room([1] * N, 3), room([1] * N, 6)], limit)
        assert len(game.seen) == limit


def test_it_ends_where_nothing_new_is_left_near_the_budget() -> None:
    game = Played(2)
    game.begin(3)
    search_rounds(game, game.seen, [room([1] * N, 0)], 1 << N)  # nothing but all at 2 bit fits
    assert len(game.seen) < 1 << N
    assert best_measured(game.seen, room([1] * N, 0)) == uniform(2, N)


def test_what_is_proposed_keeps_every_budget_of_several() -> None:
    game = Played(3)
    game.begin(10)
    before = dict(game.seen)
    both = Room.of(
        [
            Constraint("size", "bytes", tuple((0, 1 + p % 3) for p in range(N)), 9),
            Constraint("time", "ns", tuple((0, -2 if p % 2 else 3) for p in range(N)), 2),  # some are faster at 4 bit
        ]
    )
    search_rounds(game, game.seen, [both], 80)
    fresh = np.array([coalition for coalition in game.seen if coalition not in before])
    assert len(fresh) == 80 - len(before)
    assert both.fits((fresh == 2).astype(float)).all()
    assert game.seen[best_measured(game.seen, both)] == pytest.approx(best_of_all(game, both), abs=1e-9)


def test_the_same_losses_give_the_same_rounds() -> None:
    found = []
    for _ in range(2):
        game = Played(4)
        game.begin(12)
        search_rounds(game, game.seen, [room([1] * N, 4)], 60)
        found.append(list(game.seen))
    assert found[0] == found[1]


def test_neighbours_are_all_flips_and_swaps_that_fit() -> None:
    costs, here = np.array([2.0, 1.0, 1.0, 3.0]), np.array([1.0, 0.0, 1.0, 1.0])
    within = room([2, 1, 1, 3], 3)
    expected = set()
    for row in itertools.product((0.0, 1.0), repeat=4):
        changed = np.flatnonzero(np.array(row) != here)
        swap = len(changed) == 2 and row[changed[0]] != row[changed[1]]
        if (len(changed) == 1 or swap) and (1 - np.array(row)) @ costs <= 3:
            expected.add(row)
    assert set(map(tuple, neighbours(here, within))) == expected
    assert len(neighbours(here, within)) == len(expected)
