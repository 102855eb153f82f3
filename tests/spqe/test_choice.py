"""Allocations from losses that were measured, on a game whose every loss is known."""

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impq_edge import stages
from impq_edge.data import data_path
from impq_edge.errors import AllocationError, ImpqError, RecordError, SensitivityError
from impq_edge.impq.allocation import Allocation, Evidence
from impq_edge.impq.problem import Constraint
from impq_edge.model.players import players_of
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.spqe.choice import choose
from impq_edge.spqe.playing import SHARE, Rounds, curve, evaluations_for, play_rounds
from impq_edge.spqe.profile import Design, GameSettings, SensitivityProfile
from impq_edge.spqe.rounds import design
from impq_edge.spqe.sampling import Coalition, draws, evaluation_order

N = 6
M = 8
TARGETS = (Fraction(5, 2), Fraction(3))


def value(coalition: Coalition) -> float:
    """Damage that interacts: the first two players hardly matter unless both are at 2 bit."""
    x = np.array(coalition) == 2
    return float(4 + np.log1p(x @ np.array([0.02, 0.03, 0.3, 0.1, 0.25, 0.15]) + 0.5 * x[0] * x[1]))


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def profile_of(spec: ModelSpec, rounds: Rounds | None, permutations: int = M, **changes: Any) -> SensitivityProfile:
    """What a run makes of the game."""
    losses: dict[Coalition, Any] = {}

    def ask(coalitions: Any) -> Any:
        losses.update((c, np.array([value(c) - 0.1, value(c) + 0.1])) for c in coalitions)
        return np.array([value(c) for c in coalitions])

    if rounds is None:
        drawn = draws("permutations", N, permutations, 0)
        ask(evaluation_order("permutations", drawn, N))
    else:
        evaluations = evaluations_for(N, permutations)
        first, drawn = design(N, evaluations, rounds.share, 0)
        ask(first)
        seen = Means(losses)
        play_rounds(ask, seen, drawn, rounds, evaluations)
    return SensitivityProfile.from_losses(**{
        "model": spec, "header_bytes": 300_000,
        "settings": GameSettings({"name": "kquant"}, "sublayers", "0" * 64, 64, 32, "cpu", "float32"),
        "design": Design("permutations" if rounds is None else "stratified", permutations, 0, rounds=rounds),
        "stopped_by": "permutations" if rounds is None else "evaluations", "bits_per_weight": (2.625, 4.5),
        "reference_losses": np.array([3.9, 4.0]), "draws": drawn, "losses": losses, "also": losses, **changes,
    })  # fmt: skip


class Means(dict[Coalition, float]):
    """Mean losses of what was measured, as it is measured."""

    def __init__(self, losses: dict[Coalition, Any]) -> None:
        self._losses = losses

    def __getitem__(self, coalition: Coalition) -> float:
        return float(self._losses[coalition].mean())

    def __iter__(self) -> Any:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def __contains__(self, coalition: object) -> bool:
        return coalition in self._losses

    def keys(self) -> Any:
        return self._losses.keys()

    def values(self) -> Any:
        return [self[c] for c in self._losses]


@pytest.fixture(scope="module")
def played(spec: ModelSpec) -> SensitivityProfile:
    """Rounds at 2.5 and 3 bits on average."""
    return profile_of(spec, Rounds.within(curve(players_of(spec, "sublayers"), TARGETS), 42))


@pytest.fixture(scope="module")
def plain(spec: ModelSpec) -> SensitivityProfile:
    return profile_of(spec, None)


def average_bits(spec: ModelSpec, target: Fraction) -> Constraint:
    ((constraint,),) = curve(players_of(spec, "sublayers"), [target])
    return constraint


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(ImpqError) as caught:
        action()
    told = str(caught.value)
    assert "\n" not in told and told.endswith(".") and ". " not in told, told
    return told


