"""The record of a run: whatever of it was edited or does not belong together is refused in one sentence."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_edge.errors import ImpqError, RecordError, SensitivityError
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.spqe.estimate import estimate
from impq_edge.spqe.profile import Design, Evaluation, GameSettings, SensitivityProfile
from impq_edge.spqe.sampling import ESTIMATORS, Coalition, Estimator, draws, draws_for, evaluation_order

WINDOWS = 3


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def losses_of(coalitions: list[Coalition]) -> dict[Coalition, np.ndarray]:
    """Losses of a game with interactions, per window."""
    generator = np.random.default_rng(0)
    damage = generator.uniform(0.1, 1, size=(WINDOWS, len(coalitions[0])))
    return {c: 5 + np.expm1(damage @ (np.array(c) == 2) / 3) for c in coalitions}


def profile_of(
    spec: ModelSpec, estimator: Estimator = "permutations", players: PlayerKind = "sublayers", count: int = 4
) -> SensitivityProfile:
    n_players = len(players_of(spec, players))
    found = draws(estimator, n_players, draws_for(estimator, n_players, count), seed=0)
    return SensitivityProfile.from_losses(
        model=spec,
        header_bytes=1000,
        settings=GameSettings({"name": "kquant", "library": "x 1"}, players, "0" * 64, 192, 64, "cpu", "float32"),
        design=Design(estimator, count, 0, "order"),
        stopped_by="stability",
        bits_per_weight=(2.625, 4.5),
        reference_losses=np.full(WINDOWS, 4.9),
        draws=found,
        losses=losses_of(evaluation_order(estimator, found, n_players)),
    )


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(ImpqError) as caught:
        action()
    told = str(caught.value)
    assert "\n" not in told and told.endswith(".") and ". " not in told, told
    return told


@pytest.mark.parametrize("players", ["blocks", "sublayers", "tensors"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_round_trip(spec: ModelSpec, tmp_path: Path, estimator: Estimator, players: PlayerKind) -> None:
    made = profile_of(spec, estimator, players)
    made.save(tmp_path / "p.json")
    loaded = SensitivityProfile.load(tmp_path / "p.json")
    assert loaded == made and loaded.identity() == made.identity()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "p.json").read_bytes()
    expected = estimate(estimator, made.n_players, list(made.draws), made.losses)
    for one, other in ((loaded.estimate(), expected), (loaded, expected)):
        assert np.array_equal(one.phi, other.phi)
        assert np.array_equal(one.phi_stderr, other.phi_stderr)
        assert np.array_equal(one.covariance, other.covariance)
    none, total = made.losses[(4,) * made.n_players], made.losses[(2,) * made.n_players]
    assert sum(loaded.phi) == pytest.approx(total - none)


def test_losses_of_an_earlier_design_are_kept_and_change_no_estimate(spec: ModelSpec) -> None:
    made = profile_of(spec)
    more = draws("permutations", made.n_players, 9, seed=5)
    losses = losses_of(evaluation_order("permutations", [*made.draws, *more], made.n_players))
    also = set(losses) - set(made.losses)
    assert also
    kept = SensitivityProfile.from_losses(
        model=spec, header_bytes=1000, settings=made.settings, design=made.design, stopped_by="stability",
        bits_per_weight=made.bits_per_weight, reference_losses=np.array(made.reference_losses),
        draws=list(made.draws), losses=losses, also=also,
    )  # fmt: skip
    assert kept.phi == made.phi and kept.covariance == made.covariance
    assert set(kept.losses) == set(losses) and len(kept.evaluations) == len(losses)
    assert all(np.array_equal(kept.window_losses[c], losses[c]) for c in losses)


def scaled(values: tuple[float, ...], factor: float = 1.001) -> tuple[float, ...]:
    return (values[0] * factor, *values[1:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_edited_estimate_or_loss_is_noticed(spec: ModelSpec, estimator: Estimator) -> None:
    made = profile_of(spec, estimator)
    first, *others = made.evaluations
    edits: dict[str, dict[str, Any]] = {
        "φ": {"phi": scaled(made.phi)},
        "errors": {"phi_stderr": scaled(made.phi_stderr)},
        "covariance": {"covariance": (scaled(made.covariance[0]), *made.covariance[1:])},
    }
    for name, edit in edits.items():
        told = refusal(dataclasses.replace(made, **edit).estimate)
        assert told == f"The profile's {name} does not follow from its own losses; it was edited: make it anew."
    changed = (dataclasses.replace(first, losses=scaled(first.losses)), *others)
    assert "does not follow from its own losses" in refusal(dataclasses.replace(made, evaluations=changed).estimate)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_missing_evaluation_is_noticed(spec: ModelSpec, estimator: Estimator) -> None:
    made = profile_of(spec, estimator)
    for left in (made.evaluations[1:], made.evaluations[:-2]):
        told = refusal(dataclasses.replace(made, evaluations=left).estimate)
        missing = len(made.evaluations) - len(left)
        assert told == f"The profile lacks {missing} evaluations of its own draws; make it anew."


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_that_are_none_are_refused(spec: ModelSpec, estimator: Estimator) -> None:
    made = profile_of(spec, estimator)
    wrong = [(0, 0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 6), (-1, 1, 2, 3, 4, 5)]
    # An order leaves nobody out; both sides of a pair have somebody.
    wrong += [(), (0, 1, 2, 3, 4, 5)] if estimator == "stratified" else [(), (0, 1, 2)]
    for draw in wrong:
        told = refusal(lambda draw=draw: dataclasses.replace(made, draws=(*made.draws[:-1], draw)))
        assert told == "The profile's draws are not of 6 players; make it anew."


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_draws_than_those_estimated_from_are_refused(spec: ModelSpec, estimator: Estimator) -> None:
    made = profile_of(spec, estimator)
    for found in (made.draws[:-2], (*made.draws, *made.draws[:2]), made.draws[:1], ()):
        told = refusal(lambda found=found: dataclasses.replace(made, draws=found).estimate())
        assert "does not follow from" in told or "to estimate from" in told


@pytest.mark.parametrize(
    "losses", [(), (5.0,), (5.0,) * (WINDOWS + 1)], ids=["none", "too few windows", "too many windows"]
)
def test_losses_of_other_windows_are_refused(spec: ModelSpec, losses: tuple[float, ...]) -> None:
    made = profile_of(spec)
    changed = (dataclasses.replace(made.evaluations[0], losses=losses), *made.evaluations[1:])
    told = refusal(lambda: dataclasses.replace(made, evaluations=changed))
    assert told == "The profile's losses are not all of the same windows; make it anew."


@pytest.mark.parametrize("coalition", ["22222", "222222222", "22222x", "222223", ""])
def test_coalitions_of_other_players_are_refused(spec: ModelSpec, coalition: str) -> None:
    made = profile_of(spec)
    odd = Evaluation(coalition, (5.0,) * WINDOWS)
    told = refusal(lambda: dataclasses.replace(made, evaluations=(*made.evaluations, odd)))
    assert told == "The profile's evaluations are not of 6 players; make it anew."


def test_estimates_of_another_length_are_refused(spec: ModelSpec) -> None:
    made = profile_of(spec)
    for change in (
        {"phi": made.phi[1:]},
        {"phi_stderr": (*made.phi_stderr, 0.0)},
        {"covariance": made.covariance[1:]},
        {"covariance": (made.covariance[0][1:], *made.covariance[1:])},
        {"settings": dataclasses.replace(made.settings, players="tensors")},
    ):
        assert "make it anew" in refusal(lambda change=change: dataclasses.replace(made, **change))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"phi": [float("nan")] * 6}, "phi.0"),
        ({"stopped_by": "boredom"}, "stopped_by"),
        ({"schema": "impq-edge.sensitivity/1"}, "holds schema 'impq-edge.sensitivity/1'"),
        ({"temperature": 1}, "temperature"),
        ({"draws": [[0, "one"]]}, "draws.0.1"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_by_its_name(
    spec: ModelSpec, tmp_path: Path, change: dict[str, Any], shown: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(profile_of(spec).to_json() | change))
    with pytest.raises(RecordError) as caught:
        SensitivityProfile.load(path)
    assert shown in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_with_a_wrong_draw_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    path, values = tmp_path / "p.json", profile_of(spec).to_json()
    values["draws"][0] = [0, 1, 2, 3, 4, 4]
    path.write_text(json.dumps(values))
    with pytest.raises(SensitivityError, match="draws are not of 6 players"):
        SensitivityProfile.load(path)


def test_records_of_losses_do_not_name_the_objective() -> None:
    """Their identities, and the journals of runs under way, are older than the other objective."""
    settings = GameSettings({"name": "kquant"}, "blocks", "", 192, 64, "cpu", "float32")
    other = dataclasses.replace(settings, objective="divergence")
    assert "objective" not in settings.identity()
    assert other.identity() == {**settings.identity(), "objective": "divergence"}
    assert other.calibration() == settings.calibration(), "what is encoded is the same"
