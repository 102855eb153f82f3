"""Commands under stress: started, waited for, and looked at when they end. Shared by the tools named stress_*."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stress_build import TIMED, contents

from impq_edge.errors import EXIT_BAD_INPUT

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["impq_edge.cli", "impq_edge.releases.release", "torch", "transformers", "accelerate"]
)
WORKING = re.compile(r"(.*/)?(encoded|\.work|[^/]+\.encoded)/.*|.*\.journal")
"""Finished work that only an unfinished directory holds."""
_HALF = re.compile(r"(.*/)?\.[^/]*\.(tmp|lock)")
ABSURD = re.compile(r"-\d+:\d\d|\d+ days?,|\b\d{2,}:\d\d:\d\d\b")
"""A time left that is below nothing, or ten hours and more."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    said: str

    @property
    def errors(self) -> list[str]:
        """The sentences by which it told why it stopped."""
        return [line.removeprefix("Error: ") for line in self.said.splitlines() if line.startswith("Error: ")]

    def faults(self, *words: str) -> list[str]:
        """Say what is wrong with how it refused: status 3, and one sentence that has one of ``words``."""
        wrong = []
        if self.status != EXIT_BAD_INPUT:
            wrong.append(f"status {self.status}")
        if "Traceback" in self.said or len(self.errors) != 1:
            wrong.append(f"not one sentence: {self.said[-600:]!r}")
        elif not any(word in self.errors[0] for word in words):
            wrong.append(f"does not tell it: {self.errors[0]!r}")
        return wrong


class Started:
    """A command of the package in a process of its own, forked from one that has imported what is heavy."""

    def __init__(self, out: Path, words: list[str]) -> None:
        self._log = Path(tempfile.mkstemp(prefix="stressed-")[1])
        command = [*words, *(() if "-o" in words else ("-o", str(out)))]
        self._process = _processes.Process(target=_run, args=(command, str(self._log)))
        self._process.start()

    def kill(self, *, alone: bool) -> None:
        """Kill it with SIGKILL, with or without what it started, unless it has ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended, or has no group yet
            (os.kill if alone else os.killpg)(self._process.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Wait so long; return whether it has ended."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def end(self) -> Ended:
        """Wait for it."""
        self._process.join()
        assert self._process.exitcode is not None
        said = self._log.read_text()
        self._log.unlink()
        return Ended(self._process.exitcode, said)


def ended(out: Path, words: list[str]) -> Ended:
    """Run a command to its end; ``words`` are those of impq-edge, with -o or without."""
    return Started(out, words).end()


def _run(command: list[str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ["COLUMNS"] = "500"
    sys.argv = ["impq-edge", *command]
    from impq_edge.cli import main

    main()


def undisturbed(out: Path, words: list[str]) -> dict[str, str]:
    """Return what a command makes that nothing disturbs, made once; a stress without one has nothing to compare."""
    if not (out.parent / f"{out.name}.json").exists():
        done = ended(out, words)
        if done.status:
            raise SystemExit(f"The undisturbed {words[0]} failed: {done.said}")
        (out.parent / f"{out.name}.json").write_text(json.dumps(contents(out)))
    found: dict[str, str] = json.loads((out.parent / f"{out.name}.json").read_text())
    return found


def half_written(out: Path, wanted: Mapping[str, str]) -> list[str]:
    """Name what an unfinished directory should not hold: all but finished files, records and journals."""
    wrong = []
    for name, sha256 in contents(out).items() if out.exists() else ():
        if _HALF.fullmatch(name):
            wrong.append(f"{name} is left")
        elif name.endswith(".journal"):
            text = (out / name).read_text()
            wrong += [] if text.endswith("\n") else [f"{name} has a torn line"]
        elif not WORKING.fullmatch(name) and wanted.get(name) != sha256:
            wrong.append(f"{name} is not that of an undisturbed one" if name in wanted else f"{name} is extra")
        elif name.endswith(TIMED) and not (out / name).stat().st_size:
            wrong.append(f"{name} is empty")
    return wrong


def report(found: dict[str, object], wrong: list[str]) -> int:
    """Print counts as JSON; return the status."""
    print(json.dumps({**found, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def tell(sentence: str) -> None:
    """Say on stderr how far a run is."""
    print(sentence, file=sys.stderr, flush=True)
