"""Kill a build at random moments, run it again, and see whether what it ends with is what an undisturbed one ends with.

    python tools/stress_build.py FOLDER --kills 100 -- --device raspberry-pi-5 --average-bits 3

What follows ``--`` are options of ``impq-edge build``. A build is killed with SIGKILL, itself alone or with all its
children, after a random share of the time that an undisturbed one took, and started again in the same directory until
it ends; then another begins, until there were so many kills. Every build must end with the same files, and those of
them that hold no timings must be the same bytes; of a killed build no process may be left after a while. Prints counts
as JSON.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from impq_edge.records import sha256_file

TIMED = ("validation.json", "report.md", "report.html", "manifest.json", "SHA256SUMS", "README.md")
"""Ends of the names of files that hold measured speeds, or hashes of such."""

MARK = "IMPQ_EDGE_STRESSED_BUILD"
"""Variable that every process of a build inherits."""

_ORPHANS_S = 20.0  # in which children notice that their parent is gone
_ROOT = Path(__file__).parents[1]


def main(
    folder: Annotated[Path, typer.Argument(help="Where builds go; must not exist.")],
    options: Annotated[list[str], typer.Argument(help="Of `impq-edge build`, after `--`.")],
    kills: Annotated[int, typer.Option(help="How many.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Build undisturbed once, then disturbed until there were enough kills."""
    generator = random.Random(seed)
    started = time.monotonic()
    if start(folder / "undisturbed", options).wait():
        raise SystemExit(f"The undisturbed build failed; see {folder / 'undisturbed.log'}.")
    whole_s = time.monotonic() - started
    wanted = contents(folder / "undisturbed")
    done, builds, orphans, wrong = 0, 0, 0, list[str]()
    while done < kills:
        out = folder / f"disturbed-{builds}"
        while True:
            process = start(out, options)
            if done < kills and not ends_within(process, generator.uniform(0.02, 1.0) * whole_s):
                kill(process, alone=generator.random() < 0.5)
                done += 1
                orphans += left_behind(out)
            elif process.wait():
                raise SystemExit(f"A build that was gone on with after a kill failed; see {out}.log.")
            else:
                break
        builds += 1
        found = differences(wanted, contents(out), out.name)
        wrong += found
        print(
            f"{done} kills, {builds} builds ended; {', '.join(found) or 'the last as the undisturbed one'}",
            file=sys.stderr,
        )
        shutil.rmtree(out)
    told = {"kills": done, "builds": builds, "seconds_undisturbed": round(whole_s, 1), "left_behind": orphans}
    print(json.dumps({**told, "wrong": wrong}, indent=1))
    raise typer.Exit(1 if wrong or orphans else 0)


def start(out: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    """Start a build in a group and with a mark of its own; what it says goes beside its directory."""
    command = [sys.executable, "-m", "impq_edge.cli", "build", *options, "-o", str(out)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=_ROOT, start_new_session=True, env=os.environ | {MARK: str(out)}
        )


def ends_within(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait so long; return whether the process has ended."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill(process: "subprocess.Popen[bytes]", *, alone: bool) -> None:
    """Kill a build, with or without its children."""
    if alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def left_behind(out: Path) -> int:
    """Return how many processes of a build still run after a while; none, as soon as there is none."""
    deadline = time.monotonic() + _ORPHANS_S
    while left := sum(mark_of(path) == str(out) for path in Path("/proc").iterdir() if path.name.isdecimal()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def mark_of(process: Path) -> str | None:
    """Return the mark that a process in /proc inherited, in whatever session it is; None without, or where it ended."""
    try:
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((v.partition(b"=")[2].decode() for v in variables if v.startswith(f"{MARK}=".encode())), None)


def contents(directory: Path) -> dict[str, str]:
    """Return the files of a build and their hashes, none of what holds timings."""
    return {
        str(path.relative_to(directory)): "" if path.name.endswith(TIMED) else sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def differences(wanted: dict[str, str], found: dict[str, str], name: str) -> list[str]:
    """Name every file that is missing, extra or another."""
    return [
        *(f"{name}: {path} is missing" for path in wanted.keys() - found.keys()),
        *(f"{name}: {path} is extra" for path in found.keys() - wanted.keys()),
        *(f"{name}: {path} differs" for path in wanted.keys() & found.keys() if wanted[path] != found[path]),
    ]


if __name__ == "__main__":
    typer.run(main)