@pytest.mark.parametrize("target", TARGETS)
def test_at_a_budget_that_was_played_the_best_measured_is_taken(
    played: SensitivityProfile, spec: ModelSpec, target: Fraction
) -> None:
    constraint = average_bits(spec, target)
    roomy = dataclasses.replace(constraint, name="another", budget=10**9)  # which every choice keeps
    for budget in ((constraint,), (roomy, dataclasses.replace(constraint, name="the same by another name"))):
        choice, evidence = choose(played, budget)
        fitting = {
            c: loss
            for c, loss in played.losses.items()
            if constraint.used([b // 2 - 1 for b in c]) <= constraint.budget
        }
        assert evidence.is_measured and evidence.loss == min(fitting.values())
        assert played.losses[tuple(2 + 2 * kind for kind in choice)] == evidence.loss  # type: ignore[index]
        assert evidence.evaluations == len(played.losses) and evidence.loss_at_4_bit == pytest.approx(4)
    everything = [c for c in itertools.product((0, 1), repeat=N) if constraint.used(c) <= constraint.budget]
    assert evidence.loss == pytest.approx(min(value(tuple(2 + 2 * k for k in c)) for c in everything))  # type: ignore[misc]


@pytest.mark.parametrize("target", [Fraction(9, 4), Fraction(11, 4), Fraction(10, 3), Fraction(2)])
def test_at_another_budget_the_game_is_modelled(played: SensitivityProfile, spec: ModelSpec, target: Fraction) -> None:
    constraint = average_bits(spec, target)
    choice, evidence = choose(played, (constraint,))
    chosen: Coalition = tuple(4 if kind else 2 for kind in choice)
    assert constraint.used(choice) <= constraint.budget
    assert evidence.is_measured == (chosen in played.losses)
    measured = [
        loss for c, loss in played.losses.items() if constraint.used([b // 2 - 1 for b in c]) <= constraint.budget
    ]
    assert value(chosen) <= min(measured) + 1e-9  # on so small a game the model errs nowhere that matters
    assert evidence.loss == pytest.approx(value(chosen), abs=0.05)


def test_interactions_are_seen(played: SensitivityProfile, spec: ModelSpec) -> None:
    """φ of the first two players hides that either is next to free at 2 bit, as long as the other is not."""
    choice, _ = choose(played, (average_bits(spec, Fraction(11, 4)),))
    assert choice[:2] != (0, 0)


def test_everything_at_4_bit_where_that_fits(played: SensitivityProfile, spec: ModelSpec) -> None:
    for profile in (played, profile_of(spec, Rounds.within([], 42))):
        choice, evidence = choose(profile, (average_bits(spec, Fraction(4)),))
        assert choice == (1,) * N and evidence.is_measured and evidence.increase == 0


def test_rounds_that_were_cut_short_are_not_taken_at_their_word(played: SensitivityProfile, spec: ModelSpec) -> None:
    """What was measured may then not be near the curve at all."""
    cut = profile_of(spec, played.design.rounds, permutations=2, stopped_by="time")
    constraint = average_bits(spec, Fraction(3))
    best = min(loss for c, loss in cut.losses.items() if constraint.used([b // 2 - 1 for b in c]) <= constraint.budget)
    choice, evidence = choose(cut, (constraint,))
    assert constraint.used(choice) <= constraint.budget and (evidence.is_measured or evidence.loss <= best)


def test_a_game_in_which_2_bit_harms_nothing(spec: ModelSpec, played: SensitivityProfile) -> None:
    flat = dataclasses.replace(
        played, evaluations=tuple(dataclasses.replace(e, losses=(4.0, 4.0)) for e in played.evaluations),
        phi=(0.0,) * N, phi_stderr=(0.0,) * N, covariance=((0.0,) * N,) * N,
    )  # fmt: skip
    choice, evidence = choose(flat, (average_bits(spec, Fraction(11, 4)),))
    assert choice.count(1) <= 2 and evidence.increase == 0


def allocated(found: SensitivityProfile, **options: Any) -> Allocation:
    return stages.allocate(found, **{"device": "laptop-16gb", "average_bits": 3, **options})


def test_an_allocation_says_how_it_was_chosen(played: SensitivityProfile, spec: ModelSpec, tmp_path: Path) -> None:
    made = allocated(played, out=tmp_path / "a.json")
    assert made.evidence is not None and made.evidence.is_measured and made.evidence.method == "rounds"
    assert made.objective == made.evidence.increase == made.evidence.loss - made.evidence.loss_at_4_bit > 0
    assert (made.lower_bound, made.relaxation_bound, made.alpha) == (None, None, None)
    assert made.problem.losses == () == made.problem.quadratic
    assert {constraint.name for constraint in made.problem.constraints} == {"device memory", "average bits"}
    loaded = Allocation.load(tmp_path / "a.json")
    assert loaded == made and loaded.identity() == made.identity() and made.average_bits <= 3
    assert f"the best of {len(played.losses)} measured coalitions that fits" in made.evidence.told()
    between = allocated(played, average_bits=2.25)
    assert between.evidence is not None and between.objective == between.evidence.increase
    between.check(spec)


def test_an_edited_allocation_is_refused(played: SensitivityProfile, spec: ModelSpec) -> None:
    made = allocated(played)
    assert made.evidence is not None
    more = dataclasses.replace(made.problem, losses=((0.0, 0.0),) * N)
    edits: list[dict[str, Any]] = [
        {"objective": made.objective + 1e-6},
        {"evidence": dataclasses.replace(made.evidence, loss=made.evidence.loss + 1e-6)},
        {"lower_bound": made.objective - 1e-6},
        {"relaxation_bound": 0.0},
        {"alpha": 0.5},
        {"evidence": None},
        {"problem": more},
        {"player_bits": (4,) * N},
        {"predicted_file_bytes": made.predicted_file_bytes - 1},
    ]
    for edit in edits:
        assert "allocate again" in refusal(lambda edit=edit: dataclasses.replace(made, **edit).check(spec)), edit


def test_a_profile_of_rounds_serves_the_papers_program_too(played: SensitivityProfile) -> None:
    made = allocated(played, method="impq")
    assert made.evidence is None and made.lower_bound is not None and made.alpha == 0.5
    assert "evidence" not in made.to_json()


def test_what_was_not_played_in_rounds_is_allocated_by_the_program(plain: SensitivityProfile) -> None:
    assert allocated(plain) == allocated(plain, method="impq", alpha=0.5)
    told = refusal(lambda: allocated(plain, method="rounds"))
    assert told.startswith("--method rounds chooses from what rounds measured, and this profile holds permutations")
    assert "'guess' is unknown; choose one of rounds, impq" in refusal(lambda: allocated(plain, method="guess"))


def test_what_only_a_program_takes_is_refused(played: SensitivityProfile) -> None:
    assert refusal(lambda: allocated(played, alpha=0.5)).startswith("--alpha 0.5 is for --method impq")
    assert "between 2 and 4 bit" in refusal(lambda: allocated(played, types=(2, 3, 4)))
    with pytest.raises(AllocationError, match="the smallest that works is --budget"):
        allocated(played, budget_bytes=1000)


def test_a_profile_says_what_was_played(played: SensitivityProfile, tmp_path: Path) -> None:
    played.save(tmp_path / "p.json")
    loaded = SensitivityProfile.load(tmp_path / "p.json")
    assert loaded == played and loaded.identity() == played.identity()
    rounds = loaded.design.rounds
    assert rounds is not None and rounds.share == SHARE and len(rounds.budgets) == len(TARGETS)
    assert loaded.estimate().phi.sum() == pytest.approx(value((2,) * N) - value((4,) * N))


def test_rounds_of_other_players_are_refused(played: SensitivityProfile) -> None:
    for costs in (((0, 1),) * 5, ((0, 1, 2),) * N, ((0,),) * N, ()):
        rounds = Rounds(SHARE, 4, ((Constraint("size", "bytes", costs, 3),),))
        with pytest.raises(SensitivityError, match="rounds were not played with 6 players"):
            dataclasses.replace(played, design=dataclasses.replace(played.design, rounds=rounds))


def test_records_from_before_rounds_stay_what_they_were(plain: SensitivityProfile, tmp_path: Path) -> None:
    """Byte for byte: their identities are recorded elsewhere."""
    shipped = data_path("profiles", "tiny-llama3-kquant.json")
    SensitivityProfile.load(shipped).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == shipped.read_bytes()
    assert "rounds" not in plain.to_json()["design"]
    with pytest.raises(RecordError):
        Allocation.load(shipped)


def test_evidence_of_a_prediction_says_that_it_is_one() -> None:
    told = Evidence("rounds", False, 4.25, 4.0, 1234).told()
    assert told == (
        "predicted from 1,234 measured coalitions, not measured itself, calibration loss 4.2500 nats/token, +0.2500 to "
        "everything at 4 bit"
    )
