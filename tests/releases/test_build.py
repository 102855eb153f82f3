import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint

import impq_edge
from impq_edge import stages
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.errors import AllocationError, BackendError, ModelError, RecordError, SensitivityError, ValidationError
from impq_edge.impq.allocate import allocate_blocks
from impq_edge.impq.allocation import Allocation
from impq_edge.releases.build import Build, summary
from impq_edge.releases.lent import BackendLosses, measure_lent
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.stages import allocation_request
from impq_edge.validation.inspection import inspect
from impq_edge.validation.report import ValidationReport

GAME = GameOptions(method="impq", permutations=2, tokens=1024, backend_settings={"encode": "rtn"})
QUICK = {"game": GAME, "windows": 2, "context_tokens": 256}


def quick_build(model: Path, out: Path, **changes: object) -> tuple[Build, list[str]]:
    told: list[str] = []
    settings = {**QUICK, "average_bits": 3, "say": told.append, **changes}
    return impq_edge.build("laptop-16gb", model=str(model), out=out, **settings), told  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, list[str]]:
    return quick_build(checkpoints["qwen3"], tmp_path_factory.mktemp("build"))


def test_records_agree_with_each_other_and_with_the_file(built: tuple[Build, list[str]]) -> None:
    made, told = built
    out = made.directory
    profile = SensitivityProfile.load(out / "sensitivity.json")
    allocation = Allocation.load(out / "allocation.json")
    artifact = Artifact.load(out / f"{made.artifact.artifact}.json")
    validation = ValidationReport.load(out / f"{made.artifact.artifact}.validation.json")
    assert allocation.profile_sha256 == profile.identity()
    assert artifact.allocation_sha256 == allocation.identity()
    assert artifact.is_intact(out) and validation.sha256 == artifact.sha256
    assert artifact.file_bytes == allocation.predicted_file_bytes
    assert allocation.player_bits.count(4) == 1 and allocation.average_bits <= 3
    assert made.uniform[2][0].file_bytes < artifact.file_bytes < made.uniform[4][0].file_bytes
    assert any("takes about" in sentence for sentence in told)
    assert not (out / "sensitivity.json.journal").exists()


def test_summary_has_the_keys_people_script_against(built: tuple[Build, list[str]]) -> None:
    told = json.loads(json.dumps(summary(built[0])))
    assert told.keys() >= {
        "artifact", "sha256", "file_bytes", "predicted_file_bytes", "budget_bytes", "average_bits", "bits_per_weight",
        "tensor_types", "validation",
    }  # fmt: skip
    assert told["validation"].keys() >= {
        "perplexity", "perplexity_stderr", "tokens", "prompt_tok_per_s", "generation_tok_per_s", "peak_rss_bytes",
        "passed",
    }  # fmt: skip
    assert Path(told["artifact"]).stat().st_size == told["file_bytes"] <= told["budget_bytes"]


def test_report_tells_what_was_measured(built: tuple[Build, list[str]]) -> None:
    made, _ = built
    report = (made.directory / "report.md").read_text()
    for shown in (
        made.artifact.artifact,
        f"{made.artifact.file_bytes:,}",
        f"{made.validation.perplexity:.3f}",
        f"{made.uniform[2][1].perplexity:.3f}",
        made.artifact.sha256,
        "KV cache",
        "system reserve",
    ):
        assert shown in report
    assert re.findall(r"^\| (\d) \| ([24]) \|", report, re.MULTILINE) == [
        (str(block), str(bits)) for block, bits in enumerate(made.allocation.player_bits)
    ]


def test_finished_stages_are_not_redone(built: tuple[Build, list[str]], checkpoints: dict[str, Path]) -> None:
    made, _ = built
    kept = {
        path: path.stat().st_mtime_ns
        for path in made.directory.iterdir()
        if path.name not in ("report.md", "report.html", "allocation.json")
    }
    phases: list[str] = []
    again, _ = quick_build(checkpoints["qwen3"], made.directory, progress=lambda phase, *_: phases.append(phase))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again.artifact == made.artifact and again.validation == made.validation
    assert not {"evaluating", "quantising", "writing, MiB", "perplexity"} & set(phases)


