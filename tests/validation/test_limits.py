"""Every way a child process can end, each really provoked, and the limits of its memory and time."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation import cgroup, process
from impq_edge.validation.process import choose_limit, run_child
from impq_edge.validation.results import MemoryLimit

JOB = {"kind": "describe"}
MIB = 1 << 20
POLLED = MemoryLimit(100 * MIB, "data limit and polling")
SAY = "import json, os, sys, time\ndef say(*step): print(json.dumps({'progress': step}), flush=True)\n"
ANSWER = "print(json.dumps({'result': {'answer': 42}}), flush=True)\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")


def ends(code: str, *, timeout_s: float = 60, memory: MemoryLimit | None = None, **options: object) -> str:
    with pytest.raises(ValidationError) as caught:
        run_child(JOB, timeout_s=timeout_s, memory=memory, arguments=("-c", SAY + code), **options)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert sentence.isprintable()
    return sentence


def is_gone(pid: int, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # its parent, an init that does not collect, may never do so
            return True
        time.sleep(0.02)
    return False


FILL = "held = []\nfor _ in range(200):\n    held.append(b'1' * (4 << 20)); time.sleep(0.02)\n"
"""Takes 800 MiB within four seconds, in which a busy machine looks often enough."""


@linux
def test_a_child_that_takes_too_much_memory_is_stopped_and_told_both_numbers() -> None:
    said = ends(FILL + "time.sleep(600)", memory=POLLED)
    had = int(said.split(", had ")[1].split()[0])
    assert "may hold 100 MiB" in said
    assert "smaller cache type" in said
    assert "--memory-limit none" in said
    assert 100 < had < 800


@linux
def test_the_system_refuses_what_is_set_aside_at_once() -> None:
    # As the real child does it, with a job that asks for two GiB in one go, which no look at it would prevent.
    code = (
        "import impq_edge.validation.jobs as jobs; from impq_edge.validation import child\n"
        "jobs.JOBS['describe'] = lambda progress: {'size': len(bytearray(2 << 30))}\n"
        "child.main()"
    )
    assert "may hold 200 MiB, needed more and was stopped" in ends(
        code, memory=MemoryLimit(200 * MIB, "data limit and polling")
    )


@linux
@pytest.mark.parametrize(
    "words",
    ["terminate called after throwing an instance of 'std::bad_alloc'", "ggml_aligned_malloc: failed to allocate 9 MB"],
)
def test_a_library_that_gives_up_for_want_of_memory_is_understood(words: str) -> None:
    code = f"print({words!r}, file=sys.stderr, flush=True); os.abort()"
    assert "may hold 100 MiB, needed more" in ends(code, memory=POLLED)
    assert "this machine gave it no more memory" in ends(code)


@linux
def test_a_model_that_needs_more_than_the_limit_ends_with_a_sentence(demo_gguf: Path) -> None:
    settings = {"context_tokens": 2048, "threads": 1, "kv_type": "f32"}
    job = {"kind": "decode", "file": str(demo_gguf), "settings": settings}
    assert run_child(job, timeout_s=120, memory=MemoryLimit(512 * MIB, "data limit and polling"))["tokens"] == 1024
    with pytest.raises(ValidationError, match=r"may hold 60 MiB(, had \d+|, needed more) and was stopped"):
        run_child(job, timeout_s=120, memory=MemoryLimit(60 * MIB, "data limit and polling"))


def test_a_limit_changes_no_result(demo_gguf: Path) -> None:
    from impq_edge.data import data_path

    job = {
        "kind": "score",
        "file": str(demo_gguf),
        "settings": {"context_tokens": 512, "threads": 1, "outputs_tokens": 64},
        "text": data_path("demo", "evaluation.txt").read_text("utf-8"),
        "windows": 1,
    }
    assert run_child(job, timeout_s=120, memory=choose_limit(1 << 30)) == run_child(job, timeout_s=120)


ILLEGAL = {"x86_64": b"\x0f\x0b", "aarch64": b"\x00\x00\x00\x00"}  # ud2, udf


@pytest.mark.skipif(
    platform.machine() not in ILLEGAL or sys.platform != "linux", reason="machine code of two processors"
)
def test_an_instruction_the_processor_does_not_have() -> None:
    code = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        f"page.write({ILLEGAL[platform.machine()]!r})\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    )
    said = ends(code)
    assert "(SIGILL)" in said
    assert "-DGGML_NATIVE=OFF" in said


def test_a_crash() -> None:
    assert "crashed (SIGSEGV)" in ends("import ctypes; ctypes.string_at(8)")


@linux
def test_a_file_that_is_cut_while_it_is_mapped(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 16))
    code = (
        "import mmap\n"
        f"file = open({str(file)!r}, 'r+b'); view = mmap.mmap(file.fileno(), 0); os.truncate(file.name, 0); view[40000]"
    )
    assert "(SIGBUS); check the disk and copy it again" in ends(code)


def test_a_kill_from_outside() -> None:
    said = ends("say('pid', os.getpid(), 0); time.sleep(600)", progress=lambda _, pid, __: os.kill(pid, signal.SIGKILL))
    assert "killed the process (SIGKILL); run it again" in said


def test_when_the_system_killed_for_want_of_memory_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 4])  # of Linux's /proc/vmstat: to run this machine out of memory would hurt others
    monkeypatch.setattr(process, "_oom_kills", lambda: next(counts))
    assert "because memory ran out" in ends("os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("how", ["while True: pass", "os.kill(os.getpid(), 19)", "os.close(1); time.sleep(600)"])
def test_a_hang_ends_after_its_time_however_it_hangs(how: str) -> None:
    start = time.monotonic()
    assert "not done after 2 s and was stopped; allow more time" in ends(how, timeout_s=2)
    assert time.monotonic() - start < 300  # not when the child would have ended by itself


STARTS = "import subprocess; say('pid', subprocess.Popen(['sleep', '600']).pid, 0)\n"


@linux
@pytest.mark.parametrize("then", [ANSWER, "os.abort()", "time.sleep(600)"])
def test_no_process_that_the_child_started_is_left(then: str) -> None:
    heard: list[int] = []
    start = time.monotonic()
    try:  # what it started also holds the channel open
        run_child(JOB, timeout_s=5, arguments=("-c", SAY + STARTS + then),
                  progress=lambda _stage, pid, _total: heard.append(pid))  # fmt: skip
    except ValidationError:
        assert then != ANSWER
    assert time.monotonic() - start < 300  # not the 600 s for which the other holds it
    assert is_gone(heard[0])


@linux
def test_the_child_ends_when_its_parent_is_killed() -> None:
    child = (
        "import os, time, impq_edge.validation.jobs as jobs; from impq_edge.validation import child\n"
        "def hang(progress): progress('pid', os.getpid(), 0); time.sleep(600)\n"
        "jobs.JOBS['describe'] = hang\n"
        "child.main()"
    )
    parent = (
        "from impq_edge.validation.process import run_child\n"
        "run_child({'kind': 'describe'}, timeout_s=600, progress=lambda _, pid, __: print(pid, flush=True),"
        f" arguments=('-c', {child!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        pid = int(started.stdout.readline())
        assert not is_gone(pid, within_s=0.1)
        started.kill()
    assert is_gone(pid)


@pytest.mark.parametrize(
    "line", ["not JSON", "[1, 2]", '{"result": 3}', '{"progress": "x"}', "[" * 100_000, '{"error": []}']
)
def test_a_child_in_disorder_is_an_error_and_no_traceback(line: str) -> None:
    assert "ended with status 0" in ends(f"sys.stdout.write({line!r} + '\\n')")


def test_bytes_that_are_no_text_are_no_traceback() -> None:
    assert "ended with status 0" in ends("sys.stdout.buffer.write(bytes(range(256)) + b'\\n')")


def test_where_nothing_can_limit_memory_the_run_goes_on_and_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    limit = choose_limit(10 * MIB)
    assert limit == MemoryLimit(10 * MIB, "not limited here")
    assert run_child(JOB, timeout_s=60, memory=limit, arguments=("-c", SAY + ANSWER)) == {"answer": 42}


# Control groups: their rules on files of our own; what a kernel does, where it lets us make one.


def machine(root: Path, groups: str, mounts: str, *directories: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts.replace("ROOT", str(root).replace(" ", "\\040")))
    for name in directories:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "cgroup.procs").touch()
    return root


V2 = "30 23 0:26 / ROOT/cg rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / ROOT/v1/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 /docker/abc ROOT/v1/memory\\040here rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture
def anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.mark.usefixtures("anybody")
def test_in_version_2_the_place_is_beside_the_own_group_if_memory_is_handed_on_there(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/user/app/run.scope\n", V2, "cg/user/app", "cg/user/app/run.scope")
    assert cgroup.find_place(root) is None
    (root / "cg/user/app/cgroup.subtree_control").write_text("cpu memory pids\n")
    assert cgroup.find_place(root) == cgroup.Place(root / "cg/user/app", 2)
    (root / "cg/user/app/run.scope/memory.max").write_text("1000000\n")  # beside it, this would not hold
    assert cgroup.find_place(root) is None


@pytest.mark.usefixtures("anybody")
def test_in_version_1_the_place_is_the_own_group_as_far_as_it_is_mounted(tmp_path: Path) -> None:
    groups = "5:cpu,cpuacct:/x\n4:memory:/docker/abc/job\n0::/\n"
    root = machine(tmp_path / "a machine", groups, V1, "v1/memory here/job")
    assert cgroup.find_place(root) == cgroup.Place(root / "v1/memory here/job", 1)
    (root / "proc/self/cgroup").write_text("4:memory:/elsewhere\n")
    assert cgroup.find_place(root) is None


def test_for_root_a_place_must_be_marked_as_delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = machine(tmp_path, "0::/service\n", V2, "cg/service")
    (root / "cg/service/cgroup.subtree_control").write_text("memory")
    assert cgroup.find_place(root) is None
    monkeypatch.setattr(os, "getxattr", lambda _path, name: b"1" if name == "user.delegate" else b"", raising=False)
    assert cgroup.find_place(root) == cgroup.Place(root / "cg/service", 2)


@pytest.mark.parametrize("text", ["", "nonsense\n:::\n0::\n", "0::/../../up\n", "4:memory:\n"])
def test_what_the_system_says_of_groups_may_be_anything(text: str, tmp_path: Path) -> None:
    root = machine(tmp_path, text, text + V2.replace("cgroup2 cgroup2", "cgroup2") + "x - y\n")
    assert cgroup.find_place(root) is None


GROUP = cgroup.find_place()
grouped = pytest.mark.skipif(GROUP is None, reason="no control group may be made here")


@grouped
def test_the_kernel_kills_a_child_beyond_its_group_s_limit_and_nothing_is_left() -> None:
    assert GROUP
    limit = choose_limit(64 * MIB)
    assert limit.method == f"cgroup v{GROUP.version}"
    assert "may hold 64 MiB" in ends("held = b'1' * (512 << 20); time.sleep(600)", memory=limit)
    assert not list(GROUP.directory.glob("impq-edge.*"))


@grouped
def test_what_leaves_the_process_group_does_not_leave_the_control_group() -> None:
    code = (
        "import subprocess\n"
        "say('pid', subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL).pid, 0)\n"
    )
    heard: list[int] = []
    found = run_child(JOB, timeout_s=60, memory=choose_limit(64 * MIB), arguments=("-c", SAY + code + ANSWER),
                      progress=lambda _stage, pid, _total: heard.append(pid))  # fmt: skip
    assert found == {"answer": 42}
    assert is_gone(heard[0])


@grouped
def test_pages_of_a_file_are_dropped_rather_than_the_process(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(256 * MIB))
    os.sync()
    code = f"file = open({str(file)!r}, 'rb')\nwhile file.read(1 << 20): pass\n" + ANSWER
    assert run_child(JOB, timeout_s=60, memory=choose_limit(64 * MIB), arguments=("-c", SAY + code)) == {"answer": 42}
