"""Whole runs on a random checkpoint: what stops them, what they keep, and that nothing but the losses decides."""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from numpy.typing import NDArray

import impq_edge
from impq_edge import stages
from impq_edge.backends import load_backend
from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import Windows
from impq_edge.model.spec import read_model
from impq_edge.spqe import run
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.journal import Journal, to_text
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import Design, SensitivityProfile
from impq_edge.spqe.run import game_settings
from impq_edge.spqe.sampling import ESTIMATORS, Coalition, Estimator, draws, draws_for, evaluation_order
from impq_edge.spqe.stopping import order_answer
from impq_edge.spqe.table import Job, Table, set_table

Losses = dict[Coalition, NDArray[np.float64]]

GAME = GameOptions(
    method="impq", players="sublayers", permutations=4, tokens=64, window_tokens=32, backend_settings={"encode": "rtn"}
)
N_PLAYERS = 6

Play = Callable[..., SensitivityProfile]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, so 6 sublayers, quickly quantised."""
    return make_checkpoint(tmp_path_factory.mktemp("run") / "model", "llama", intermediate_size=256)


@pytest.fixture(scope="module")
def play(model: Path) -> Play:
    def play(out: Path, **changes: object) -> SensitivityProfile:
        return stages.profile(str(model), out=out, game=dataclasses.replace(GAME, **changes))  # type: ignore[arg-type]

    return play


@pytest.fixture(scope="module")
def undisturbed(play: Play, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of a run that nothing disturbed; made once for each design."""
    folder, known = tmp_path_factory.mktemp("undisturbed"), dict[tuple[object, ...], Path]()

    def find(**changes: object) -> Path:
        key = tuple(sorted(changes.items()))
        if key not in known:
            known[key] = folder / f"{len(known)}.json"
            play(known[key], **changes)
        return known[key]

    return find


@pytest.fixture(scope="module")
def losses(model: Path) -> Losses:
    """Of all 64 coalitions of the sublayers."""
    tokens = np.random.default_rng(0).integers(10, 8000, size=(2, 32))
    table = set_table(job_of(model, tokens))
    return {c: table.losses(c) for c in itertools.product((4, 2), repeat=N_PLAYERS)}  # type: ignore[misc]


def job_of(model: Path, tokens: NDArray[np.int64]) -> Job:
    backend, windows = load_backend("kquant", encode="rtn"), Windows(tokens, "0" * 64)
    settings = game_settings("kquant", backend, windows, players="sublayers", device="cpu")
    return Job(model, read_model(model), backend, windows, settings)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Coalition]:
    """Every coalition that is evaluated from now on, in turn."""
    seen: list[Coalition] = []
    losses = Table.losses

    def watched(table: Table, coalition: Coalition) -> NDArray[np.float64]:
        seen.append(coalition)
        return losses(table, coalition)

    monkeypatch.setattr(Table, "losses", watched)
    return seen


@pytest.fixture
def a_second_each(monkeypatch: pytest.MonkeyPatch, evaluated: list[Coalition]) -> None:
    """A clock by which every evaluation takes a second and everything else no time: limits cut where we say."""
    monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: float(len(evaluated))))


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


@pytest.mark.parametrize(
    ("estimator", "players", "n_players"),
    [("permutations", "blocks", 3), ("antithetic", "tensors", 21), ("stratified", "sublayers", 6)],
)
def test_a_run_makes_the_profile_of_its_design(
    play: Play, tmp_path: Path, evaluated: list[Coalition], estimator: Estimator, players: str, n_players: int
) -> None:
    out = tmp_path / "p.json"
    options = {"estimator": estimator, "players": players, "permutations": 2}
    found = play(out, **options)
    expected = draws(estimator, n_players, draws_for(estimator, n_players, 2), seed=0)
    assert list(found.draws) == expected and found.n_players == n_players
    assert evaluated == list(found.losses) == evaluation_order(estimator, expected, n_players)
    assert found.stopped_by == "permutations" and found.design == Design(estimator, 2, 0)
    total = found.losses[(2,) * n_players] - found.losses[(4,) * n_players]
    assert sum(found.estimate().phi) == pytest.approx(total)
    assert SensitivityProfile.load(out) == found and not journal_of(out).exists()
    assert play(out, **options) == found
    assert len(evaluated) == len(found.losses)  # the second time nothing was


