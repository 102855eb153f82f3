"""Validation on another machine: a real sshd on the loopback interface, real connections cut, a real disk filled."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from sshd import Sshd

from impq_edge.data import data_path
from impq_edge.errors import DeviceError, ValidationError
from impq_edge.validation.remote import agent, run
from impq_edge.validation.remote.agent import PART_BYTES, content_sha256
from impq_edge.validation.remote.environment import fits, wanted_environment
from impq_edge.validation.remote.files import copy_items, hash_items
from impq_edge.validation.remote.host import Host, ask_host
from impq_edge.validation.remote.run import validate_on
from impq_edge.validation.remote.ssh import Connection, ConnectionLostError, check_host, plain
from impq_edge.validation.remote.wheel import PACKAGE, build_wheel
from impq_edge.validation.report import ValidationReport

ROOT = Path(__file__).parents[2]
QUICK = {"windows": 1, "generated_tokens": 4, "repetitions": 1, "context_tokens": 256, "threads": 1}
SLOW = QUICK | {"context_tokens": 4096, "fill_s": 300.0, "repetitions": 200}  # far longer than any test waits
QUIET = (lambda *_: None, lambda _: None)
ENVIRONMENT = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A machine whose Python has this very checkout, so that nothing need be installed."""
    with Sshd(tmp_path_factory.mktemp("board"), **ENVIRONMENT) as server:
        yield server


def go(board: Sshd, path: Path, **options: Any) -> ValidationReport:
    given: dict[str, Any] = {"ssh": board.ssh, "python": sys.executable, "options": QUICK}
    return validate_on("board", path, **given | options)