def test_another_budget_reuses_the_game(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built[0].directory, tmp_path / "copy"))
    phases: list[str] = []
    other, _ = quick_build(checkpoints["qwen3"], out, average_bits=2.7, progress=lambda phase, *_: phases.append(phase))
    assert "evaluating" not in phases and "writing, MiB" in phases
    assert other.allocation.player_bits.count(4) == 1  # 2.67 bits: the same allocation in a file of the same name
    with pytest.raises(SensitivityError, match=r"sensitivity\.json is a profile of other inputs"):
        quick_build(checkpoints["qwen3"], out, game=dataclasses.replace(GAME, tokens=512))


def test_a_larger_game_goes_on_from_a_smaller_one(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built[0].directory, tmp_path / "copy"))
    first = built[0].profile
    steps: list[int] = []

    def watch(phase: str, done: int, total: int) -> None:
        if phase == "evaluating":
            steps.append(total - done)

    larger, _ = quick_build(
        checkpoints["qwen3"],
        out,
        game=dataclasses.replace(GAME, permutations=6, estimator="antithetic"),
        progress=watch,
    )
    assert larger.profile.losses.items() >= first.losses.items()
    fresh, _ = quick_build(
        checkpoints["qwen3"], tmp_path / "fresh", game=dataclasses.replace(GAME, permutations=6, estimator="antithetic")
    )
    assert larger.profile.phi == fresh.profile.phi and steps[0] < len(fresh.profile.evaluations)


def test_another_head_type_remakes_every_file(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built[0].directory, tmp_path / "copy"))
    other, _ = quick_build(checkpoints["qwen3"], out, outer_type="q8_0")
    for artifact, report in (*other.uniform.values(), (other.artifact, other.validation)):
        assert artifact.tensor_types["output.weight"] == "q8_0" and report.sha256 == artifact.sha256


def test_another_device_is_measured_anew(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built[0].directory, tmp_path / "copy"))
    small = dataclasses.replace(built[0].device, max_file_bytes=built[0].artifact.file_bytes)
    told: list[str] = []
    impq_edge.build(
        small, model=str(checkpoints["qwen3"]), out=out, average_bits=3,
        progress=lambda phase, *_: told.append(phase), **QUICK,
    )  # fmt: skip
    assert "evaluating" not in told and "perplexity" in told


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (AllocationError, {"budget_bytes": 1000}),
        (AllocationError, {"alpha": 7}),
        (AllocationError, {"average_bits": 9}),
        (AllocationError, {"outer_type": "iq1"}),
        (ValidationError, {"windows": 0}),
        (ValidationError, {"context_tokens": 1}),
        (RecordError, {"text": Path("nothing.txt")}),
    ],
)
def test_requests_that_cannot_be_met_fail_before_the_game(
    checkpoints: dict[str, Path], tmp_path: Path, error: type[Exception], arguments: dict[str, object]
) -> None:
    phases: list[str] = []
    with pytest.raises(error):
        quick_build(
            checkpoints["llama"], tmp_path / "out", progress=lambda phase, *_: phases.append(phase), **arguments
        )
    assert not {"quantising", "evaluating"} & set(phases) and not (tmp_path / "out").exists()


def test_everything_fits(checkpoints: dict[str, Path], built: tuple[Build, list[str]], tmp_path: Path) -> None:
    made, told = quick_build(
        checkpoints["qwen3"], tmp_path, average_bits=None, sensitivity=built[0].directory / "sensitivity.json"
    )
    assert set(made.allocation.player_bits) == {4} and made.allocation.everything_fits
    assert any("Everything fits laptop-16gb at 4 bit" in sentence and "would be left" in sentence for sentence in told)
    assert "Everything fits at 4 bit" in (tmp_path / "report.md").read_text()
    assert made.uniform[4][0] == made.artifact


