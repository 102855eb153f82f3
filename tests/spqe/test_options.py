from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_edge.errors import SensitivityError
from impq_edge.impq.allocate import bits_at
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.options import GameOptions, stability_answer
from impq_edge.spqe.stopping import Order


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def found(*phi: float) -> Estimate:
    return Estimate(np.array(phi), np.zeros(len(phi)), np.zeros((len(phi), len(phi))))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"permutations": 0}, ("--permutations 0", "ask for 1 or more")),
        ({"permutations": -3}, ("--permutations -3", "ask for 1 or more")),
        ({"seed": -1}, ("--seed -1", "give 0 or more")),
        ({"workers": -2}, ("--workers -2", "give 0 for this process alone")),
        ({"time_limit_s": 0.0}, ("--time-limit 0 s", "give more than 0")),
        ({"time_limit_s": -5.0}, ("--time-limit -5 s", "give more than 0")),
        ({"time_limit_s": float("inf")}, ("--time-limit inf s", "give")),
        ({"time_limit_s": float("nan")}, ("--time-limit nan s", "give")),
        ({"players": "heads"}, ("--players 'heads'", "blocks, sublayers, tensors")),
        ({"estimator": "guess"}, ("--estimator 'guess'", "permutations, antithetic, stratified")),
        ({"compute": "tpu"}, ("--compute 'tpu'", "cpu, cuda")),
        ({"window_tokens": 1}, ("window of 1 tokens", "give 2 or more")),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(options: dict[str, Any], shown: tuple[str, ...]) -> None:
    with pytest.raises(SensitivityError) as caught:
        GameOptions(**options)
    told = str(caught.value)
    assert all(part in told for part in shown), told
    assert told.endswith(".") and "\n" not in told and ". " not in told


def test_the_smallest_values_are_good() -> None:
    made = GameOptions(permutations=1, seed=0, workers=0, time_limit_s=1e-9, tokens=2, window_tokens=2)
    assert (made.permutations, made.time_limit_s) == (1, 1e-9)


def test_order_means_the_order_of_the_players(spec: ModelSpec) -> None:
    answer = stability_answer("order", spec, "blocks")
    assert answer(found(0.3, 0.1, 0.2)) == Order((0.3, 0.1, 0.2))


@pytest.mark.parametrize("players", ["blocks", "sublayers", "tensors"])
@pytest.mark.parametrize("text", ["2.5,3", " 2.5 , 3 ", "5/2,3"])
def test_average_bits_mean_the_allocations_at_them(spec: ModelSpec, players: PlayerKind, text: str) -> None:
    who = players_of(spec, players)
    phi = np.linspace(0.1, 1, len(who))[::-1]
    answer = stability_answer(text, spec, players)(found(*phi))
    covariance = np.zeros((len(who), len(who)))
    expected = tuple(bits_at(who, phi, covariance, target) for target in (Fraction(5, 2), Fraction(3)))
    assert answer == expected and hash(answer)
    for bits, target in zip(expected, (Fraction(5, 2), Fraction(3)), strict=True):
        weights = [player.weights for player in who]
        assert sum(w * b for w, b in zip(weights, bits, strict=True)) <= target * sum(weights)


def test_the_answer_changes_only_with_the_allocation(spec: ModelSpec) -> None:
    answer = stability_answer("8/3", spec, "blocks")  # one block of three at 4 bit
    assert answer(found(0.3, 0.1, 0.2)) == answer(found(0.9, 0.2, 0.1)) == ((4, 2, 2),)
    assert answer(found(0.3, 0.1, 0.4)) == ((2, 2, 4),)


@pytest.mark.parametrize(("text", "bits"), [("2", (2, 2, 2)), ("4", (4, 4, 4))])
def test_the_extremes_are_bits_too(spec: ModelSpec, text: str, bits: tuple[int, ...]) -> None:
    assert stability_answer(text, spec, "blocks")(found(0.3, 0.1, 0.2)) == (bits,)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "Order", "order,3", "2.5,", "2.5;3", "1.9", "3,5", "-3", "nan", "inf", "3/0", "2e0", "1e999999999",
     "2.5 3", "0x3"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence(spec: ModelSpec, text: str) -> None:
    with pytest.raises(SensitivityError) as caught:
        stability_answer(text, spec, "blocks")
    told = str(caught.value)
    assert told == (f"--until-stable {text!r} is neither 'order' nor average bits from 2 to 4; write it like 2.5,3.")