def copy(board: Sshd, path: Path, progress: Any = QUIET[0]) -> Path:
    """Copy one file there and return where it lies."""
    _, items = hash_items("file", [path], QUIET[0])
    with Connection("board", board.ssh) as connection:
        host = ask_host(connection, sys.executable)
        copy_items(connection, host.python, items, progress, QUIET[1])
    return board.store / "objects" / items[0].sha256


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB that compress to nothing less."""
    path = tmp_path_factory.mktemp("big") / "big"
    path.write_bytes(np.random.default_rng(0).bytes(16 * PART_BYTES + 12345))
    return path


# ------------------------------------------------------------------------------------------------ the whole way


def test_the_whole_way_by_the_command_line_under_a_hostile_name(board: Sshd, demo_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "-o 'x' \"y\" $(touch hacked) naïve;`touch hacked` \\.gguf"
    shutil.copy(demo_gguf, path)
    command = [
        sys.executable, "-m", "impq_edge.cli", "validate", "--windows", "1", "--context", "256", "--json",
        "--out", "report.json", "--on", "board", "--ssh", board.ssh, "--remote-python", sys.executable, "--", path.name,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "board: Linux on" in done.stderr and "Copying" in done.stderr
    report = json.loads(done.stdout)
    assert report["file"] == path.name
    assert report["sha256"] == hashlib.sha256(demo_gguf.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert not list(tmp_path.rglob("hacked")) and not list(board.folder.rglob("hacked"))
    assert 10 < report["perplexity"] < 200
    assert not list((board.store / "jobs").iterdir())


def test_pieces_reference_text_and_device_go_along_and_nothing_goes_twice(
    board: Sshd, demo: Path, demo_gguf: Path, tmp_path: Path
) -> None:
    import impq_edge
    from impq_edge.conversion.encoder import EncodeOptions

    impq_edge.convert(
        str(demo), type="q8_0", out=tmp_path / "split.gguf", encode=EncodeOptions("rtn"), shard_bytes=8 << 20
    )
    first, *others = sorted(tmp_path.glob("split-*.gguf"))
    assert others
    text, device = tmp_path / "my text.txt", tmp_path / "mine.toml"
    text.write_bytes(data_path("demo", "evaluation.txt").read_bytes()[5000:])
    device.write_text(data_path("devices", "raspberry-pi-5.toml").read_text().replace("raspberry-pi-5", "mine"))
    said: list[str] = []
    options: dict[str, Any] = {"text": text, "device": str(device), "reference": demo_gguf, "say": said.append}
    report = go(board, first, **options)
    assert (report.file, report.text, report.device) == (first.name, text.name, "mine")
    assert report.reference == demo_gguf.name
    assert report.divergence is not None and report.divergence.same_top > 0.9
    assert any(others[0].name in sentence for sentence in said)

    before = {path.name: path.stat().st_mtime_ns for path in (board.store / "objects").iterdir()}
    said.clear()
    again = go(board, first, **options | {"reference": None})
    assert again.sha256 == report.sha256 and again.window_nlls == pytest.approx(report.window_nlls, rel=1e-3)
    assert not any("Copying" in sentence for sentence in said)
    assert {path.name: path.stat().st_mtime_ns for path in (board.store / "objects").iterdir()} == before


def test_a_noisy_login_does_not_matter(demo_gguf: Path, tmp_path: Path) -> None:
    greet = """ForceCommand sh -c 'echo Welcome; echo "{"; eval "$SSH_ORIGINAL_COMMAND"'"""
    with Sshd(tmp_path / "noisy", lines=(greet,), **ENVIRONMENT) as noisy:
        assert copy(noisy, demo_gguf).read_bytes() == demo_gguf.read_bytes()


def test_a_sentence_from_there_is_a_sentence_here(board: Sshd, demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(ValidationError, match=r"On board: .*shorter than one window"):
        go(board, demo_gguf, text=tmp_path / "short.txt")
    assert not list((board.store / "jobs").iterdir())  # so that it is measured anew, not remembered
    with pytest.raises(DeviceError, match="No device is called 'nonesuch'"):
        go(board, demo_gguf, device="nonesuch")


# -------------------------------------------------------------------------------------------- broken connections


def test_a_copy_cut_half_way_goes_on_where_it_stopped(board: Sshd, big: Path) -> None:
    def cut(phase: str, done: int, total: int) -> None:
        if phase == "copy" and done >= 4 * PART_BYTES:
            board.drop()

    with pytest.raises(ConnectionLostError, match=r"lost with [\d.]+ of 64\.0 MiB of big copied; run the same command"):
        copy(board, big, cut)
    (part,) = (board.store / "objects").glob("*.part")
    assert 4 * PART_BYTES <= part.stat().st_size < big.stat().st_size

    whole = part.stat().st_size // PART_BYTES
    damaged = bytearray(part.read_bytes())
    damaged[3 * PART_BYTES + 7] ^= 1  # the fourth part: the first three are still good
    part.write_bytes(damaged)
    heard: list[tuple[str, int, int]] = []
    there = copy(board, big, lambda *step: heard.append(step))
    assert there.read_bytes() == big.read_bytes() and not part.exists()
    assert sum(phase == "check copy" for phase, _, _ in heard) == whole
    assert next(done for phase, done, _ in heard if phase == "copy") == 4 * PART_BYTES

    heard.clear()
    copy(board, big, lambda *step: heard.append(step))
    assert not heard
    there.unlink()


def test_a_measurement_outlives_its_connection_and_is_found_again(board: Sshd, demo_gguf: Path) -> None:
    def cut(phase: str, _done: int, _total: int) -> None:
        if phase == "perplexity":
            board.drop()

    with pytest.raises(ConnectionLostError, match="lost; run the same command again, which goes on where it stopped"):
        go(board, demo_gguf, progress=cut)
    (job,) = (board.store / "jobs").iterdir()
    started = (job / "pid").read_text()
    said: list[str] = []
    report = go(board, demo_gguf, say=said.append, clean="files")
    assert report.passed
    assert board.store.is_dir() and not (board.store / "objects" / report.sha256).exists()
    assert any("Going on with" in sentence or "came to its end" in sentence for sentence in said), said
    assert started.isdecimal() and not job.exists()


def test_a_job_that_the_system_kills_is_a_sentence(board: Sshd, demo_gguf: Path) -> None:
    def kill(phase: str, _done: int, _total: int) -> None:
        if phase == "perplexity":
            (job,) = (board.store / "jobs").iterdir()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((job / "pid").read_text()), signal.SIGKILL)

    with pytest.raises(ValidationError, match=r"On board: the process there was ended from outside .*; run it again"):
        go(board, demo_gguf, progress=kill)
    assert not list((board.store / "jobs").iterdir())


def test_ctrl_c_ends_the_job_there(board: Sshd, demo_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from impq_edge.validation.remote.run import validate_on;"
        f"validate_on('board', Path(sys.argv[2]), ssh=sys.argv[3], python=sys.executable, options={SLOW!r},"
        "progress=lambda phase, done, total: phase == 'speed' and print(phase, flush=True))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(demo_gguf), board.ssh]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stdout
        assert running.stdout.readline() == "speed\n", running.stderr and running.stderr.read()
        assert processes_of(board)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: everything in the foreground hears it
        running.communicate(timeout=300)
    assert running.returncode != 0
    assert not processes_of(board)
    assert not list((board.store / "jobs").iterdir())


def processes_of(board: Sshd) -> list[str]:
    """Return the command lines of what runs out of the other machine's cache."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(board.cache).encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return [line for line in found if "sshd" not in line]