@pytest.mark.parametrize(
    ("estimator", "what"), [("permutations", "order"), ("antithetic", "2.5,3"), ("stratified", "3")]
)
def test_a_run_stops_once_its_answer_is_stable(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, estimator: Estimator, what: str
) -> None:
    options = {"estimator": estimator, "permutations": 40, "until_stable": what}
    first = SensitivityProfile.load(undisturbed(**options))
    assert first.stopped_by == "stability" and first.design.until_stable == what
    whole = draws(estimator, N_PLAYERS, draws_for(estimator, N_PLAYERS, 40), seed=0)
    assert 0 < len(first.draws) < len(whole) and list(first.draws) == whole[: len(first.draws)]
    assert set(first.losses) == set(evaluation_order(estimator, list(first.draws), N_PLAYERS))
    play(tmp_path / "p.json", **options)
    assert (tmp_path / "p.json").read_bytes() == undisturbed(**options).read_bytes()


def test_the_allocation_for_a_device_needs_one(play: Play, model: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "p.json", {"permutations": 40, "until_stable": "allocation"}
    with pytest.raises(SensitivityError, match="--until-stable allocation needs a device; use it with build, or give"):
        play(out, **options)
    request = stages.allocation_request(
        "laptop-16gb", context_tokens=256, kv_type=None, budget_bytes=None, average_bits=3, alpha=0.5,
        outer_type="q6_k",
    )  # fmt: skip
    found = stages.profile(str(model), out=out, game=dataclasses.replace(GAME, **options), request=request)  # type: ignore[arg-type]
    assert found.stopped_by == "stability" and found.design.until_stable.startswith("allocation ")


class Known:
    """Plays from losses that were measured before, and counts."""

    def __init__(self, losses: Losses) -> None:
        self.asked: list[Coalition] = []
        self._losses = losses

    def evaluate(self, coalitions: Sequence[Coalition]) -> Generator[tuple[Coalition, NDArray[np.float64]], None, None]:
        for coalition in coalitions:
            self.asked.append(coalition)
            yield coalition, self._losses[coalition]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("answer", ["order", "total"])
def test_looking_ahead_for_more_workers_does_not_move_the_stop(
    model: Path, losses: Losses, tmp_path: Path, estimator: Estimator, answer: str
) -> None:
    job = job_of(model, np.zeros((2, 32), np.int64))
    answers: dict[str, Any] = {"order": order_answer, "total": lambda found: round(float(sum(found.phi)), 9)}
    stops, asked = [], []
    for ahead in (1, 2, 3, 7, 100):
        known = Known(losses)
        one = run._Run(
            job, Design(estimator, 40, 0), {}, Journal(tmp_path / f"{ahead}", {}), answers[answer], None, ahead,
            lambda *_: None,
        )  # fmt: skip
        stops.append(one.play(known))
        asked.append(len(known.asked))
        assert len(set(known.asked)) == asked[-1]
    assert stops == [stops[0]] * 5
    assert answer == "order" or stops[0][1] == "stability"
    assert asked[0] == min(asked) and asked[-1] == max(asked)
    # Whoever looks furthest ahead evaluates everything.
    assert asked[-1] == len(evaluation_order(estimator, draws(estimator, 6, draws_for(estimator, 6, 40), 0), 6))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_enough_draws_every_estimator_finds_the_shapley_values(
    model: Path, losses: Losses, tmp_path: Path, estimator: Estimator
) -> None:
    means = {c: float(values.mean()) for c, values in losses.items()}
    increases = []
    for order in itertools.permutations(range(N_PLAYERS)):
        bits, row = [4] * N_PLAYERS, np.zeros(N_PLAYERS)
        for player in order:
            before = means[tuple(bits)]  # type: ignore[index]
            bits[player] = 2
            row[player] = means[tuple(bits)] - before  # type: ignore[index]
        increases.append(row)
    exact = np.mean(increases, axis=0)
    seen: list[Estimate] = []
    one = run._Run(
        job_of(model, np.zeros((2, 32), np.int64)), Design(estimator, 60, 1), {}, Journal(tmp_path / "j", {}),
        lambda found: seen.append(found) or len(seen), None, 1, lambda *_: None,  # type: ignore[func-returns-value]
    )  # fmt: skip
    assert one.play(Known(losses))[1] == "permutations"
    assert sum(seen[-1].phi) == pytest.approx(sum(exact))
    assert np.all(np.abs(seen[-1].phi - exact) < 4 * seen[-1].phi_stderr + 1e-9)


def test_a_time_limit_keeps_the_rounds_that_are_whole(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition], a_second_each: None
) -> None:
    cut = play(tmp_path / "p.json", permutations=6, time_limit_s=12)
    assert len(evaluated) == 13  # the one that was under way when time was over is kept too
    assert cut.stopped_by == "time" and len(cut.draws) == 2
    assert stages.allocate(cut, device="laptop-16gb", average_bits=3).average_bits <= 3
    assert cut.phi == SensitivityProfile.load(undisturbed(permutations=2)).phi


