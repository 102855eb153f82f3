from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from impq_edge.errors import AllocationError
from impq_edge.impq.baselines import METRICS, activation, baseline_bits, lim, llm_mq, zd
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, read_model


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["qwen3"])


def test_the_names_are_those_of_the_study() -> None:
    assert METRICS == ("llm-mq", "lim", "zd", "activation")


def test_llm_mq_takes_one_absolute_value_per_matrix() -> None:
    """Errors of two matrices do not cancel, whatever their signs."""
    assert llm_mq([0.5, -0.3], [0.1, 0.1]) == pytest.approx(0.6)
    assert llm_mq([-0.5, -0.3], [-0.1, 0.1]) == pytest.approx(0.6)


def test_two_bits_are_never_a_gain() -> None:
    assert llm_mq([0.1, -0.1], [0.3, 0.0]) == 0.0
    assert lim(1.0 + 1e-15) == 0.0
    assert lim(1.0) == 0.0
    assert zd(np.ones(5)) == 1.0  # all alike: none is larger than average
    assert activation(0.0) == 0.0


def test_what_is_no_number_does_not_become_harmless() -> None:
    assert np.isnan(llm_mq([np.nan, 0.1], [0.0, 0.0])) and np.isnan(llm_mq([0.1], [np.nan]))
    assert np.isnan(lim(np.nan)) and np.isnan(activation(np.nan))


def test_lim_grows_with_what_a_layer_changes() -> None:
    found = [lim(cosine) for cosine in (1, 0.9, 0, -1)]
    assert found == pytest.approx([0, 0.1, 1, 2])


def test_fewer_large_weights_matter_more() -> None:
    """Only what lies above the mean counts, by more than the standard deviation."""
    heavy, light = np.array([0.0] * 90 + [1.0] * 10), np.array([0.0] * 99 + [1.0])
    assert zd(heavy) == pytest.approx(0.9) and zd(light) == pytest.approx(0.99)
    assert zd(-light) == 1.0


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.01, 5.0)])
def test_zd_does_not_depend_on_scale_or_shift(scale: float, shift: float) -> None:
    weights = np.random.default_rng(0).normal(size=(40, 50))
    assert zd(scale * weights + shift) == pytest.approx(zd(weights), abs=1e-9)
    assert zd(weights) == pytest.approx(1 - 0.1587, abs=0.02)  # of normal weights, 15.87 % lie above μ + σ


def test_activation_is_the_frobenius_norm() -> None:
    entering = np.random.default_rng(0).normal(size=(7, 3))
    assert activation(float((entering**2).sum())) == pytest.approx(np.linalg.norm(entering))


@pytest.mark.parametrize("players", ["blocks", "sublayers"])
@pytest.mark.parametrize("target", [Fraction(9, 4), Fraction(3), Fraction(15, 4)])
def test_no_allocation_within_the_limit_harms_less(spec: ModelSpec, players: PlayerKind, target: Fraction) -> None:
    """Against all 2^N of them."""
    who = players_of(spec, players)
    harm = np.random.default_rng(1).uniform(0.1, 1, len(who))
    weights = np.array([player.weights for player in who])
    found = np.array(baseline_bits(who, harm, target))
    assert (weights * found).sum() <= target * weights.sum()
    within = [
        np.array(bits)
        for bits in product((2, 4), repeat=len(who))
        if (weights * np.array(bits)).sum() <= target * weights.sum()
    ]
    assert harm[found == 2].sum() == pytest.approx(min(harm[bits == 2].sum() for bits in within))


@pytest.mark.parametrize("players", ["blocks", "sublayers", "tensors"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_the_harm_does_not_matter(spec: ModelSpec, players: PlayerKind, scale: float) -> None:
    """Norms of activations are in the thousands, first-order losses far below a nat."""
    who = players_of(spec, players)
    harm = np.random.default_rng(2).uniform(0, 1, len(who))
    assert baseline_bits(who, scale * harm, Fraction(11, 4)) == baseline_bits(who, harm, Fraction(11, 4))


def test_the_most_harmed_of_equal_players_keep_4_bit(spec: ModelSpec) -> None:
    who = players_of(spec, "blocks")
    assert baseline_bits(who, np.array([0.1, 0.3, 0.2]), Fraction(8, 3)) == (2, 4, 2)
    assert baseline_bits(who, np.array([0.1, 0.3, 0.2]), Fraction(10, 3)) == (2, 4, 4)
    assert baseline_bits(who, np.zeros(3), Fraction(4)) == (4, 4, 4)
    assert baseline_bits(who, np.ones(3), Fraction(2)) == (2, 2, 2)


@pytest.mark.parametrize("harm", [[0.1, 0.2], [0.1, -0.1, 0.2], [0.1, np.nan, 0.2], [0.1, np.inf, 0.2]])
def test_what_are_no_scores_is_refused_in_one_sentence(spec: ModelSpec, harm: list[float]) -> None:
    with pytest.raises(AllocationError, match=r"^The scores, of shape \(\d,\), are not 3 finite numbers .*\.$"):
        baseline_bits(players_of(spec, "blocks"), np.array(harm), Fraction(3))
