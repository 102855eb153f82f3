"""The other machine's side: sent to its Python as text on every call, so the standard library only, and one file.

A request is one JSON object, as base64 in the last argument; answers are JSON lines on stdout, each ``{"impq":
kind, "value": …}``, so that what a login script prints is told apart. Everything lives in one directory of the cache:

``objects/SHA256``       files by their content; ``.part`` while they are copied
``venv/``, ``venv.json`` the environment, and what it was made of; without the latter it is unfinished
``jobs/KEY/``            what was started: its request, its inputs under their own names, its answers so far

A job runs in a session of its own and writes its answers to a file. A connection that breaks therefore ends
no measurement: the same request finds it again.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PART_BYTES = 4 << 20
"""A file is compared in parts of this size when a copy goes on, and acknowledged as often."""

_SILENCE_S = 120.0  # a sender that says nothing for so long is gone; its part of the file stays
_POLL_S = 0.2
_GRACE_S = 10.0  # for a job to end when it is told to
_STALE_S = 7 * 24 * 3600.0
_NOT_CARRIED = ("data/demo/tiny-llama3/", "data/profiles/")  # what only a workstation uses


class RefusalError(Exception):
    """Something here cannot serve; the message is a sentence."""


# ----------------------------------------------------------------------------------- what both sides use


def package_files(package: Path) -> dict[str, Path]:
    """Return the files of the package that validation needs, by their place in it, from a checkout or installed."""
    found = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if path.is_file()}
    for name in ("devices", "profiles"):
        if not (package / "data" / name).is_dir():
            beside = package.parent / name
            found |= {f"data/{name}/{path.name}": path for path in beside.glob("*") if path.is_file()}
    return {
        name: path
        for name, path in sorted(found.items())
        if "__pycache__" not in name and not name.startswith(_NOT_CARRIED)
    }


def content_sha256(package: Path) -> str:
    """Hash what :func:`package_files` finds: two copies of the package with one hash do the same."""
    digest = hashlib.sha256()
    for name, path in package_files(package).items():
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def encode(request: dict[str, Any]) -> str:
    """Return a request as an argument that no shell can misread."""
    return base64.b64encode(json.dumps(request).encode()).decode()


def send(kind: str, value: Any) -> None:
    """Say one thing to the machine that asked."""
    sys.stdout.write(json.dumps({"impq": kind, "value": value}) + "\n")
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------- preparation


def cache() -> Path:
    """Return the directory of everything that is kept here, made if need be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118
    folder = Path(home, "impq-edge", "device")
    for name in ("objects", "jobs"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Say what is already here of an environment and of files, and how much room there is."""
    folder = cache()
    # Never the newest: the clock of a board without a battery jumps, once it hears the time, from where it stopped.
    for job in sorted((folder / "jobs").iterdir(), key=lambda job: job.stat().st_mtime)[:-1]:
        if time.time() - job.stat().st_mtime > _STALE_S and not _is_running(job):
            shutil.rmtree(job, ignore_errors=True)
    disk = os.statvfs(folder)
    return {
        "cache": str(folder),
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "present": {sha256: _held_bytes(folder / "objects" / sha256) for sha256 in request["objects"]},
        "python": _ready_python(request["content"], request["wheels"]),
        "renewable": _is_ours(request["wheels"]),
        "cores": os.cpu_count() or 1,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    }


def _held_bytes(path: Path) -> int:
    for candidate in (path, path.with_suffix(".part")):
        if candidate.exists():
            return candidate.stat().st_size
    return 0


def _ready_python(content: str, wheels: list[str] | None) -> str | None:
    """Return the Python that has this very package, ours or, unless wheels are to be used, one's own."""
    if wheels is None and _own_content() == content:
        return sys.executable
    same = _is_ours(wheels) and _stamp().get("content") == content
    return str(_venv_python()) if same else None


def _is_ours(wheels: list[str] | None) -> bool:
    """Tell whether our environment is whole and made of these wheels, whatever version of this package it has."""
    stamp = _stamp()
    right = stamp.get("python") == sys.version and (wheels is None or stamp.get("wheels") == wheels)
    return right and _venv_python().exists()


def _own_content() -> str | None:
    try:
        importlib.metadata.version("llama-cpp-python")
        spec = importlib.util.find_spec("impq_edge")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return content_sha256(Path(spec.origin).parent)


def _venv_python() -> Path:
    return cache() / "venv" / "bin" / "python"


def _stamp() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((cache() / "venv.json").read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}


# ------------------------------------------------------------------------------------------ taking a file


def receive(request: dict[str, Any]) -> str:
    """Take a file from stdin, from where an earlier copy of it stopped; it counts only once its hash is right."""
    size_bytes, target = request["size_bytes"], cache() / "objects" / request["sha256"]
    part = target.with_suffix(".part")
    if target.exists():
        return "present"
    with part.open("ab+") as file:
        _lock(file, "Waiting for another copy of the same file to end.")
        if target.exists():  # that one brought it
            part.unlink(missing_ok=True)
            return "present"
        parts, digests = _hash_parts(file, size_bytes)
        send("parts", parts)
        kept = int(_read_line())
        digest = digests[kept]
        file.truncate(min(kept * PART_BYTES, file.tell()))
        _append(file, digest, size_bytes)
        if digest.hexdigest() != request["sha256"]:
            part.unlink()
            raise RefusalError("the copy arrived damaged and was removed; run the same command again.")
        part.replace(target)  # while it is locked: whoever waits for it then finds it whole
    return "copied"


def _hash_parts(file: IO[bytes], size_bytes: int) -> tuple[list[str], list[Any]]:
    """Return the hash of each whole part that is here, and the state of the file's hash before each and at the end."""
    file.seek(0)
    digest, parts = hashlib.sha256(), []
    states = [digest.copy()]
    while len(data := file.read(PART_BYTES)) == PART_BYTES:
        parts.append(hashlib.sha256(data).hexdigest())
        digest.update(data)
        states.append(digest.copy())
        send("progress", ["check copy", len(parts) * PART_BYTES, max(size_bytes, len(parts) * PART_BYTES)])
    file.seek(0, os.SEEK_END)
    return parts, states


def _append(file: IO[bytes], digest: Any, size_bytes: int) -> None:
    file.seek(0, os.SEEK_END)
    done = file.tell()
    while done < size_bytes:
        data = _read(min(PART_BYTES - done % PART_BYTES, size_bytes - done))
        file.write(data)
        file.flush()
        digest.update(data)
        done += len(data)
        if done % PART_BYTES == 0 or done == size_bytes:
            send("progress", ["copy", done, size_bytes])
    os.fsync(file.fileno())


def _read(most_bytes: int) -> bytes:
    """Read what there is up to so many bytes; give up on a sender that is silent or gone."""
    stdin = sys.stdin.fileno()
    data = os.read(stdin, most_bytes) if select.select([stdin], [], [], _SILENCE_S)[0] else b""
    if not data:
        raise SystemExit(1)
    return data


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += _read(1)
    return line


def _lock(file: IO[Any], waiting: str) -> None:
    """Take a file's lock, and say so if it takes a while."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        send("say", waiting)
        fcntl.flock(file, fcntl.LOCK_EX)


# --------------------------------------------------------------------------------------------------- jobs


def follow(request: dict[str, Any]) -> None:
    """Start a job, or find the one of the same request, and pass its answers on until it ends or is stopped.

    From stdin come ``stop``, which ends the job, or ``ack``: the answer has arrived and need not be kept.
    """
    folder = cache() / "jobs" / request["key"]
    if _is_running(folder):
        send("say", "Going on with what was started there before.")
    elif _last_answer(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
        _start(folder, request)
    else:
        send("say", "It came to its end there while there was no connection; here is what it found.")
    commands: list[str] = []
    closed = threading.Event()
    threading.Thread(target=_hear, args=(commands, closed), daemon=True).start()
    answered = _pass_on(folder, commands, closed)
    if answered and not closed.wait(0):
        _wait(lambda: bool(commands) or closed.is_set(), _GRACE_S)
    if "stop" in commands:
        _stop(folder)
    if commands:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, request: dict[str, Any]) -> None:
    objects = cache() / "objects"
    for name, sha256 in request["inputs"].items():
        link = folder / "in" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(objects / sha256)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(request), "utf-8")
    with (folder / "lock").open("w") as lock, (folder / "log").open("wb") as log, (folder / "err").open("wb") as err:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the open file, so the job's too, and for as long as it lives
        started = subprocess.Popen(
            [*sys.orig_argv[:-1], encode({"op": "job", "folder": str(folder), "lock": lock.fileno()})],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=err,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        (folder / "pid").write_text(str(started.pid))


def _is_running(folder: Path) -> bool:
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_answer(folder: Path) -> str | None:
    """Return the kind of the answer a job ended with, None where it was cut off."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = json.loads((folder / "log").read_text("utf-8").splitlines()[-1])
        return found["impq"] if found["impq"] in {"result", "error"} else None
    return None


def _hear(commands: list[str], closed: threading.Event) -> None:
    said = b""
    while data := os.read(0, 64):  # not sys.stdin, whose lock a thread must not hold when the process ends
        said += data
        commands[:] = said.decode("ascii", "replace").split("\n")[:-1]
    closed.set()


def _pass_on(folder: Path, commands: list[str], closed: threading.Event) -> bool:
    """Copy a job's answers to stdout as they come; tell whether it came to its end."""
    rest = b""
    with (folder / "log").open("rb") as log:
        while not commands and not closed.is_set():
            running = _is_running(folder)  # asked first: what it wrote before it ended is then read below
            *lines, rest = (rest + log.read()).split(b"\n")
            for line in lines:
                sys.stdout.write(line.decode("utf-8", "replace") + "\n")
            sys.stdout.flush()
            if not running:
                if _last_answer(folder) is None:
                    send("error", f"the process there was ended from outside ({_last_words(folder)}); run it again.")
                return True
            time.sleep(_POLL_S)
    return False


def _last_words(folder: Path) -> str:
    lines = (folder / "err").read_text("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _stop(folder: Path) -> None:
    """End a job and everything it started."""
    leader = int((folder / "pid").read_text())
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _is_running(folder):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, number)
        _wait(lambda: not _is_running(folder), _GRACE_S)


def _wait(until: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not until() and time.monotonic() < end:
        time.sleep(_POLL_S)


def job(request: dict[str, Any]) -> dict[str, Any]:
    """Be the job: wait for one's turn, since two measurements at once would both be wrong, and do it."""
    folder = Path(request["folder"])
    asked = json.loads((folder / "job.json").read_text("utf-8"))
    turn = (cache() / "turn").open("a")
    _lock(turn, "Another job is running there; waiting for it to end (Ctrl-C stops waiting).")
    if asked["kind"] == "install":
        return install(folder, asked)
    for descriptor in (turn.fileno(), request["lock"]):  # held until the measuring process ends
        os.set_inheritable(descriptor, True)
    environment = dict(os.environ)
    if asked["python"] != sys.executable:  # our own environment is to be what it is
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    return os.execve(
        asked["python"], [asked["python"], "-P", "-m", "impq_edge.validation.remote.job", str(folder)], environment
    )


# ------------------------------------------------------------------------------------------- installation


def install(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Make or renew the environment.

    Instead of its Python the answer may be ``again``: ``"compile"`` where llama.cpp would have to be compiled,
    ``"whole"`` where this package alone, put into the environment that is there, does not make it complete.
    """
    wheels = folder / "in" / "wheels"
    ours = wheels / asked["wheel"]
    stamp = {"content": asked["content"], "python": sys.version, "wheels": asked["wheels"]}
    if asked["renew"]:
        (cache() / "venv.json").unlink(missing_ok=True)
        if _pip(folder, ["install", "--no-deps", "--force-reinstall", str(ours)], 2) or _pip(folder, ["check"], 2):
            return {"again": "whole"}
    else:
        _make_venv(cache() / "venv")
        failure = _pip(folder, ["install", *_where_from(asked, wheels), str(ours)], asked["expected"])
        if failure is not None:
            none_found = "No matching distribution found for llama-cpp-python" in failure and not _has_no_index(failure)
            if none_found and asked["wheels"] is None and not asked["compile"]:
                return {"again": "compile"}
            shutil.copy(folder / "pip.log", cache())
            raise RefusalError(_pip_sentence(failure, asked["wheels"] is not None))
    (cache() / "venv.json").write_text(json.dumps(stamp), "utf-8")
    for sha256 in asked["inputs"].values():  # what they hold is in the environment
        (cache() / "objects" / sha256).unlink(missing_ok=True)
    return {"python": str(_venv_python())}


def _where_from(asked: dict[str, Any], wheels: Path) -> list[str]:
    if asked["wheels"] is not None:
        return ["--no-index", "--find-links", str(wheels)]
    return [] if asked["compile"] else ["--only-binary", "llama-cpp-python"]


def _make_venv(venv: Path) -> None:
    (cache() / "venv.json").unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if made.returncode != 0:
        if "No space left" in made.stdout + made.stderr:
            raise OSError(errno.ENOSPC, "no space left", str(venv))
        raise RefusalError(
            f"{sys.executable} there cannot make a virtual environment; install its venv (Debian: apt-get install "
            "python3-venv)."
        )


def _pip(folder: Path, arguments: list[str], expected: int) -> str | None:
    """Run pip in the environment and tell how far it is; return what it complained of, None where all went well."""
    scratch = folder / "tmp"  # a board's /tmp may be a small part of its memory
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch)}
    for name in ("PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    environment.setdefault("CMAKE_ARGS", _cmake_arguments())
    command = [str(_venv_python()), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    log = folder / "pip.log"
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        for minutes in _minutes(running):
            said = log.read_text("utf-8", "replace")
            taken = said.count("\nCollecting ") + said.count("\nProcessing ")
            if "Building wheel for llama" in said:
                send("progress", ["compile llama.cpp, minutes", minutes, minutes + 1])
            else:
                send("progress", ["install", min(taken, expected - 1), expected])
    if running.returncode == 0:
        return None
    return log.read_text("utf-8", "replace") or "pip said nothing"


def _minutes(running: "subprocess.Popen[bytes]") -> Iterator[int]:
    start = time.monotonic()
    while running.poll() is None:
        yield int((time.monotonic() - start) / 60)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(1)


def _cmake_arguments() -> str:
    """A native build is right but for x86-64 virtual machines that advertise what they do not run (AMX)."""
    with contextlib.suppress(OSError):
        if " avx2 " in Path("/proc/cpuinfo").read_text():
            return "-DGGML_NATIVE=OFF"
    return ""


def _has_no_index(said: str) -> bool:
    return any(words in said for words in ("NewConnectionError", "ConnectTimeout", "NameResolutionError"))


def _pip_sentence(said: str, offline: bool) -> str:
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ")] or said.strip().splitlines()
    first = errors[0].removeprefix("ERROR: ").strip()
    version = ".".join(map(str, sys.version_info[:2]))
    if "No space left" in said:
        raise OSError(errno.ENOSPC, "no space left", str(cache()))
    if offline:
        return (
            f"the wheels do not suffice for Python {version} on {os.uname().machine} ({first}); collect them with "
            f"scripts/carry-wheels {os.uname().machine} DIR --python {version}."
        )
    if _has_no_index(said):
        return "the package index cannot be reached from there; carry wheels with scripts/carry-wheels and --wheels."
    return f"pip could not install the package there ({first}); see {cache() / 'pip.log'} there, or carry wheels."


# --------------------------------------------------------------------------------------------------- main


def clean(request: dict[str, Any]) -> str:
    """Remove files, or everything, unless somebody is using it."""
    folder = cache()
    if request["what"] == "files":
        for sha256 in request["objects"]:
            for path in (folder / "objects" / sha256, folder / "objects" / f"{sha256}.part"):
                path.unlink(missing_ok=True)
        return "removed"
    if any(_is_running(path) for path in (folder / "jobs").iterdir()):
        return "in use"
    shutil.rmtree(folder)
    return "removed"


OPERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "prepare": prepare, "receive": receive, "follow": follow, "job": job, "clean": clean,
}  # fmt: skip


def main() -> None:
    """Do what the last argument asks; every way it can fail is one sentence."""
    request = json.loads(base64.b64decode(sys.argv[-1]))
    try:
        value = OPERATIONS[request["op"]](request)
    except RefusalError as error:
        send("error", str(error))
    except OSError as error:
        send("error", _os_sentence(error))
    else:
        if request["op"] != "follow":  # which has passed on the job's own answer
            send("result", value)


def _os_sentence(error: OSError) -> str:
    where = error.filename or cache()
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return (
            f"the disk that holds {where} is full; free some space there and run the same command again, which goes "
            "on where it stopped."
        )
    return f"{where} cannot be used ({error.strerror or error}); check who owns it."


if __name__ == "__main__":
    main()