def test_time_to_spare_changes_no_byte(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, a_second_each: None
) -> None:
    """Although losses are then measured round by round, in another order."""
    play(tmp_path / "p.json", time_limit_s=1000)
    assert (tmp_path / "p.json").read_bytes() == undisturbed().read_bytes()


@pytest.mark.parametrize("options", [{"permutations": 6}, {"permutations": 40, "until_stable": "order"}])
def test_gone_on_with_after_time_limits_a_run_ends_as_if_undisturbed(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition], a_second_each: None,
    options: dict[str, object],
) -> None:  # fmt: skip
    """No evaluation is made twice, not even those of a round that was cut short."""
    whole, out, times = undisturbed(**options), tmp_path / "p.json", 0
    evaluated.clear()
    while not out.exists() or SensitivityProfile.load(out).stopped_by == "time":
        times += 1
        play(out, time_limit_s=8, **options)
    assert times >= 3 and out.read_bytes() == whole.read_bytes() and not journal_of(out).exists()
    assert sorted(evaluated) == sorted(SensitivityProfile.load(whole).losses)


def test_too_short_a_time_says_so_and_keeps_the_losses(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition]
) -> None:
    """On the real clock: a billionth of a second is always over."""
    out = tmp_path / "p.json"
    for runs in (1, 2):
        with pytest.raises(SensitivityError) as caught:
            play(out, time_limit_s=1e-9)
        assert str(caught.value) == (
            f"--time-limit ended the run after {runs} evaluations, before the first round was whole; "
            "they are kept: run the same command again to go on."
        )
        assert not out.exists() and len(journal_of(out).read_text().splitlines()) == 1 + runs
    found = play(out)
    assert sorted(evaluated) == sorted(found.losses)
    assert out.read_bytes() == undisturbed().read_bytes()


@pytest.mark.parametrize("estimator", ["permutations", "stratified"])
def test_more_permutations_reuse_all_losses(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition], estimator: Estimator
) -> None:
    out, fresh = tmp_path / "p.json", undisturbed(estimator=estimator, permutations=4)
    small = play(out, estimator=estimator, permutations=2)
    evaluated.clear()
    large = play(out, estimator=estimator, permutations=4)
    assert sorted(evaluated) == sorted(set(large.losses) - set(small.losses)) and evaluated
    assert large.phi == SensitivityProfile.load(fresh).phi and out.read_bytes() == fresh.read_bytes()


def test_fewer_permutations_or_another_estimator_keep_what_was_measured(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition]
) -> None:
    out = tmp_path / "p.json"
    out.write_bytes(undisturbed().read_bytes())
    large, fresh = SensitivityProfile.load(out), undisturbed(estimator="stratified", permutations=4)
    evaluated.clear()
    small = play(out, permutations=2)
    assert not evaluated and small.losses == large.losses and len(small.draws) == 2
    other = play(out, estimator="stratified")
    assert other.losses.items() >= large.losses.items() and not set(evaluated) & set(large.losses)
    assert other.phi == SensitivityProfile.load(fresh).phi