def test_another_backend_shows_what_the_k_quants_lose(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made, told = quick_build(
        checkpoints["llama"], tmp_path, game=dataclasses.replace(GAME, backend="hqq", backend_settings={})
    )
    report = (tmp_path / "report.md").read_text()
    section = report[report.index("## hqq against the K-quants that ship") :]
    rows = re.findall(r"^\| (this mix|all at [24] bit) \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert [row[0] for row in rows] == ["this mix", "all at 4 bit", "all at 2 bit"]
    measured = {name: float(ours) for name, ours, _ in rows}
    assert measured["all at 4 bit"] == pytest.approx(made.profile.losses[(4, 4, 4)], abs=1e-4)
    assert measured["all at 2 bit"] == pytest.approx(made.profile.losses[(2, 2, 2)], abs=1e-4)
    assert any(ours != kquant for _, ours, kquant in rows)
    losses = BackendLosses.load(tmp_path / "backend-losses.json")
    assert losses.coalitions[:3] == ("".join(map(str, made.allocation.player_bits)), "444", "222")
    assert f"| K-quants' own choice | {losses.backend[3]:.4f} | {losses.kquant[3]:.4f} |" in section
    assert losses.lost == pytest.approx(losses.kquant[0] - losses.kquant[3], abs=1e-9)
    assert any("play the game with --backend kquant" in sentence for sentence in told) == losses.matters


def test_an_allocation_that_k_quants_would_not_have_made_is_told_of(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    made, _ = quick_build(checkpoints["llama"], tmp_path / "one")
    spec, found = made.profile.model, made.profile
    request = allocation_request(
        "raspberry-pi-5", context_tokens=512, kv_type=None, budget_bytes=None, average_bits=3.4, alpha=1.0,
        outer_type="q6_k",
    )  # fmt: skip
    losses = {}
    for sign in (1, -1):  # what matters most at 4 bit, and what matters least
        wanted = allocate_blocks(
            spec, found.header_bytes, sign * np.array(found.phi) + (sign < 0), np.zeros((3, 3)), "", request
        )
        asked = {tmp_path / f"{sign}.json": wanted}
        quiet = (EncodeOptions("rtn"), lambda *_: None)
        (lent,) = measure_lent(checkpoints["llama"], found, asked, *quiet)
        losses[sign] = lent
        assert measure_lent(Path("nowhere"), found, asked, *quiet) == (lent,), "and is not measured twice"
        kquant = dict(zip(lent.coalitions, lent.kquant, strict=True))
        alone = {c: found.losses[tuple(map(int, c))] for c in kquant if tuple(map(int, c)) in found.losses}
        for coalition, loss in alone.items():
            assert kquant[coalition] == pytest.approx(loss, abs=1e-5), "the profile's own backend is what ships"
    assert losses[-1].lost > losses[1].lost
    assert dataclasses.replace(losses[1], lost=0.1, lost_stderr=0.04).matters
    assert not dataclasses.replace(losses[1], lost=0.1, lost_stderr=0.06).matters
    assert "0.1000 ± 0.0400" in dataclasses.replace(losses[1], lost=0.1, lost_stderr=0.04).warning("hqq")


def test_the_report_of_finer_players_lists_them_all(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made, told = quick_build(
        checkpoints["qwen3"], tmp_path, game=dataclasses.replace(GAME, tokens=512, players="sublayers")
    )
    report = (tmp_path / "report.md").read_text()
    section = report[report.index("## Sublayers\n") : report.index("## Memory on")]
    names = [f"{block}.{part}" for block in range(3) for part in ("attn", "ffn")]
    rows = re.findall(r"^\| (\S+) \| ([24]) \| ([+-][\d.]+) ± [\d.]+ \|", section, re.MULTILINE)
    assert [(name, bits) for name, bits, _ in rows] == [
        (name, str(bits)) for name, bits in zip(names, made.allocation.player_bits, strict=True)
    ]
    assert [float(phi) for *_, phi in rows] == pytest.approx(made.profile.phi, abs=1e-5)
    assert made.allocation.players == "sublayers" and made.artifact.tensor_types == made.allocation.tensor_types
    players = made.allocation.player_bits.count(4)
    assert any(f"{players} at 4 bit" in sentence and "Of 6 players" in sentence for sentence in told)


def test_kill_at_any_stage_and_resume_gives_the_same_bytes(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL as soon as each sign of progress appears, in one directory; then let it finish."""
    reference = built[0].directory
    command = (
        "import impq_edge, pathlib; from impq_edge.spqe.options import GameOptions; "
        f"impq_edge.build('laptop-16gb', model={str(checkpoints['qwen3'])!r}, "
        f"out=pathlib.Path({str(tmp_path)!r}), average_bits=3, **{QUICK!r})"
    )
    mix = built[0].artifact.artifact
    for sign in ("sensitivity.json.journal", "sensitivity.json", mix, f"{mix}.validation.json", "uniform-4bit.gguf"):
        child = subprocess.Popen([sys.executable, "-c", command])
        while child.poll() is None and not (tmp_path / sign).exists():
            time.sleep(0.005)
        child.kill()
        child.wait()
    quick_build(checkpoints["qwen3"], tmp_path)
    for name in ("sensitivity.json", "allocation.json", mix, f"{mix}.json", "uniform-2bit.gguf", "uniform-4bit.gguf"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in reference.iterdir()}


IN_ROUNDS = dataclasses.replace(GAME, method="rounds", tokens=512, players="sublayers", permutations=6)


@pytest.fixture(scope="module")
def played(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, list[str]]:
    return quick_build(checkpoints["qwen3"], tmp_path_factory.mktemp("rounds"), game=IN_ROUNDS)


def test_a_build_in_rounds_ships_the_best_that_was_measured(played: tuple[Build, list[str]]) -> None:
    made, told = played
    evidence, found = made.allocation.evidence, made.profile
    assert isinstance(found, SensitivityProfile) and found.stopped_by == "evaluations"
    assert evidence is not None and evidence.is_measured and evidence.evaluations == len(found.losses) == 6 * 5 + 2
    chosen = made.allocation.player_bits
    assert found.losses[chosen] == evidence.loss and made.allocation.average_bits <= 3  # type: ignore[index]
    constraint = next(c for c in made.allocation.problem.constraints if c.name == "average bits")
    fits = [
        loss for bits, loss in found.losses.items() if constraint.used([b // 2 - 1 for b in bits]) <= constraint.budget
    ]
    assert evidence.loss == min(fits)
    assert made.artifact.tensor_types == made.allocation.tensor_types
    assert any("the best of 32 measured coalitions that fits, KL divergence from" in sentence for sentence in told)
    assert any(sentence.startswith("The game is played in rounds, 32 evaluations at most;") for sentence in told)


def test_papers_of_a_build_in_rounds_claim_no_proof(played: tuple[Build, list[str]]) -> None:
    made, _ = played
    report = (made.directory / "report.md").read_text()
    assert "How the allocation was chosen: the best of 32 measured coalitions that fits" in report
    assert "optimum of no program" in report and "proven" not in report and "α =" not in report
    assert f"{len(made.profile.draws)} of the complement pairs among 32 coalitions" in report  # type: ignore[union-attr]
    assert "rounds at 1 budget after a design of 40%" in report and ": method rounds, " in report
    told = json.loads(json.dumps(summary(made)))
    assert told["lower_bound"] is None and told["evidence"]["method"] == "rounds"
    recipe = inspect(made.directory / made.artifact.artifact).recipe
    assert recipe is not None and recipe["method"] == "rounds"


def test_another_budget_is_played_with_what_is_known(
    played: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out, before = Path(shutil.copytree(played[0].directory, tmp_path / "copy")), played[0].profile
    assert isinstance(before, SensitivityProfile)
    other, _ = quick_build(checkpoints["qwen3"], out, game=IN_ROUNDS, average_bits=2.5)
    assert isinstance(other.profile, SensitivityProfile)
    assert set(other.profile.losses) >= set(before.losses) and other.profile.design != before.design
    assert other.allocation.evidence is not None and other.allocation.evidence.is_measured
    fresh, _ = quick_build(checkpoints["qwen3"], tmp_path / "fresh", game=IN_ROUNDS, average_bits=2.5)
    assert fresh.allocation.evidence is not None
    assert other.allocation.evidence.loss <= fresh.allocation.evidence.loss


def test_where_everything_fits_no_rounds_are_played(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made, told = quick_build(checkpoints["qwen3"], tmp_path, game=IN_ROUNDS, average_bits=None)
    assert isinstance(made.profile, SensitivityProfile) and len(made.profile.losses) == 2 + 2 * 6
    assert made.allocation.everything_fits and any("Everything fits laptop-16gb" in sentence for sentence in told)
    assert "Everything fits at 4 bit" in (tmp_path / "report.md").read_text()


def test_what_does_not_go_with_rounds_fails_before_the_game(
    built: tuple[Build, list[str]], played: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plain, rounds = (made.directory / "sensitivity.json" for made, _ in (built, played))
    for message, arguments in (
        ("--alpha 0.5 is for --method impq", {"game": IN_ROUNDS, "alpha": 0.5}),
        ("--alpha 0.5 is for --method impq", {"sensitivity": rounds, "game": GameOptions(), "alpha": 0.5}),
        ("this profile holds permutations alone", {"sensitivity": plain, "game": IN_ROUNDS}),
        ("--budget", {"game": IN_ROUNDS, "budget_bytes": 1000}),
    ):
        told: list[str] = []
        with pytest.raises(AllocationError, match=message):
            quick_build(checkpoints["qwen3"], tmp_path / "out", say=told.append, **arguments)
        assert not any("takes about" in sentence for sentence in told) and not (tmp_path / "out").exists()


def test_bad_input_leaves_nothing_behind(
    built: tuple[Build, list[str]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    odd = make_checkpoint(tmp_path / "odd", "llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    for error, message, arguments in (
        (ModelError, "--allow-fallback", {"model": odd}),
        (ModelError, "neither a directory nor a hub id", {"model": Path("nothing at all")}),
        (BackendError, "'awq' is unknown", {"game": GameOptions(backend="awq")}),
        (BackendError, "'kquant' has no setting 'axis'", {"game": GameOptions(backend_settings={"axis": 0})}),
        (RecordError, "is a profile of random-qwen3", {"sensitivity": built[0].directory / "sensitivity.json"}),
    ):
        given = {"model": checkpoints["llama"], **arguments}
        with pytest.raises(error, match=message):
            quick_build(given.pop("model"), out, **given)  # type: ignore[arg-type]
        assert not out.exists()
    with pytest.raises(AllocationError, match="the smallest that works is --budget"):
        quick_build(checkpoints["qwen3"], out, budget_bytes=1000, sensitivity=built[0].directory / "sensitivity.json")
    assert not out.exists()


def test_a_ladder_with_the_default_encoder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Embedding and head are players too, nothing is encoded by another encoder than the one measured with."""
    game = GameOptions(method="impq", tokens=512, calibration_tokens=1024, types=(2, 4, 8), compute="cpu")
    budget = 3_500_000
    made, told = quick_build(checkpoints["qwen3"], tmp_path, game=game, average_bits=None, budget_bytes=budget)
    allocation = made.allocation
    assert isinstance(made.profile, LadderProfile) and made.profile.covariance is None
    assert made.artifact.file_bytes == allocation.predicted_file_bytes <= budget
    assert len(allocation.player_bits) == 3 + 2 and set(allocation.player_bits) <= {2, 4, 8}
    assert allocation.objective - (allocation.lower_bound or 0) <= 1e-4 * allocation.objective
    assert made.artifact.encoding["encode"] == "gptq" == made.profile.settings.backend["encode"]
    report = (tmp_path / "report.md").read_text()
    assert "Blocks, embedding and head" in report and "2 bit | 4 bit | 8 bit" in report
    assert "encode gptq" in report and "among the players" in report
    assert any(line.startswith("Of 5 players ") for line in told)
    assert not (tmp_path / "encoded").exists()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    again, _ = quick_build(checkpoints["qwen3"], tmp_path, game=game, average_bits=None, budget_bytes=budget)
    assert again.artifact == made.artifact and {p: p.read_bytes() for p in tmp_path.glob("*.gguf")} == before


def test_a_ladder_keeps_the_interactions_of_a_game(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    game = dataclasses.replace(GAME, tokens=512, types=(2, 3, 4), permutations=3)
    made = stages.ladder(str(checkpoints["qwen3"]), out=tmp_path / "l.json", game=game)
    played = SensitivityProfile.load(tmp_path / "l.game.json")
    assert made.covariance == played.covariance and made.game_sha256 == played.identity()
    allocation = stages.allocate(made, device="laptop-16gb", average_bits=3, types=(2, 4))
    assert (
        allocation.types == (2, 4) and len(allocation.problem.quadratic) == 3
    )  # then embedding and head are no players
    wider = stages.ladder(
        str(checkpoints["qwen3"]), out=tmp_path / "l.json", game=dataclasses.replace(game, types=(2, 8))
    )
    assert wider.types == (2, 3, 4, 8)
    assert np.array_equal(wider.divergences((2, 3, 4)), made.divergences())
