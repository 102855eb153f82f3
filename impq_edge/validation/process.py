"""The parent's side of a child process: send a job, follow it, and turn every way it can end into a sentence."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import impq_edge.errors
from impq_edge.errors import ValidationError
from impq_edge.records import scratch_error
from impq_edge.validation import cgroup
from impq_edge.validation.results import MemoryLimit
from impq_edge.validation.watch import Watch

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

CHILD = ("-m", "impq_edge.validation.child")
_ROOT = Path(impq_edge.errors.__file__).parents[1]
_MIB = 2**20
_REBUILD = (
    'rebuild it portable (CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-deps --no-binary '
    "llama-cpp-python llama-cpp-python) or run with use_extra_bufts off"
)
_LESS = "choose a shorter context, a smaller cache type, use_extra_bufts off or a smaller file"
_ENDINGS = {
    "SIGILL": f"llama.cpp was built for instructions this processor does not run (SIGILL); {_REBUILD}.",
    "SIGKILL": "somebody, or a limit of memory around all this, killed the process (SIGKILL); run it again, and if "
    f"that happens again {_LESS}.",
    "SIGSEGV": f"llama.cpp crashed (SIGSEGV); check the file's hash, and if it is right {_REBUILD}.",
    "SIGBUS": "the file could not be read to its end while it was in use (SIGBUS); check the disk and copy it again.",
}
_OUT_OF_MEMORY = f"the system killed the process (SIGKILL) because memory ran out; {_LESS}."
_NO_MEMORY = re.compile(
    r"bad_alloc|MemoryError|no memory|out of memory|(?:failed|unable|cannot) (?:to )?allocate", re.IGNORECASE
)
"""How libraries complain that they were given no memory: C++, Python, llama.cpp (and so our Engine), the C library."""


_PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Lets OpenMP's threads sleep at barriers, for jobs whose speed is not measured. By default they spin, and beside
another busy process the wait for a descheduled thread made a perplexity ten times slower (98 s instead of 7 s);
on an idle machine sleeping took 3 s instead of 2 s."""


def choose_limit(limit_bytes: int) -> MemoryLimit:
    """Say what will hold a child to a limit of memory here: a control group where one can be made.

    Elsewhere on Linux the child may set aside no more than about that for data, and its resident memory is looked at
    every twentieth of a second; on other systems nothing holds it, and the record says so.
    """
    place = cgroup.find_place()
    if place is not None:
        with contextlib.suppress(OSError), cgroup.group(place, limit_bytes):
            return MemoryLimit(limit_bytes, "cgroup v2" if place.version == 2 else "cgroup v1")
    return MemoryLimit(limit_bytes, "data limit and polling" if sys.platform == "linux" else "not limited here")


def run_child(
    job: dict[str, Any],
    *,
    timeout_s: float,
    memory: MemoryLimit | None = None,
    progress: Progress = lambda _stage, _done, _total: None,
    arguments: Sequence[str] = CHILD,
) -> dict[str, Any]:
    """Do a job of :mod:`impq_edge.validation.jobs` in a child process and return its result.

    However the child ends, no process that it started is left, but one that has left its process group.

    Parameters
    ----------
    job
        Plain JSON values; ``kind`` names the function, the rest are its arguments.
    timeout_s
        After this long the child is killed.
    memory
        What the child may hold, from :func:`choose_limit`; None: what it can get.
    progress
        Hears what the child reports.
    arguments
        What the interpreter is to run.

    Returns
    -------
    Plain JSON values.

    Raises
    ------
    ValidationError
        With the child's own sentence, or one for the limit, signal, status or time-out that ended it.
    """
    before = _oom_kills()
    with (
        _group(memory) as group,
        _said() as stderr,
        _start(arguments, stderr, job["kind"] in {"score", "compare"}) as child,
    ):
        watch = Watch(child, timeout_s, _polled_bytes(memory))
        error, result = None, None
        try:
            if group is not None:
                _enter(group, child)
            result = _converse(child, _with_limit(job, memory), progress)
            watch.wait()
        except ValidationError as said:
            error = said
        finally:  # also on Ctrl-C
            watch.stop()
        status = child.wait()
        last = str(error) if error else _last_line(stderr)
        if watch.cause == "time":
            raise ValidationError(
                f"Job {job['kind']!r} was not done after {timeout_s:g} s and was stopped; allow more time, fewer "
                "windows or fewer tokens."
            )
        breached = watch.cause == "memory" or (group is not None and group.oom_kills() > 0)
        if memory is not None and (breached or (_failed(result, status) and _NO_MEMORY.search(last))):
            raise ValidationError(_breach(job, memory, watch.peak_rss_bytes))
        if error is not None:
            raise error
        if _failed(result, status):
            raise ValidationError(_ending(job, status, last, out_of_memory=_oom_kills() > before))
        assert result is not None
        return result


