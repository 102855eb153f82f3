"""Releases of every kind, from release.toml to a rebuild: a ladder, rounds, another backend, a model from the hub."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, serving

from impq_edge.errors import RecordError
from impq_edge.impq.allocation import Allocation
from impq_edge.releases.dry import foresee
from impq_edge.releases.lent import BackendLosses
from impq_edge.releases.manifest import Manifest
from impq_edge.releases.order import load_order
from impq_edge.releases.release import release
from impq_edge.releases.verify import verify
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.profile import SensitivityProfile

ORDER = """
name = "small"
models = ["{model}"]
contexts = [256]
windows = 1

[game]
tokens = 512
{game}

[[devices]]
device = "raspberry-pi-5"
{limit}

[[devices]]
device = "laptop-16gb"
contexts = [256, 512]
"""


def ordered(folder: Path, game: str, limit: str = "average_bits = 3", model: str = "checkpoint") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "release.toml"
    path.write_text(ORDER.format(game=game, limit=limit, model=model))
    return path


def released(
    checkpoint: Path, tmp_path: Path, game: str, limit: str = "average_bits = 3"
) -> tuple[Manifest, list[str]]:
    """Make a release in "out", and rebuild it."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    order, out = load_order(ordered(tmp_path, game, limit)), tmp_path / "out"
    foreseen, said = foresee(order, out=out, base=tmp_path), list[str]()
    made = release(order, out=out, base=tmp_path, say=said.append)
    assert made.passed and foreseen.evaluations["checkpoint"] >= made.models[0].evaluations
    again = verify(out, rebuild=True, base=tmp_path)
    assert again.passed and again.rebuilt >= 1 + 2 * len(made.files) + 3, again.findings
    for file in made.files:
        for taker in file.takers:
            assert "## How it was made" in (out / taker.records / "report.md").read_text()
    return made, said


def test_a_ladder_with_its_types_as_the_command_line_writes_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    game = 'types = "2, 3,4,8"\nbackend_settings = { encode = "rtn" }'
    made, _ = released(checkpoints["llama"], tmp_path, game, 'budget = "3.2 MiB"')
    out = tmp_path / "out"
    found = LadderProfile.load(out / "records" / "checkpoint" / "sensitivity.json")
    assert found.types == (2, 3, 4, 8) and len(made.files) == 2
    tight, roomy = ([t for file in made.files for t in file.takers if t.device == name]
                    for name in ("raspberry-pi-5", "laptop-16gb"))  # fmt: skip
    assert len(tight) == 1 and len(roomy) == 2 and made.files[0].file_bytes <= 3.2 * 2**20
    assert tight[0].predicted.kl_divergence is not None and tight[0].measured.kl_divergence > 0
    assert set(Allocation.load(out / roomy[0].records / "allocation.json").player_bits) == {8}


def test_rounds_at_the_budgets_of_all_cells(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    game = 'players = "sublayers"\npermutations = 3\nbackend_settings = { encode = "rtn" }'
    made, _ = released(checkpoints["qwen3"], tmp_path, game)
    found = SensitivityProfile.load(tmp_path / "out" / "records" / "checkpoint" / "sensitivity.json")
    assert found.design.rounds is not None and len(found.design.rounds.budgets) == 1, "what fits at 4 bit needs none"
    allocation = Allocation.load(tmp_path / "out" / made.files[0].takers[0].records / "allocation.json")
    assert allocation.evidence is not None and allocation.evidence.is_measured


def test_what_another_backend_costs_is_told_for_every_device(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("hqq", reason="the backend is not installed")
    game = 'method = "impq"\npermutations = 2\nbackend = "hqq"'
    made, said = released(checkpoints["llama"], tmp_path, game + '\n[gates]\nmax_memory = "4 GiB"')
    out = tmp_path / "out"
    listed = {output.path for output in made.outputs}
    for file in made.files:
        for taker in file.takers:
            path = f"{taker.records}/backend-losses.json"
            losses = BackendLosses.load(out / path)
            assert path in listed and losses.allocation_sha256 == taker.allocation_sha256
            assert "## hqq against the K-quants that ship" in (out / taker.records / "report.md").read_text()
            warned = any(s.startswith(f"For {taker.device} at {taker.context_tokens}") and "hqq" in s for s in said)
            assert warned == losses.matters
    written = {path: path.stat().st_mtime_ns for path in out.rglob("backend-losses.json")}
    order = load_order(tmp_path / "release.toml")
    assert release(order, out=out, base=tmp_path) == made
    assert {path: path.stat().st_mtime_ns for path in written} == written, "and is not measured twice"


def test_types_that_mean_nothing_name_the_game(tmp_path: Path) -> None:
    order = load_order(ordered(tmp_path, 'types = "2;4"'))
    with pytest.raises(RecordError, match=r"\[game\]: types is '2;4'"):
        foresee(order, out=tmp_path / "out", base=tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from impq_edge.releases.dry import foresee
from impq_edge.releases.order import load_order
from impq_edge.releases.release import release
from impq_edge.releases.verify import verify
path, out = Path(sys.argv[1]), Path(sys.argv[2])
order = load_order(path)
foreseen = foresee(order, out=out, base=path.parent)
assert not out.exists()
made = release(order, out=out, base=path.parent, source=path)
assert set(foreseen.evaluations) == {made.models[0].name}
again = verify(out, rebuild=True, base=path.parent)
assert again.passed and again.rebuilt, again.findings
"""


def test_a_model_from_the_hub_is_pinned_to_its_commit(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="hub ids need the workstation install")
    game = 'method = "impq"\npermutations = 2\nbackend_settings = { encode = "rtn" }'
    path, out = ordered(tmp_path / "order", game, model="org/Small-Llama"), tmp_path / "out"
    with serving() as hub:
        hub.models["org/Small-Llama"] = {
            file.name: file.read_bytes() for file in checkpoints["llama"].iterdir() if file.is_file()
        } | {"README.md": b"---\nlicense: mit\n---\n"}
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(out)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert hub.fetched.count("model.safetensors") <= 2, "shapes for the dry run, and the weights once"
    made = Manifest.load(out / "manifest.json")
    (model,) = made.models
    assert (model.name, model.model, model.commit) == ("Small-Llama", "org/Small-Llama", COMMIT)
    assert model.base_models == ("org/Small-Llama",) and model.license == "mit"
    assert all(file.file.startswith("Small-Llama-") for file in made.files)
    assert "base_model: org/Small-Llama\n" in (out / "README.md").read_text()
