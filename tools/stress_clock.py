"""Let the clock jump by days, back and forth, under a build or release, and see whether anything depends on it.

    python tools/stress_clock.py FOLDER libfaketime.so.1 --runs 5 -- build --device raspberry-pi-5 --average-bits 3

What follows ``--`` is a command of ``impq-edge`` without its ``-o``; the library is libfaketime's (``apt-get download
libfaketime``). It shows the command, alone, another time several times a second, up to a hundred days before or after,
and leaves monotonic clocks as they are: no setting of a clock moves those, and the kernel, which is not shown another
time, would never come to the end of a wait that was reckoned by a clock five days ahead. Its progress is drawn on a
terminal, where estimates of the time left must not be absurd. When the command has ended every file gets a time of
modification somewhere between 1970 and 2100, and the command is run again at another time: it must make nothing anew.
Both times the bytes must be those of an undisturbed run. Prints counts as JSON.
"""

import os
import pty
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from stress_build import contents, differences
from stressed import ABSURD, report, tell, undisturbed

_STEP_S = 0.2


def main(
    folder: Annotated[Path, typer.Argument(help="Where all of it goes.")],
    library: Annotated[Path, typer.Argument(help="libfaketime.so.1, not the one for threads.")],
    words: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    runs: Annotated[int, typer.Option(help="How many.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the jumps.")] = 0,
) -> None:
    """Run it so often."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = undisturbed(folder / "undisturbed", words)
    generator = random.Random(seed)
    wrong, jumps, estimates = list[str](), 0, 0
    for run in range(runs):
        out = folder / f"run-{run}"
        status, said, jumped = under_jumps(folder / "clock", library, words, out, generator)
        jumps += jumped
        estimates += len(re.findall(r"\d+:\d\d", said))
        wrong += [f"run {run}: {said[-600:]}"] if status else []
        wrong += [f"run {run}: a time left of {text}" for text in ABSURD.findall(said)]
        wrong += differences(wanted, contents(out), out.name)
        for path in out.rglob("*"):
            os.utime(path, (generator.uniform(0, 4.1e9), generator.uniform(0, 4.1e9)))
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.gguf")}
        status, said, jumped = under_jumps(folder / "clock", library, words, out, generator)
        jumps += jumped
        wrong += [f"run {run}, again: {said[-600:]}"] if status else []
        wrong += [f"run {run}: {path} was made anew" for path in before if path.stat().st_mtime_ns != before[path]]
        wrong += differences(wanted, contents(out), f"{out.name}, again")
        tell(f"run {run}: {jumps} jumps, {estimates} estimates of a time left; {len(wrong)} wrong in all")
        shutil.rmtree(out)
    raise typer.Exit(report({"runs": 2 * runs, "jumps": jumps, "estimates": estimates}, wrong))


def under_jumps(
    clock: Path, library: Path, words: list[str], out: Path, generator: random.Random
) -> tuple[int, str, int]:
    """Run a command under a clock that jumps; return its status, what it showed on its terminal, and the jumps."""
    clock.write_text("+0d")
    environment = {
        **os.environ, "LD_PRELOAD": str(library.resolve()), "FAKETIME_TIMESTAMP_FILE": str(clock), "TERM": "xterm",
        "FAKETIME_NO_CACHE": "1", "NO_FAKE_STAT": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "COLUMNS": "200",
    }  # fmt: skip
    command = [sys.executable, "-m", "impq_edge.cli", *words, "-o", str(out)]
    master, slave = pty.openpty()
    said, jumps = bytearray(), 0
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment, start_new_session=True) as process:
        os.close(slave)
        os.set_blocking(master, False)
        while process.poll() is None:
            other = clock.with_name("next")
            other.write_text(f"{generator.uniform(-100, 100):+f}d")
            other.replace(clock)
            jumps += 1
            time.sleep(_STEP_S)
            said += _read(master)
    said += _read(master)
    os.close(master)
    return process.returncode, said.decode("utf-8", "replace"), jumps


def _read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 20)
    except OSError:  # nothing yet, or nobody there any more
        return b""


if __name__ == "__main__":
    typer.run(main)