def test_a_clock_that_jumps_takes_no_result_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board without a battery for its clock ended a job "in 1970"; now it knows the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jobs = agent.cache() / "jobs"
    for name, time_s in (("older", 1000), ("newest", 2000)):
        (jobs / name).mkdir()
        os.utime(jobs / name, (time_s, time_s))
    agent.prepare({"objects": [], "content": "another", "wheels": []})
    assert [job.name for job in jobs.iterdir()] == ["newest"]


def test_two_copies_of_one_file_wait_for_each_other(board: Sshd, big: Path) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            copy(board, big)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    (there,) = (path for path in (board.store / "objects").iterdir() if path.stat().st_size == big.stat().st_size)
    assert there.read_bytes() == big.read_bytes()
    there.unlink()


# --------------------------------------------------------------------------------------- machines that cannot serve


@pytest.mark.parametrize(
    "host",
    [
        "-oProxyCommand=touch hacked", "user@-oProxyCommand=x", "", "a b", "a;b", "$(id)", "a`id`", "a|b", "a\nb", "@",
        "user@", "naïve", "-", "x'y", "a@-b@c", "ssh://-x", "ssh://",
    ],
)  # fmt: skip
def test_a_host_that_is_no_host_never_reaches_ssh(host: str, demo_gguf: Path) -> None:
    with pytest.raises(ValidationError, match="is no destination for ssh") as caught:
        validate_on(host, demo_gguf)
    assert "\n" not in str(caught.value)


def test_hosts_as_people_write_them() -> None:
    for host in ("pi", "pi@raspberrypi.local", "pi@192.168.1.7", "a.b@host", "root@fe80::1%eth0", "ssh://pi@host:2222",
                 "ssh://[::1]:22", "me@corp.example@jump"):  # fmt: skip
        assert check_host(host) == host


def test_a_wrong_key_a_closed_port_and_a_strange_host_key_say_what_to_do(
    board: Sshd, demo_gguf: Path, tmp_path: Path
) -> None:
    def configured(old: str, new: str) -> str:
        text = (board.folder / "ssh_config").read_text()
        (tmp_path / "config").write_text(text.replace(old, new))
        return f"ssh -F {tmp_path}/config"

    for old, new, said in (
        ("user_key", "other_key", r"board cannot be reached: it takes none of your keys.*ssh-copy-id"),
        (f"Port {board.port}", "Port 1", "nothing listens for ssh there"),
        ("known_hosts", "none_known", "connect once by hand with ssh and check the key"),
        ("127.0.0.1", "no-such-host.invalid", "no such host is known"),
    ):
        with pytest.raises(ValidationError, match=said):
            go(board, demo_gguf, ssh=configured(old, new))
    with pytest.raises(ValidationError, match="'no-such-ssh' is not installed"):
        go(board, demo_gguf, ssh="no-such-ssh")
    with pytest.raises(ValidationError, match=r"--ssh .* cannot be read"):
        go(board, demo_gguf, ssh="ssh 'open")


