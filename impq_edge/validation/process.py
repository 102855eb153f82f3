"""The parent's side of a child process: send a job, follow it, and turn every way it can end into a sentence."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import impq_edge.errors
from impq_edge.errors import ValidationError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

CHILD = ("-m", "impq_edge.validation.child")
_ROOT = Path(impq_edge.errors.__file__).parents[1]
_REBUILD = (
    'rebuild it portable (CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-deps --no-binary '
    "llama-cpp-python llama-cpp-python) or run with use_extra_bufts off"
)
_ENDINGS = {
    "SIGILL": f"llama.cpp was built for instructions this processor does not run (SIGILL); {_REBUILD}.",
    "SIGKILL": "the process was killed (SIGKILL), as the system does when memory runs out; choose a shorter context, "
    "a smaller cache type, use_extra_bufts off or a smaller file.",
    "SIGSEGV": f"llama.cpp crashed (SIGSEGV); check the file's hash, and if it is right {_REBUILD}.",
    "SIGBUS": "the file could not be read to its end while it was in use (SIGBUS); check the disk and copy it again.",
}


_PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Lets OpenMP's threads sleep at barriers, for jobs whose speed is not measured. By default they spin, and beside
another busy process the wait for a descheduled thread made a perplexity ten times slower (98 s instead of 7 s);
on an idle machine sleeping took 3 s instead of 2 s."""


def run_child(
    job: dict[str, Any],
    *,
    timeout_s: float,
    progress: Progress = lambda _stage, _done, _total: None,
    arguments: Sequence[str] = CHILD,
) -> dict[str, Any]:
    """Do a job of :mod:`impq_edge.validation.jobs` in a child process and return its result.

    Parameters
    ----------
    job
        Plain JSON values; ``kind`` names the function, the rest are its arguments.
    timeout_s
        After this long the child is killed.
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
        With the child's own sentence, or one for the signal, status or time-out that ended it.
    """
    with tempfile.TemporaryFile() as stderr, _start(arguments, stderr, job["kind"] in {"score", "compare"}) as child:
        expired = threading.Event()
        timer = threading.Timer(timeout_s, _expire, (child, expired))
        timer.start()
        try:
            result = _converse(child, job, progress)
            status = child.wait()
        finally:  # also on Ctrl-C
            timer.cancel()
            child.kill()
        if expired.is_set():
            raise ValidationError(
                f"Job {job['kind']!r} was not done after {timeout_s:g} s and was stopped; allow more time, fewer "
                "windows or fewer tokens."
            )
        if result is None or status != 0:
            raise ValidationError(_ending(job, status, _last_line(stderr)))
        return result


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
        env=environment,
    )


def _expire(child: "subprocess.Popen[str]", expired: threading.Event) -> None:
    if child.poll() is None:
        expired.set()
        child.kill()


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
    result = None
    for line in lines:
        if not line.endswith("\n"):
            break  # it ended in the middle of a sentence
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "error" in message:
            raise ValidationError(message["error"])
        else:
            result = message["result"]
    return result


def _ending(job: dict[str, Any], status: int, said: str) -> str:
    where = f"Job {job['kind']!r}" + (f" on {job['file']}" if "file" in job else "")
    if status >= 0:
        return f"{where} ended with status {status}: {said}; report this with the file that caused it."
    name = signal.Signals(-status).name
    known = _ENDINGS.get(name)
    if known:
        return f"{where}: {known}"
    return f"{where} was ended by {name}: {said}; check the file's hash, and report this if it is right."


def _last_line(stderr: IO[bytes]) -> str:
    """Return the last thing the child said: a traceback's exception, or llama.cpp's assertion."""
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - 4096))
    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