ROUNDS = {"method": "rounds", "permutations": 6, "curve": "2.5,3"}


def test_rounds_end_with_the_evaluations_of_the_permutations(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition]
) -> None:
    found = play(tmp_path / "p.json", **ROUNDS)
    assert sorted(evaluated) == sorted(found.losses) and len(set(evaluated)) == len(evaluated)
    assert len(found.losses) == 6 * (N_PLAYERS - 1) + 2 and found.stopped_by == "evaluations"
    rounds = found.design.rounds
    assert rounds is not None and [c.name for budget in rounds.budgets for c in budget] == ["average bits"] * 2
    assert found.design == Design("stratified", 6, 0, "", rounds)
    total = found.losses[(2,) * N_PLAYERS] - found.losses[(4,) * N_PLAYERS]
    assert sum(found.estimate().phi) == pytest.approx(total)
    assert (tmp_path / "p.json").read_bytes() == undisturbed(**ROUNDS).read_bytes()
    assert not journal_of(tmp_path / "p.json").exists()
    evaluated.clear()
    assert play(tmp_path / "p.json", **ROUNDS) == found and not evaluated


@pytest.mark.parametrize(
    "options", [{"players": "tensors"}, {"players": "blocks", "backend": "quanto", "backend_settings": {}}]
)
def test_rounds_of_other_players_and_backends(play: Play, tmp_path: Path, options: dict[str, Any]) -> None:
    found = play(tmp_path / "p.json", method="rounds", permutations=2, **options)
    assert found.stopped_by == "evaluations" and len(found.losses) <= max(4, 2 * (found.n_players - 1) + 2)
    made = stages.allocate(found, device="laptop-16gb", average_bits=3)
    assert made.evidence is not None and made.average_bits <= 3 and len(made.player_bits) == found.n_players
    assert stages.allocate(found, device="laptop-16gb", average_bits=3, method="impq").lower_bound is not None


def test_rounds_gone_on_with_after_time_limits_end_as_if_undisturbed(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition], a_second_each: None
) -> None:
    whole, out, stops = undisturbed(**ROUNDS), tmp_path / "p.json", []
    evaluated.clear()
    while not out.exists() or SensitivityProfile.load(out).stopped_by == "time":
        with contextlib.suppress(SensitivityError):  # before the first pair was whole
            cut = play(out, time_limit_s=3, **ROUNDS)
            stops.append((len(cut.draws), len(cut.losses)))
    assert len(stops) >= 4 and stops == sorted(stops) and out.read_bytes() == whole.read_bytes()
    assert sorted(evaluated) == sorted(SensitivityProfile.load(whole).losses) and not journal_of(out).exists()


def test_killed_rounds_go_on_from_their_journal_to_the_same_bytes(
    play: Play, undisturbed: Callable[..., Path], model: Path, tmp_path: Path, evaluated: list[Coalition]
) -> None:
    """Cut the journal of a whole run anywhere, also in the middle of a batch."""
    whole = undisturbed(**ROUNDS)
    losses = SensitivityProfile.load(whole).window_losses
    evaluated.clear()
    play(tmp_path / "first.json", **ROUNDS)
    order = list(evaluated)
    for kept in (1, 9, 15, 22, 31):
        out = tmp_path / f"{kept}.json"
        with pytest.raises(SensitivityError):
            play(out, time_limit_s=1e-9, **ROUNDS)  # which leaves a header and the first losses
        lines = journal_of(out)
        journal = Journal(lines, _header(lines))
        for coalition in order[:kept]:
            journal.add(to_text(coalition), losses[coalition])
        evaluated.clear()
        play(out, **ROUNDS)
        assert evaluated == order[kept:] and out.read_bytes() == whole.read_bytes()