def test_a_host_without_python_or_with_too_old_a_one(demo_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("sh", "uname"):
        (path / tool).symlink_to(str(shutil.which(tool)))
    # Not by the environment alone: the user's own start-up files may add to the path.
    bare_path = f"""ForceCommand PATH={path}; export PATH; eval "$SSH_ORIGINAL_COMMAND\""""
    with Sshd(tmp_path / "bare", lines=(bare_path,)) as bare:
        with pytest.raises(ValidationError, match=r"board has no Python on its path; install Python 3\.11 or newer"):
            validate_on("board", demo_gguf, ssh=bare.ssh)
        with pytest.raises(ValidationError, match=r"board has no '~/my python' that runs; .*--remote-python PATH"):
            validate_on("board", demo_gguf, ssh=bare.ssh, python="~/my python")
        (path / "python3").write_text("#!/bin/sh\necho 3.9\n")
        (path / "python3").chmod(0o755)
        with pytest.raises(ValidationError, match=r"board has Python 3\.9 \(.*/python3\), and 3\.11 is the least"):
            validate_on("board", demo_gguf, ssh=bare.ssh)
        (path / "python3.12").symlink_to(sys.executable)  # beside the old one
        with Connection("board", bare.ssh) as connection:
            assert ask_host(connection).python == str(path / "python3.12")


def test_a_file_larger_than_the_memory_is_refused_before_anything_is_hashed(
    board: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Connection("board", board.ssh) as connection:
        memory = ask_host(connection, sys.executable).memory_bytes
    if memory is None:
        pytest.skip("this system does not tell its memory")
    path = tmp_path / "huge.gguf"
    rows = memory // 4096 + 1024
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor_info("token_embd.weight", (rows, 1024), np.dtype(np.float32), rows * 4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + rows * 4096 + 4096)  # a hole: it takes no disk
    monkeypatch.setattr(run, "hash_items", lambda *_: pytest.fail("it is being read"))
    with pytest.raises(ValidationError, match=r"huge\.gguf needs at least [\d.]+ GiB .* and board has [\d.]+;"):
        go(board, path)


def test_a_disk_that_fills_up_half_way_is_a_sentence_and_no_loss(big: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited python"
    limited.write_text(f'#!/bin/bash\nulimit -f $((16 * 1024))\nexec {sys.executable} "$@"\n')  # KiB
    limited.chmod(0o755)
    _, items = hash_items("file", [big], QUIET[0])
    with Sshd(tmp_path / "full") as full, Connection("board", full.ssh) as connection:
        with pytest.raises(ValidationError, match=r"On board: the disk that holds .* is full; free some space there"):
            copy_items(connection, str(limited), items, *QUIET)
        (part,) = (full.store / "objects").glob("*.part")
        assert part.stat().st_size == 16 << 20
        copy_items(connection, sys.executable, items, *QUIET)
        assert (full.store / "objects" / items[0].sha256).read_bytes() == big.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_too_small_is_refused_before_the_copy(demo_gguf: Path, tmp_path: Path) -> None:
    with Sshd(tmp_path / "small", **ENVIRONMENT) as small:
        small.cache.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small.cache], check=False)
        if mounted.returncode != 0:
            pytest.skip("nothing may be mounted here")
        try:
            with pytest.raises(ValidationError, match=r"9 MiB are to be written to board:.*, and 4 are free"):
                go(small, demo_gguf)
            assert not list((small.store / "objects").iterdir())
            with pytest.raises(ValidationError, match=r"On board: the disk that holds .* is full"):
                copy(small, demo_gguf)
        finally:
            subprocess.run(["umount", small.cache], check=True)


def test_what_another_machine_says_cannot_move_the_cursor() -> None:
    assert plain("\x1b[2Jall\ngone\x07") == "[2Jall gone"


# -------------------------------------------------------------------------------------------------- installation


def test_the_wheel_is_this_package_and_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert one.name == other.name and one.read_bytes() == other.read_bytes()
    assert content_sha256(PACKAGE)[:12] in one.name

    installed = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", installed, one]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import impq_edge;"
        "from impq_edge.validation.validate import validate; from impq_edge.devices.profile import device_names;"
        "from impq_edge.data import data_path; assert data_path('demo', 'evaluation.txt').exists();"
        "from impq_edge.validation.remote.agent import content_sha256; from pathlib import Path;"
        "print(impq_edge.__file__, len(device_names()), content_sha256(Path(impq_edge.__file__).parent))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    where, devices, content = done.stdout.split()
    assert Path(where).is_relative_to(installed) and int(devices) > 5
    assert content == content_sha256(PACKAGE)  # so a machine that has it installed needs no other
    with zipfile.ZipFile(one) as wheel:
        assert not [name for name in wheel.namelist() if "tiny-llama3" in name or "__pycache__" in name]


@pytest.mark.parametrize(
    ("wheel", "fitting"),
    [
        ("rich-15.0.0-py3-none-any.whl", True),
        ("six-1.0-py2.py3-none-any.whl", True),
        ("llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl", True),
        ("llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl", False),
        ("numpy-2.2.6-cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", True),
        ("numpy-2.2.6-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", False),
        ("old-1-1-cp38-abi3-manylinux2014_aarch64.whl", True),
        ("new-1-cp313-abi3-manylinux2014_aarch64.whl", False),
        ("strange.whl", False),
    ],
)
def test_only_wheels_for_that_machine_are_carried(wheel: str, fitting: bool) -> None:
    assert fits(wheel, "aarch64", (3, 12)) is fitting


def test_wheels_without_llama_cpp_name_the_script_that_collects_them(tmp_path: Path) -> None:
    (tmp_path / "rich-15.0.0-py3-none-any.whl").touch()
    host = Host("board", "aarch64", "Linux", "python3", (3, 13), None, None)
    with pytest.raises(ValidationError, match=r"llama-cpp-python for Python 3\.13 on aarch64; .*carry-wheels"):
        wanted_environment(host, tmp_path, tmp_path)


def test_wheels_that_do_not_suffice_are_named(demo_gguf: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llama_cpp_python-0.3.36-py3-none-any.whl", "w") as wheel:
        info = "llama_cpp_python-0.3.36.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with Sshd(tmp_path / "new") as new:
        with pytest.raises(ValidationError, match=r"On board: the wheels do not suffice for Python 3.*carry-wheels"):
            go(new, demo_gguf, wheels=wheels, clean="all")
        assert not new.store.exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout as a newcomer has it: nothing installed, nothing built."""
    target = tmp_path / "a checkout"
    leave = shutil.ignore_patterns("tiny-llama3", "__pycache__")
    for name in ("impq_edge", "devices", "scripts"):
        shutil.copytree(ROOT / name, target / name, ignore=leave)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.mark.slow
def test_a_machine_that_has_nothing_is_served_from_wheels_and_renewed(
    demo_gguf: Path, checkout: Path, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    python = sys._base_executable  # type: ignore[attr-defined]
    version = ".".join(map(str, sys.version_info[:2]))
    collect = [checkout / "scripts/carry-wheels", "--python", version, os.uname().machine, wheels]
    subprocess.run(collect, check=True, env={**os.environ, "PYTHON": sys.executable})

    with Sshd(tmp_path / "bare", PIP_INDEX_URL="http://127.0.0.1:9/simple") as bare:  # no network there

        def run(*more: str | Path) -> subprocess.CompletedProcess[str]:
            command = [
                checkout / "scripts/validate_on_device.sh", demo_gguf, "--device", "raspberry-pi-zero-2w", "--context",
                "256", "--windows", "1", "--json", "--on", "board", "--ssh", bare.ssh, "--remote-python", python, *more,
            ]  # fmt: skip
            environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHON": sys.executable}
            environment.pop("PYTHONPATH", None)
            return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)

        done = run("--wheels", wheels)
        assert done.returncode == 0, done.stderr
        assert "Installing impq-edge" in done.stderr
        assert json.loads(done.stdout)["sha256"] == hashlib.sha256(demo_gguf.read_bytes()).hexdigest()
        assert {path.name for path in (bare.store / "objects").iterdir()} == {json.loads(done.stdout)["sha256"]}

        with (checkout / "impq_edge/errors.py").open("a") as source:
            source.write("# changed\n")
        done = run("--wheels", wheels)
        assert done.returncode == 0, done.stderr
        assert "from 0." in done.stderr and "Copying" not in done.stderr  # one small wheel

        done = run("--remote-clean", "all")  # without --wheels the environment that is there does
        assert done.returncode == 0, done.stderr
        assert "Installing" not in done.stderr and not bare.store.exists()


@pytest.mark.slow
def test_a_machine_that_must_compile_or_has_no_index_is_told_what_to_do(demo_gguf: Path, tmp_path: Path) -> None:
    python = sys._base_executable  # type: ignore[attr-defined]
    no_index = pytest.raises(ValidationError, match="the package index cannot be reached from there; carry wheels")
    with Sshd(tmp_path / "alone", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES=1) as alone, no_index:
        validate_on("board", demo_gguf, ssh=alone.ssh, python=python)
    with Sshd(tmp_path / "online") as online:
        asked: list[str] = []
        with pytest.raises(ValidationError, match=r"would have to be compiled on board.* agree with --yes, or collect"):
            validate_on("board", demo_gguf, ssh=online.ssh, python=python, agree=lambda text: bool(asked.append(text)))
        assert len(asked) == 1 and "can take an hour on a small board" in asked[0]
