from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_edge.errors import SensitivityError
from impq_edge.impq.allocate import bits_at
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.spqe import options
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.options import METHODS, GameOptions, Method, stability_answer
from impq_edge.spqe.stopping import Order


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def found(*phi: float) -> Estimate:
    return Estimate(np.array(phi), np.zeros(len(phi)), np.zeros((len(phi), len(phi))))


@pytest.mark.parametrize(
    ("given", "shown"),
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
        ({"method": "guess"}, ("--method 'guess'", "rounds, impq")),
        ({"method": "rounds", "types": (2, 3, 4)}, ("--method rounds chooses between 2 and 4 bit", "--types 2,3,4")),
        ({"method": "rounds", "until_stable": "order"}, ("--until-stable order is for --method impq", "leave it out")),
        ({"method": "rounds", "estimator": "antithetic"}, ("--estimator antithetic is for", "leave it out")),
        ({"method": "rounds", "estimator": "permutations"}, ("--estimator permutations is for", "complement pairs")),
        ({"method": "rounds", "curve": "2.5,5"}, ("--curve '2.5,5' is no list", "write it like 2.5,3")),
        ({"method": "rounds", "curve": ""}, ("--curve ''", "write it like 2.5,3")),
        ({"method": "impq", "curve": "2.5"}, ("--curve 2.5 is for --method rounds", "leave it out")),
        ({"objective": "both"}, ("--objective 'both'", "loss, divergence")),
        ({"types": (2, 3), "objective": "divergence"}, ("--objective divergence is for the game", "leave it out")),
        ({"types": (2, 3, 4), "curve": "2.5"}, ("--curve 2.5 is for --method rounds", "leave it out")),
    ],
)
def test_what_means_nothing_is_refused_in_one_sentence(given: dict[str, Any], shown: tuple[str, ...]) -> None:
    with pytest.raises(SensitivityError) as caught:
        GameOptions(**given)
    told = str(caught.value)
    assert all(part in told for part in shown), told
    assert told.endswith(".") and "\n" not in told and ". " not in told


def test_the_smallest_values_are_good() -> None:
    made = GameOptions(permutations=1, seed=0, workers=0, time_limit_s=1e-9, tokens=2, window_tokens=2)
    assert (made.permutations, made.time_limit_s) == (1, 1e-9)


@pytest.mark.parametrize("default", METHODS)
def test_the_method_is_the_default_one_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, default: Method
) -> None:
    monkeypatch.setattr(options, "DEFAULT_METHOD", default)
    assert GameOptions().is_played_in_rounds == (default == "rounds")
    assert GameOptions(method="rounds", estimator="stratified").is_played_in_rounds
    assert not GameOptions(method="impq", until_stable="order", estimator="antithetic").is_played_in_rounds
    assert not GameOptions(types=(2, 3, 4)).is_played_in_rounds  # a ladder has a program of its own


def test_a_curve_is_exact() -> None:
    assert GameOptions(method="rounds", curve="2.25, 8/3").targets == (Fraction(9, 4), Fraction(8, 3))
    assert GameOptions(method="rounds").targets is None


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


def test_rounds_measure_divergences_and_the_paper_losses() -> None:
    assert GameOptions(method="rounds").measured_objective == "divergence"
    assert GameOptions(method="impq").measured_objective == GameOptions(types=(2, 3, 4)).measured_objective == "loss"
    assert GameOptions(method="rounds", objective="loss").measured_objective == "loss"
    assert GameOptions(method="impq", objective="divergence").measured_objective == "divergence"