def _header(journal: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(journal.read_text().splitlines()[0].partition(" ")[2])
    return {key: value for key, value in header.items() if key != "schema"}


def test_rounds_reuse_what_other_designs_measured_and_are_not_led_by_it(
    play: Play, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition]
) -> None:
    out = tmp_path / "p.json"
    on_losses = {**ROUNDS, "objective": "loss"}
    before, fresh = play(out, permutations=4), SensitivityProfile.load(undisturbed(**on_losses))
    evaluated.clear()
    found = play(out, **on_losses)
    assert sorted(evaluated) == sorted(set(fresh.losses) - set(before.losses))
    assert set(found.losses) == set(fresh.losses) | set(before.losses) and found.phi == fresh.phi
    other = play(out, **{**on_losses, "curve": "2.25"})
    assert set(other.losses) >= set(found.losses)
    again = play(out, permutations=4)
    assert again.phi == before.phi and again.stopped_by == "permutations" and again.design == before.design


def test_in_build_rounds_are_played_at_the_devices_own_budgets(play: Play, model: Path, tmp_path: Path) -> None:
    def played(out: str, **limits: Any) -> SensitivityProfile:
        request = stages.allocation_request(
            "laptop-16gb", context_tokens=256, kv_type=None, outer_type="q6_k",
            **{"budget_bytes": None, "average_bits": None, **limits},
        )  # fmt: skip
        game = dataclasses.replace(GAME, method="rounds", permutations=6)
        return stages.profile(str(model), out=tmp_path / out, game=game, request=request)

    found = played("one.json", average_bits=3)
    assert found.design.rounds is not None
    ((constraint,),) = found.design.rounds.budgets  # the laptop's memory holds everything, and is left out
    assert constraint.name == "average bits" and len(found.losses) == 32
    made = stages.allocate(found, device="laptop-16gb", average_bits=3)
    assert made.evidence is not None and made.evidence.is_measured
    everything_fits = played("two.json")
    assert everything_fits.design.rounds is not None and everything_fits.design.rounds.budgets == ()
    assert len(everything_fits.losses) == 2 + 2 * 6 and everything_fits.stopped_by == "evaluations"
    assert stages.allocate(everything_fits, device="laptop-16gb").everything_fits


