import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_hub_upload import TOKEN, serving_uploads

import impq_edge
from impq_edge import stages
from impq_edge.conversion.artifact import Artifact
from impq_edge.errors import AllocationError, RecordError, ReleaseError
from impq_edge.impq.allocation import Allocation
from impq_edge.lock import LOCK_FILE, sole_use
from impq_edge.releases.dry import foresee
from impq_edge.releases.gates import Gate
from impq_edge.releases.manifest import Manifest, Output, is_plain_path
from impq_edge.releases.order import load_order
from impq_edge.releases.push import push
from impq_edge.releases.release import release
from impq_edge.releases.verify import verify
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile

CARD = "---\nlicense: apache-2.0\nbase_model: some-org/Some-Base\nlanguage: [en, de]\n---\n# A model\n"
ORDER = """
name = "small"
encode = "rtn"
windows = 2
contexts = [256]

[[models]]
model = "checkpoint"
name = "Small"

[game]
method = "impq"
permutations = 2
tokens = 1024

[gates]
max_perplexity_ratio = 1e9
max_memory = "4 GiB"

[[devices]]
device = "raspberry-pi-5"
average_bits = 3
gates = { min_tokens_per_second = 1 }

[[devices]]
device = "raspberry-pi-4-4gb"
average_bits = "3"

[[devices]]
device = "laptop-16gb"
"""


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with release.toml and the model it names."""
    folder = tmp_path_factory.mktemp("order")
    shutil.copytree(checkpoints["qwen3"], folder / "checkpoint")
    (folder / "checkpoint" / "README.md").write_text(CARD)
    (folder / "release.toml").write_text(ORDER)
    return folder


def make(base: Path, out: Path, **changes: object) -> Manifest:
    order = dataclasses.replace(load_order(base / "release.toml"), **changes)
    return release(order, out=out, base=base, source=base / "release.toml")


@pytest.fixture(scope="module")
def released(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    out = tmp_path_factory.mktemp("release") / "small"
    return make(base, out), out


@pytest.fixture
def copy(released: tuple[Manifest, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(released[1], tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_sensitivity_run_serves_all_and_equal_allocations_are_one_file(released: tuple[Manifest, Path]) -> None:
    made, out = released
    profiles = list(out.rglob("sensitivity.json"))
    assert len(profiles) == 1 and made.models[0].sensitivity_sha256 == SensitivityProfile.load(profiles[0]).identity()
    takers = {file.file: [taker.device for taker in file.takers] for file in made.files}
    assert list(takers.values()) == [["raspberry-pi-5", "raspberry-pi-4-4gb"], ["laptop-16gb"]]
    for file in made.files:
        assert re.fullmatch(r"Small-(raspberry-pi-5|laptop-16gb)-IMPQ-\d\.\d\dbpw\.gguf", file.file)
        artifact = Artifact.load(out / f"{file.file}.json")
        assert artifact.is_intact(out) and artifact.sha256 == file.sha256
        for taker in file.takers:
            allocation = Allocation.load(out / taker.records / "allocation.json")
            assert allocation.identity() == taker.allocation_sha256 and allocation.device == taker.device
            assert allocation.tensor_types == artifact.tensor_types
            assert taker.predicted.file_bytes == taker.measured.file_bytes == artifact.file_bytes
            assert taker.measured.kl_divergence > 0 and not taker.measured.on_device


def test_manifest_and_sums_list_every_file_and_nothing_else_is_left(released: tuple[Manifest, Path]) -> None:
    made, out = released
    assert Manifest.load(out / "manifest.json") == made
    assert {output.path for output in made.outputs} | {"manifest.json", "SHA256SUMS"} == set(contents(out))
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert {entry.kind for entry in made.inputs} == {"model", "device", "calibration text", "evaluation text"}
    assert made.versions["torch"] and made.models[0].seed == 0


def test_card_carries_the_licence_over_and_tells_who_takes_which(released: tuple[Manifest, Path]) -> None:
    made, out = released
    _, head, body = (out / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["license"] == "apache-2.0" and told["base_model"] == "some-org/Some-Base"
    assert told["base_model_relation"] == "quantized" and told["language"] == ["en", "de"] and "gguf" in told["tags"]
    for file in made.files:
        for taker in file.takers:
            assert f"(`{taker.device}`) | 256 | {file.file} |" in body and taker.run in body
            assert f"llama-cli -m {file.file} -c 256 " in taker.run
    assert "predicted" in body and "was not reached" in body


def test_a_finished_release_is_not_made_again(released: tuple[Manifest, Path], base: Path) -> None:
    made, out = released
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*.gguf")} | {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*ation.json")
    }
    kept = contents(out)
    assert make(base, out) == made and contents(out) == kept
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_kill_at_any_step_and_resume_gives_the_same_files(
    released: tuple[Manifest, Path], base: Path, tmp_path: Path
) -> None:
    made, reference = released
    out = tmp_path / "small"
    command = [sys.executable, "-m", "impq_edge.cli", "release", str(base / "release.toml"), "-o", str(out)]
    first = made.files[0].file
    signs = (first, "records/Small/uniform-4bit.gguf.quality.json")
    for sign in signs:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (out / sign).exists():
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -9 and (out / LOCK_FILE).exists()
    make(base, out)
    ours, theirs = contents(out), contents(reference)
    assert ours.keys() == theirs.keys()
    measured = {"manifest.json", "SHA256SUMS", "README.md", "validation.json", "report.md", "report.html"}
    for name in theirs:
        assert Path(name).name in measured or ours[name] == theirs[name], f"{name} holds no speeds"
    assert verify(out).passed


def test_what_is_tampered_with_missing_or_extra_is_named(copy: Path) -> None:
    assert verify(copy).passed
    mix = next(copy.glob("*pi-5*.gguf"))
    data = bytearray(mix.read_bytes())
    data[-1] ^= 1
    mix.write_bytes(data)
    (copy / "README.md").unlink()
    (copy / "records" / "more.txt").write_text("?")
    (copy / "elsewhere").symlink_to("/etc")
    found = {(finding.kind, finding.path) for finding in verify(copy).findings}
    assert found == {
        ("tampered", mix.name), ("missing", "README.md"), ("extra", "records/more.txt"), ("extra", "elsewhere"),
    }  # fmt: skip


def test_a_manifest_rewritten_to_fit_is_told_from_the_sums(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(
        path.read_text().replace('"command": "impq-edge release release.toml"', '"command": "something else"')
    )
    assert [(f.kind, f.path) for f in verify(copy).findings] == [("tampered", "manifest.json")]
    (copy / "SHA256SUMS").unlink()
    assert [(f.kind, f.path) for f in verify(copy).findings] == [("missing", "SHA256SUMS")]
    path.unlink()
    with pytest.raises(ReleaseError, match="no manifest"):
        verify(copy)


def test_rebuilding_gives_the_same_bytes_and_tells_where_it_does_not(
    released: tuple[Manifest, Path], base: Path, copy: Path, tmp_path: Path
) -> None:
    again = verify(released[1], rebuild=True, base=base)
    assert again.passed and again.rebuilt == 1 + 2 * 2 + 3  # the profile; files and their records; allocations
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((other / "checkpoint" / "config.json").read_text())
    (other / "checkpoint" / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0e4}))
    told = verify(copy, rebuild=True, base=other)
    assert ("input changed", "Small") in {(f.kind, f.path) for f in told.findings}
    assert {f.path for f in told.findings if f.path.endswith(".gguf")} == {p.name for p in copy.glob("*.gguf")}


def test_no_manifest_leads_out_of_its_directory(copy: Path) -> None:
    for path in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", ".", "", "a\nb", "a//b", "./a"):
        assert not is_plain_path(path)
        with pytest.raises(ValueError, match="no path inside"):
            Output(path, 1, "")
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"path": "README.md"', '"path": "../README.md"'))
    with pytest.raises(RecordError, match="no path inside"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('name = "small"', "name = '../up'"),
        ('name = "Small"', 'name = "a/b"'),
        ("permutations = 2", "permutationen = 2"),
        ("windows = 2", "windows = 0"),
        ("max_memory", "max_memories"),
        ('device = "laptop-16gb"', 'device = "raspberry-pi-5"'),
        ('device = "laptop-16gb"', 'device = "no-such-board"'),
        ("average_bits = 3", 'average_bits = "many"'),
        ("average_bits = 3", "budget = 1000"),
    ],
)
def test_orders_that_mean_nothing_leave_nothing_behind(base: Path, tmp_path: Path, change: str, message: str) -> None:
    folder, out = tmp_path / "order", tmp_path / "out"
    shutil.copytree(base, folder)
    (folder / "release.toml").write_text(ORDER.replace(change, message, 1))
    command = [sys.executable, "-m", "impq_edge.cli", "release", str(folder / "release.toml"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stderr.count("Error: ") == 1 and not out.exists(), done.stderr
    assert "Traceback" not in done.stderr


def test_a_gate_that_fails_names_the_file_and_fails_the_release(
    released: tuple[Manifest, Path], base: Path, copy: Path
) -> None:
    made, _ = released
    strict = dataclasses.replace(made.recipe.gates, max_perplexity_ratio=1e-6, reference="4bit")
    failed = make(base, copy, gates=strict)
    assert not failed.passed and all(not taker.passed for file in failed.files for taker in file.takers)
    gate = next(g for g in failed.files[0].takers[0].gates if g.name == "max_perplexity_ratio")
    measured = failed.files[0].takers[0].measured
    assert gate.status == "failed" and gate.value == measured.perplexity_ratio_to_4bit and "4 bit" in gate.detail
    assert verify(copy).passed, "its papers are those of what was made"
    with pytest.raises(ReleaseError, match=f"{failed.files[0].file} fails max_perplexity_ratio.*nothing was pushed"):
        push(copy, "me/small")


def test_speeds_that_were_not_measured_on_the_device_are_predictions(released: tuple[Manifest, Path]) -> None:
    gates: list[Gate] = [g for t in released[0].files[0].takers if t.device == "raspberry-pi-5" for g in t.gates]
    speed = next(gate for gate in gates if gate.name == "min_tokens_per_second")
    predicted = released[0].files[0].takers[0].predicted.speeds
    assert predicted is not None and predicted.generation is not None
    assert speed.value == predicted.generation.likely_tok_per_s and "was not reached" in speed.detail


def test_a_smaller_matrix_removes_what_it_no_longer_has(base: Path, copy: Path) -> None:
    order = load_order(base / "release.toml")
    (copy / "mine.txt").write_text("not of the release")
    made = make(base, copy, devices=order.devices[:1])
    assert [len(file.takers) for file in made.files] == [1] and len(list(copy.glob("*.gguf"))) == 1
    assert [(f.kind, f.path) for f in verify(copy).findings] == [("extra", "mine.txt")]


def test_a_dry_run_writes_nothing_and_its_sizes_hold(
    released: tuple[Manifest, Path], base: Path, tmp_path: Path
) -> None:
    made, out = released
    order = load_order(base / "release.toml")
    found = foresee(order, out=tmp_path / "none", base=base)
    assert not (tmp_path / "none").exists() and found.evaluations == {"Small": 2 * 2 + 2}
    assert [cell.is_decided for cell in found.cells] == [False, False, True]
    assert set(found.files.values()) == {file.file_bytes for file in made.files}  # blocks are equally large here
    known = foresee(order, out=out, base=base)
    assert known.files == {file.file: file.file_bytes for file in made.files} and not known.evaluations["Small"]
    with pytest.raises(AllocationError, match="--budget"):
        tight = dataclasses.replace(order.devices[0], budget=1000)
        foresee(dataclasses.replace(order, devices=(tight,)), out=out, base=base)


def test_a_directory_in_use_is_refused_and_a_dead_one_is_taken_over(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    hold = f"import time; from pathlib import Path; from impq_edge.lock import sole_use\n\
with sole_use(Path({str(out)!r})):\n print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(RecordError, match=f"in use by process {child.pid};"):
        make(base, out)
    child.kill()
    child.wait()
    assert (out / LOCK_FILE).exists()
    with sole_use(out):
        assert (out / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        with pytest.raises(RecordError, match=f"in use by process {os.getpid()};"):
            impq_edge.build("laptop-16gb", out=out)
    assert not (out / LOCK_FILE).exists()
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (out / LOCK_FILE).symlink_to(victim)
    with pytest.raises(RecordError, match="cannot be written"), sole_use(out):
        pass
    assert victim.read_text() == "kept"


def run_push(hub: str, directory: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Push from a process of its own: the hub's library reads its environment once."""
    code = (
        "import sys; from pathlib import Path; from impq_edge.releases.push import push; "
        "print(push(Path(sys.argv[1]), 'me/small', private=True))"
    )
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_push_is_one_commit_of_exactly_the_release(released: tuple[Manifest, Path], tmp_path: Path) -> None:
    made, out = released
    with serving_uploads() as hub:
        address = f"http://127.0.0.1:{hub.server_port}"
        hub.refused_puts = 1
        broken = run_push(address, out, tmp_path)
        assert broken.returncode != 0 and "the same command again" in broken.stderr and not hub.models["me/small"]
        assert not hub.refused_puts
        done = run_push(address, out, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{address}/me/small/commit/{'a' * 40}"
        assert hub.models["me/small"] == contents(out) and hub.commits == ["Release small"]
        assert hub.private == {"me/small": True} and set(hub.cards) == {(out / "README.md").read_text()}
        assert sorted(hub.sent) == sorted(file.sha256 for file in made.files), "nothing is sent twice"
        hub.forbidden = True
        refused = run_push(address, out, tmp_path)
        assert "status 403" in refused.stderr


def test_nothing_that_was_changed_is_pushed(copy: Path) -> None:
    (copy / "README.md").write_text("changed")
    with pytest.raises(ReleaseError, match=r"README\.md is tampered.*nothing was pushed"):
        push(copy, "me/small")
    with pytest.raises(ReleaseError, match="write it like owner/name"):
        push(copy, "small")


def test_rounds_are_played_at_the_budgets_of_all_devices(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    game = GameOptions(
        method="rounds", tokens=512, players="sublayers", permutations=6, backend_settings={"encode": "rtn"}
    )
    requests = [
        stages.allocation_request(
            device, context_tokens=256, kv_type=None, budget_bytes=None, average_bits=bits, outer_type="q6_k"
        )
        for device, bits in (
            ("raspberry-pi-5", 3),
            ("laptop-16gb", 2.5),
            ("raspberry-pi-4-4gb", 3),
            ("laptop-8gb", None),
        )
    ]
    found = stages.profile(str(checkpoints["qwen3"]), out=tmp_path / "p.json", game=game, request=requests)
    rounds = found.design.rounds
    assert rounds is not None and len(rounds.budgets) == 2, "equal ones once, and none where all fits at 4 bit"
    for request in requests:
        bits = request.average_bits
        made = stages.allocate(found, device=request.device, context_tokens=256, average_bits=bits)
        assert made.everything_fits or (made.evidence is not None and made.evidence.is_measured)
