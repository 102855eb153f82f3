"""Releases whose devices are measured over ssh: a real sshd on the loopback interface, and one that is not there."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import Sshd

from impq_edge.errors import RecordError
from impq_edge.releases.manifest import Manifest
from impq_edge.releases.order import Gates, load_order
from impq_edge.releases.release import release
from impq_edge.releases.trial import Reach
from impq_edge.releases.verify import verify
from impq_edge.validation.report import ValidationReport

ROOT = Path(__file__).parents[2]
ORDER = """
name = "small"
models = ["checkpoint"]
contexts = [256]
encode = "rtn"
windows = 1

[game]
method = "impq"
permutations = 2
tokens = 512

[gates]
max_memory = "4 GiB"
min_tokens_per_second = 0.001

[[devices]]
device = "mine.toml"
on = "board"

[[devices]]
device = "laptop-16gb"
"""


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    shutil.copytree(checkpoints["qwen3"], folder / "checkpoint")
    shipped = (ROOT / "devices" / "laptop-16gb.toml").read_text()
    (folder / "mine.toml").write_text(shipped.replace('"laptop-16gb"', '"mine"'))
    (folder / "release.toml").write_text(ORDER)
    return folder


def test_a_device_over_ssh_is_measured_there_and_one_out_of_reach_loses_nothing(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    with Sshd(tmp_path / "board", PYTHONPATH=ROOT, OMP_NUM_THREADS=1) as board:
        reach = Reach(ssh=board.ssh, python=sys.executable)
        board.process.kill()
        board.process.wait()
        command = [
            sys.executable, "-m", "impq_edge.cli", "release", str(base / "release.toml"), "-o", str(out),
            "--ssh", board.ssh, "--remote-python", sys.executable,
        ]  # fmt: skip
        gone = subprocess.run(command, capture_output=True, text=True, check=False)
        assert gone.returncode == 3 and gone.stderr.count("Error: ") == 1 and "Traceback" not in gone.stderr
        assert "mine was not measured: " in gone.stderr and "the same command goes on" in gone.stderr
    built = {path.name: path.stat().st_mtime_ns for path in out.glob("*.gguf")}
    reports = list(out.rglob("validation.json"))
    assert built and len(reports) == 1, "what needs no other machine is done first"
    with Sshd(tmp_path / "board", PYTHONPATH=ROOT, OMP_NUM_THREADS=1) as board:
        reach = dataclasses.replace(reach, ssh=board.ssh)
        order = load_order(base / "release.toml")
        said: list[str] = []
        made = release(order, out=out, base=base, source=base / "release.toml", reach=reach, say=said.append)
        again: list[str] = []
        assert release(order, out=out, base=base, source=base / "release.toml", reach=reach, say=again.append) == made
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.gguf")} == built
    assert any("board: Linux on" in sentence for sentence in said)
    assert not any("board: Linux on" in sentence for sentence in again), "and is not measured twice"
    assert made.passed and verify(out).passed
    _tells_where(made, out)


def _tells_where(made: Manifest, out: Path) -> None:
    there, here = sorted((t for file in made.files for t in file.takers), key=lambda t: t.measured.over_ssh)[::-1]
    assert (there.device, there.measured.on_device, there.measured.over_ssh) == ("mine", True, True)
    assert not here.measured.on_device and not here.measured.over_ssh
    report = ValidationReport.load(out / there.records / "validation.json")
    gates = {gate.name: gate for gate in there.gates}
    speed, memory = gates["min_tokens_per_second"], gates["max_memory"]
    assert speed.value == report.generation_tok_per_s and speed.detail == "measured on the device, over ssh"
    assert memory.value == report.peak_rss_bytes and "measured on the device, over ssh, " in memory.detail
    assert "was not reached" in {gate.name: gate for gate in here.gates}["min_tokens_per_second"].detail
    card = (out / "README.md").read_text()
    assert (
        f"{report.generation_tok_per_s:,.1f} measured over ssh" in card and "were measured on the device itself" in card
    )
    told = (out / there.records / "report.md").read_text()
    assert "Speeds are of the device itself, which was reached over ssh" in told
    assert "board" not in card + told, "nobody's machines are published where people read"


def test_gates_of_a_device_over_ssh_can_fail(base: Path, tmp_path: Path) -> None:
    order = load_order(base / "release.toml")
    devices = (dataclasses.replace(order.devices[0], gates=Gates(min_tokens_per_second=1e9)),)
    with Sshd(tmp_path / "board", PYTHONPATH=ROOT, OMP_NUM_THREADS=1) as board:
        reach = Reach(ssh=board.ssh, python=sys.executable)
        made = release(dataclasses.replace(order, devices=devices), out=tmp_path / "out", base=base, reach=reach)
    assert not made.passed
    (gate,) = (gate for gate in made.files[0].takers[0].gates if gate.status == "failed")
    assert gate.name == "min_tokens_per_second" and gate.detail.startswith("measured on the device")


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", "user@", "$(reboot)"])
def test_what_is_no_host_never_reaches_ssh(base: Path, tmp_path: Path, host: str) -> None:
    path = tmp_path / "release.toml"
    path.write_text(ORDER.replace('on = "board"', f"on = {host!r}"))
    with pytest.raises(RecordError, match="no destination for ssh; write user@host"):
        load_order(path)