@pytest.fixture(scope="module")
def begun(play: Play, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a run that had only just begun."""
    out = tmp_path_factory.mktemp("begun") / "p.json"
    with pytest.raises(SensitivityError):
        play(out, time_limit_s=1e-9)
    return journal_of(out)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tokens": 32}, "tokens"),
        ({"window_tokens": 16}, "window_tokens"),
        ({"players": "blocks"}, "players"),
        ({"backend": "hqq", "backend_settings": {}}, "backend"),
        ({"backend_settings": {"encode": "imatrix"}}, "backend"),
        ({"calibration": "a text of one's own"}, "text_sha256"),
        ({"model": "gemma2"}, "model"),
    ],
)
def test_what_was_measured_on_other_inputs_is_refused(
    checkpoints: dict[str, Path], model: Path, begun: Path, undisturbed: Callable[..., Path], tmp_path: Path,
    changes: dict[str, Any], key: str,
) -> None:  # fmt: skip
    """First its journal, then the finished profile; neither is touched."""
    out, text = tmp_path / "p.json", tmp_path / "text.txt"
    text.write_text("A text of one's own is another text. " * 200)
    options = {name: text if name == "calibration" else value for name, value in changes.items() if name != "model"}
    other = checkpoints[changes["model"]] if "model" in changes else model

    def again() -> str:
        with pytest.raises(SensitivityError) as caught:
            stages.profile(str(other), out=out, game=dataclasses.replace(GAME, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    journal_of(out).write_bytes(begun.read_bytes())
    assert f"{journal_of(out)} was started with {key} = " in again()
    assert journal_of(out).read_bytes() == begun.read_bytes() and not out.exists()
    out.write_bytes(undisturbed().read_bytes())
    which = "files of the checkpoint" if key == "model" else "settings"
    assert again() == f"{out} is a profile of other inputs ({which}); give another -o, or delete it to make it anew."
    assert out.read_bytes() == undisturbed().read_bytes()


@pytest.mark.parametrize("text", ["my diary", "deadbeef", '00000000 {"schema": "my diary/1"', "0000000 {}", "x"])
def test_a_line_without_its_end_is_no_journal_unless_it_may_begin_one(tmp_path: Path, text: str) -> None:
    """What a killed run leaves of a first line is done with; anybody else's file is left alone."""
    path = tmp_path / "j"
    path.write_text(text)
    if text == "deadbeef":
        assert Journal(path, {}).losses == {}
        return
    with pytest.raises(SensitivityError, match=r"Line 1 of .* is damaged, or the file is no journal"):
        Journal(path, {})
    assert path.read_text() == text


def test_another_design_goes_on_from_a_journal(
    play: Play, begun: Path, undisturbed: Callable[..., Path], tmp_path: Path, evaluated: list[Coalition]
) -> None:
    """The losses are those of the game, whatever they were measured for."""
    out, fresh = tmp_path / "p.json", undisturbed(seed=5, estimator="antithetic")
    evaluated.clear()
    journal_of(out).write_bytes(begun.read_bytes())
    assert len(play(out, seed=5, estimator="antithetic").losses) == len(evaluated) + 1
    assert out.read_bytes() == fresh.read_bytes()


def test_progress_counts_up_to_the_end(model: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    sentences: list[str] = []
    found = stages.profile(
        str(model), out=tmp_path / "p.json", game=GAME, progress=lambda *step: told.append(step), say=sentences.append
    )
    count = len(found.losses)
    steps = [(done, total) for phase, done, total in told if phase == "evaluating"]
    assert steps == [(done, count) for done in range(count + 1)]
    assert [(done, total) for phase, done, total in told if phase == "quantising"] == [(1, 3), (2, 3), (3, 3)]
    assert len(sentences) == 1 and sentences[0].startswith(f"{count} evaluations, which recomputed ")


RUNS = """
    import os, sys
    from pathlib import Path

    import impq_edge.backends.kquant, transformers.quantizers.auto, transformers.models.llama.modeling_llama
    from impq_edge import stages
    from impq_edge.spqe.options import GameOptions
    from impq_edge.spqe.table import Table

    losses = Table.losses
    game = GameOptions(method="impq", players="tensors", permutations=3, tokens=64, window_tokens=32)
    for line in sys.stdin:  # every run is a process of its own, with everything imported already
        model, out, log = line.split()

        def logged(table, coalition):
            found = losses(table, coalition)
            with open(log, "a") as file:
                file.write("".join(map(str, coalition)) + "\\n")
            return found

        if not (child := os.fork()):
            Table.losses = logged
            stages.profile(model, out=Path(out), game=game)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def runs() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUNS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(impq_edge.__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process
    process.communicate(timeout=300)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts runs by fork")
def test_kill_9_loses_at_most_one_evaluation(runs: subprocess.Popen[str], model: Path, tmp_path: Path) -> None:
    """At random evaluations, and a random moment of each; what is resumed ends with an undisturbed run's bytes."""
    out, log = tmp_path / "p.json", tmp_path / "log"
    steps = [0, *np.random.default_rng().integers(1, 16, size=3).tolist()]

    def told() -> int:
        assert runs.stdout is not None
        return int(runs.stdout.readline())

    def start(out: Path, log: Path) -> int:
        print(model, out, log, file=runs.stdin, flush=True)
        return told()

    for step in steps:
        made_before, kept_before = lines(log), max(1, lines(journal_of(out)))
        child = start(out, log)
        while lines(log) < made_before + step and not out.exists():
            time.sleep(0.001)
        time.sleep(np.random.default_rng().uniform(0, 0.02))  # some way into the next evaluation
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        assert told() == -9 or out.exists()
        made, kept = lines(log) - made_before, max(1, lines(journal_of(out))) - kept_before
        assert kept <= made <= kept + 1 or out.exists(), steps
    start(out, log)
    assert told() == 0
    found = SensitivityProfile.load(out)
    assert len(found.losses) <= lines(log) <= len(found.losses) + len(steps)
    start(tmp_path / "whole.json", tmp_path / "whole.log")
    assert told() == 0
    assert lines(tmp_path / "whole.log") == len(found.losses)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not journal_of(out).exists()
