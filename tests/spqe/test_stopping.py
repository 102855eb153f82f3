import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from impq_edge.spqe.estimate import Estimate, estimate
from impq_edge.spqe.sampling import coalitions_of, draws
from impq_edge.spqe.stopping import MINIMUM_ROUNDS, Order, Stability, order_answer

PLAYERS = 32
ROUNDS = 100


def stops_after(noise: float, seed: int, spacing: float = 1.0) -> int | None:
    """Rounds until the order of 32 players, φ spaced evenly, in noise of the given size per round, is stable."""
    rng = np.random.default_rng(seed)
    seen = spacing * rng.permutation(PLAYERS) + noise * rng.normal(size=(ROUNDS, PLAYERS))
    stability = Stability()
    for count in range(1, ROUNDS + 1):
        found = Estimate(seen[:count].mean(axis=0), np.zeros(PLAYERS), np.zeros((PLAYERS, PLAYERS)))
        if stability.add(order_answer(found)):
            return count
    return None


@example([0] * 12 + [1] * 5)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_an_answer_is_stable_once_it_has_outlived_a_quarter_of_the_rounds(answers: list[int]) -> None:
    stability = Stability()
    for count, answer in enumerate(answers, 1):
        unchanged = next((i for i, other in enumerate(answers[:count][::-1]) if other != answer), count)
        assert stability.add(answer) == (unchanged > max(MINIMUM_ROUNDS, count / 4))


def test_an_order_that_is_plain_from_the_start_stops_at_once() -> None:
    assert [stops_after(noise=0.1, seed=seed) for seed in range(10)] == [MINIMUM_ROUNDS + 1] * 10


def test_noise_alone_never_passes_for_an_order() -> None:
    assert [stops_after(noise=1, seed=seed, spacing=0) for seed in range(10)] == [None] * 10


def test_more_noise_takes_longer() -> None:
    little, much = (np.mean([stops_after(noise, seed) or ROUNDS for seed in range(10)]) for noise in (5, 30))
    assert MINIMUM_ROUNDS + 1 <= little < much / 1.5


def test_near_ties_may_change_places_for_ever() -> None:
    one, other, apart = Order((1.0, 2.0, 5.0, 5.01)), Order((1.0, 2.0, 5.01, 5.0)), Order((2.0, 1.0, 5.0, 5.01))
    assert one.agrees_with(other) and other.agrees_with(one)
    assert not one.agrees_with(apart)
    assert one.disorder(apart) == pytest.approx(1 / (1 + 4 + 4.01 + 3 + 3.01 + 0.01))
    assert one.disorder(Order(tuple(-x for x in one.phi))) == 1
    assert Order((3.0, 3.0)).agrees_with(Order((1.0, 2.0)))  # no order to speak of


def test_the_order_of_a_game_is_found_and_kept() -> None:
    """The answer follows from the losses and the draws alone, so that a second run stops at the same round."""
    costs = np.arange(1.0, 7.0)

    def answers() -> list[Order]:
        found = draws("permutations", 6, 8, seed=0)
        needed = {c for draw in found for c in coalitions_of("permutations", draw, 6)}
        losses = {c: float(costs @ (np.array(c) == 2)) for c in needed}
        return [order_answer(estimate("permutations", 6, found[:count], losses)) for count in range(1, 9)]

    first, second = answers(), answers()
    assert first == second and hash(first[-1]) == hash(second[-1])
    assert np.argsort(first[-1].phi).tolist() == list(range(6))
    stability = Stability()
    assert [stability.add(answer) for answer in first].index(True) == MINIMUM_ROUNDS