@contextlib.contextmanager
def _said() -> Iterator[IO[bytes]]:
    """Yield a file for what the child says last."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError as error:
        raise scratch_error(error) from error
    with file:
        yield file


def _failed(result: dict[str, Any] | None, status: int) -> bool:
    return result is None or status != 0


def _polled_bytes(memory: MemoryLimit | None) -> int | None:
    # In a control group too: pages of the file that somebody else has read before do not count there.
    return None if memory is None or memory.method == "not limited here" else memory.limit_bytes


def _with_limit(job: dict[str, Any], memory: MemoryLimit | None) -> dict[str, Any]:
    polled = memory is not None and memory.method == "data limit and polling"
    return {**job, "data_limit_bytes": memory.limit_bytes} if memory and polled else job


@contextlib.contextmanager
def _group(memory: MemoryLimit | None) -> Iterator[cgroup.Group | None]:
    """Make the control group that was chosen, if one was."""
    place = cgroup.find_place() if memory is not None and memory.method.startswith("cgroup") else None
    if memory is None or place is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(cgroup.group(place, memory.limit_bytes))
        except OSError as error:
            raise _no_group(place.directory, error) from None
        yield group


def _enter(group: cgroup.Group, child: "subprocess.Popen[str]") -> None:
    """Put the child, which waits for its job and has used little yet, into its group."""
    try:
        group.add(child.pid)
    except OSError as error:
        if child.poll() is None:  # else its status says how it ended
            raise _no_group(group.directory, error) from None


def _no_group(directory: Path, error: OSError) -> ValidationError:
    return ValidationError(
        f"The memory of a process cannot be limited in {directory} ({error.strerror or error}); "
        "pass --memory-limit none to run without a limit."
    )


def _start(arguments: Sequence[str], stderr: IO[bytes], patient: bool) -> "subprocess.Popen[str]":
    environment = {
        **(_PATIENT if patient else {}),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "GGML_NO_BACKTRACE": "1",  # else an assertion starts a debugger
    }
    # -P: modules lying in the current directory, perhaps beside a downloaded model, are not imported.
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        errors="replace",
        env=environment,
        start_new_session=True,  # so that what it starts can be ended with it
    )


def _converse(child: "subprocess.Popen[str]", job: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
    assert child.stdin
    assert child.stdout
    try:
        json.dump(job, child.stdin)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it died before it listened: its status says how
    return _listen(child.stdout, progress)


def _listen(lines: Iterable[str], progress: Progress) -> dict[str, Any] | None:
    result: dict[str, Any] | None = None
    for line in lines:
        if not line.endswith("\n"):
            break  # it ended in the middle of a sentence
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            break  # its memory is in disorder: only its end tells anything
        match message:
            case {"progress": [str() as stage, int() as done, int() as total]}:
                progress(stage, done, total)
            case {"error": str() as error}:
                raise ValidationError(error)
            case {"result": dict() as result}:
                pass
    return result


def _where(job: dict[str, Any]) -> str:
    return f"Job {job['kind']!r}" + (f" on {job['file']}" if "file" in job else "")


def _breach(job: dict[str, Any], memory: MemoryLimit, peak_bytes: int | None) -> str:
    # Where the system refused or killed, what it held when last looked at says nothing.
    seen = f", had {peak_bytes / _MIB:.0f}" if peak_bytes and peak_bytes > memory.limit_bytes else ", needed more"
    return (
        f"{_where(job)}: the process, which may hold {memory.limit_bytes / _MIB:.0f} MiB{seen} and was stopped; "
        f"{_LESS}, or see how much it takes with --memory-limit none."
    )


def _ending(job: dict[str, Any], status: int, said: str, *, out_of_memory: bool) -> str:
    where = _where(job)
    if _NO_MEMORY.search(said):
        return f"{where}: this machine gave it no more memory ({said}); {_LESS}."
    if status >= 0:
        return f"{where} ended with status {status}: {said}; report this with the file that caused it."
    name = signal.Signals(-status).name
    if name == "SIGKILL" and out_of_memory:
        return f"{where}: {_OUT_OF_MEMORY}"
    known = _ENDINGS.get(name)
    if known:
        return f"{where}: {known}"
    return f"{where} was ended by {name}: {said}; check the file's hash, and report this if it is right."


def _oom_kills() -> int:
    """Return how many processes Linux has killed since it started because memory ran out; 0 elsewhere."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _last_line(stderr: IO[bytes]) -> str:
    """Return the last thing the child said: a traceback's exception, or llama.cpp's assertion."""
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - 4096))
    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
