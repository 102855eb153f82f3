"""Let the disk run full under a build or release at many different writes, then give it room and see what it ends with.

    python tools/stress_disk.py FOLDER -- build --device raspberry-pi-5 --average-bits 3
    python tools/stress_disk.py FOLDER --kind inodes -- release docs/release.toml

What follows ``--`` is a command of ``impq-edge`` without its ``-o``. It writes to a tmpfs, so this runs as root
on Linux. The disk begins with no room at all and grows, each time the command has ended, to where another write meets
its end: before, inside and one page before the end of every file that an undisturbed run leaves, in the order in which
it wrote them. Each time the command must end with one sentence and status 3 and leave nothing half-written, and the
last time with the bytes of the undisturbed run. With ``--fresh`` every size begins with an empty disk, and goes on with
ample room. With ``--suddenly`` there is room enough until somebody takes all that is left. Prints counts as JSON.
"""

import contextlib
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from stress_build import contents, differences
from stressed import Ended, Started, ended, half_written, report, tell, undisturbed

_PAGE = 4096
_AMPLE = 1 << 30
Kind = Literal["bytes", "inodes"]


def main(
    folder: Annotated[Path, typer.Argument(help="Where all of it goes.")],
    words: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    kind: Annotated[Kind, typer.Option(help="What there is too little of.")] = "bytes",
    evenly: Annotated[int, typer.Option(help="So many sizes more, at equal distances.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew at every size.")] = False,
    suddenly: Annotated[int, typer.Option(help="Instead, let room run out so often at random moments.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Fill the disk at every size."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = undisturbed(folder / "undisturbed", words)
    if suddenly:
        raise typer.Exit(_suddenly(folder, words, wanted, suddenly, random.Random(seed)))
    sizes = sizes_of(folder / "undisturbed", kind, evenly)
    wrong, met, told = list[str](), 0, Counter[str]()
    rounds = [[size] for size in sizes] if fresh else [sizes]
    for steps in rounds:
        with disk(folder / "disk", kind) as resize:
            out = folder / "disk" / "out"
            for size in steps:
                resize(size)
                done = ended(out, words)
                if done.status == 0:
                    break
                met += 1
                faults = faults_of(done, out, wanted)
                wrong += [f"{size} {kind}: {fault}" for fault in faults]
                told[place_of(done)] += 1
                tell(f"{met}: {size} {kind}: {done.errors[0] if done.errors else done.said[-300:]} {faults or ''}")
            resize(_AMPLE if kind == "bytes" else 1 << 16)
            done = ended(out, words)
            wrong += [f"with room: {done.said[-600:]}"] if done.status else []
            wrong += differences(wanted, contents(out), "with room")
    raise typer.Exit(report({"kind": kind, "runs": len(rounds), "full_disks": met, "at": dict(told)}, wrong))


def _suddenly(folder: Path, words: list[str], wanted: dict[str, str], often: int, generator: random.Random) -> int:
    """Let somebody else take all the room that is left, at a random byte; the disk was large enough before."""
    wrong, met, runs, told = list[str](), 0, 0, Counter[str]()
    most = sum(-(-path.stat().st_size // _PAGE) for path in (folder / "undisturbed").rglob("*")) * _PAGE
    while met < often:
        with disk(folder / "disk", "bytes") as resize:
            out, done = folder / "disk" / "out", None
            while done is None or done.status:
                resize(_AMPLE)
                used = resize.used_bytes()  # soon after it, as a rule: a run that goes on has little left to write
                enough = used + (most - used) * generator.random() ** 3
                process, taken = Started(out, words), False
                while met < often and not taken and not process.ends_within(0.001):
                    taken = resize.used_bytes() >= enough
                if taken:
                    resize.take_the_rest()
                done = process.end()
                if done.status and not taken:
                    raise SystemExit(f"A run with room failed: {done.said}")
                if done.status:
                    met += 1
                    faults = faults_of(done, out, wanted)
                    wrong += [f"{met}: {fault}" for fault in faults]
                    told[place_of(done)] += 1
                    tell(f"{met}: {done.errors[0] if done.errors else done.said[-300:]} {faults or ''}")
            runs += 1
            wrong += differences(wanted, contents(out), f"run {runs}")
    return report({"kind": "suddenly", "runs": runs, "full_disks": met, "at": dict(told)}, wrong)


def faults_of(done: Ended, out: Path, wanted: dict[str, str]) -> list[str]:
    """Say what is wrong with how a command ended on a full disk, and with what it left."""
    return [*done.faults(f"The disk that holds {out}"), *half_written(out, wanted)]


def place_of(done: Ended) -> str:
    """Return the name of the file that found no room."""
    return done.errors[0].partition(" is full")[0].rpartition("/")[2] if done.errors else "?"


def sizes_of(undisturbed: Path, kind: Kind, evenly: int) -> list[int]:
    """Return the sizes at which another write meets the end of the disk, ascending."""
    files = sorted((p for p in undisturbed.rglob("*") if p.is_file()), key=lambda path: path.stat().st_mtime_ns)
    if kind == "inodes":  # the root's, one for what fills the last page, and directories
        folders = sum(path.is_dir() for path in undisturbed.rglob("*"))
        return list(range(2, len(files) + folders + 6))
    found, before = {0}, _PAGE  # of the lock
    for path in files:
        pages = -(-path.stat().st_size // _PAGE)
        found |= {before, before + pages // 2 * _PAGE, before + (pages - 1) * _PAGE}
        before += pages * _PAGE
    return sorted(found | {before * step // (evenly + 1) // _PAGE * _PAGE for step in range(1, evenly + 1)})


@contextlib.contextmanager
def disk(place: Path, kind: Kind) -> Iterator["Resize"]:
    """Mount an empty disk with room for nothing."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_PAGE},nr_inodes=64k", "tmpfs", place], check=True)
    try:
        (place / "filled").write_bytes(b"." * _PAGE)  # a tmpfs of size 0 would be one without a limit
        yield Resize(place, kind)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


class Resize:
    """Sets how many bytes, or files and folders, a disk holds."""

    def __init__(self, place: Path, kind: Kind) -> None:
        self._place, self._kind = place, kind

    def __call__(self, size: int) -> None:
        """Grow or shrink it; whoever runs there may go on."""
        limit = f"size={size + _PAGE}" if self._kind == "bytes" else f"size={_AMPLE},nr_inodes={size}"
        subprocess.run(["mount", "-o", f"remount,{limit}", self._place], check=True)

    def used_bytes(self) -> int:
        """Return how much is taken."""
        found = os.statvfs(self._place)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def take_the_rest(self) -> None:
        """Leave nothing but what is used; try again where more has been used meanwhile."""
        for _ in range(100):
            command = ["mount", "-o", f"remount,size={self.used_bytes()}", str(self._place)]
            if not subprocess.run(command, check=False, capture_output=True).returncode:
                return
        raise SystemExit("The disk grew faster than it could be filled.")


if __name__ == "__main__":
    typer.run(main)
