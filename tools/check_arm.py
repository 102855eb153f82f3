"""Check that a GGUF gives the same answer on 64-bit Arm: score it here and under QEMU's emulation, and compare.

    python tools/check_arm.py FILE.gguf [FILE.gguf …] [--windows 4]
    python tools/check_arm.py FILE.gguf --architecture armv8-a --cpu cortex-a72     a Raspberry Pi 4

What runs on Arm is what a board would run: the wheel of ``scripts/llama-cross``, installed by pip into Debian's own
Python for arm64, and this package's validation code. Prints Markdown rows: perplexities, the divergence of the
predictions, the speed of the emulation; with and without repacked weights (``use_extra_bufts``), and, as a yardstick,
what repacking alone changes here. Exits with 1 where a perplexity on Arm differs by more than ``--tolerance``.

Needs Debian's cross compilers, apt and emulator: apt-get install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user.
The Arm Python and its packages, 90 MB, are fetched once and kept beside the wheel. docs/arm.md has a measured result.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
PYTHON_VERSION = "3.11"  # of Debian 12, whose glibc is the oldest the wheel is meant for
PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)), "manylinux2014_aarch64")  # its pip's
DEBIAN = ("python3.11", "libstdc++6")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SOURCE = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian bookworm main\n"


@dataclasses.dataclass(frozen=True)
class Scored:
    """One file scored on one processor."""

    logits: NDArray[np.float32]  # (scored tokens, vocabulary)
    nll: NDArray[np.float64]  # (scored tokens,), nats
    seconds: float  # loading not included
    tokens: int  # decoded
    system_info: str

    @property
    def perplexity(self) -> float:
        """Of all scored tokens."""
        return float(np.exp(self.nll.mean()))


@dataclasses.dataclass(frozen=True)
class Arm:
    """An emulated processor with a Python that has llama-cpp-python and numpy."""

    root: Path
    site: Path
    cpu: str

    def command(self) -> list[str]:
        """Return what starts the emulated Python."""
        return ["qemu-aarch64", "-cpu", self.cpu, "-L", str(self.root), str(self.root / "usr/bin/python3.11")]

    def environment(self) -> dict[str, str]:
        """Return what it needs in its environment."""
        return {**os.environ, "PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": f"{self.site}:{ROOT}"}


def main() -> int:
    """Parse, score each file on both processors, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens of the shipped text")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--architecture", default="armv8.2-a+dotprod", help="as scripts/llama-cross takes it")
    parser.add_argument("--cpu", default="cortex-a76", help="as qemu-aarch64 takes it")
    parser.add_argument("--tolerance", type=float, default=0.01, help="largest relative difference of a perplexity")
    parser.add_argument("--score", nargs=2, metavar=("BUFTS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.score:
        score(options.files[0], options.windows, options.threads, options.score[0] == "1", Path(options.score[1]))
        return 0
    arm = prepare(options.architecture, options.cpu)
    print("| file | compared | perplexity of the first | of the second | difference | mean KLD, nats | same top token "
          "| largest logit difference | tokens/s of the second |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    told = set()
    for file in options.files:
        here = {bufts: run(None, file, options, bufts) for bufts in (False, True)}
        print(row(file.name, "x86-64, x86-64 repacked", here[False], here[True]), flush=True)
        for bufts, name in ((False, "x86-64, Arm"), (True, "x86-64 repacked, Arm repacked")):
            there = run(arm, file, options, bufts)
            told |= {here[bufts].system_info, there.system_info}
            worst = max(worst, abs(there.perplexity / here[bufts].perplexity - 1))
            print(row(file.name, name, here[bufts], there), flush=True)
    print(*sorted(told), sep="\n", file=sys.stderr)
    return int(worst > options.tolerance)


def row(name: str, compared: str, here: Scored, there: Scored) -> str:
    """Return a row of the table."""
    p, q = log_softmax(here.logits), log_softmax(there.logits)
    kld = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    top = float((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    largest = float(np.abs(here.logits - there.logits).max())
    return (
        f"| {name} | {compared} | {here.perplexity:.4f} | {there.perplexity:.4f} "
        f"| {there.perplexity / here.perplexity - 1:+.3%} | {kld:.2e} | {top:.2%} | {largest:.3f} "
        f"| {there.tokens / there.seconds:.0f} |"
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities, (tokens, vocabulary)."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    return result


def run(arm: Arm | None, file: Path, options: argparse.Namespace, bufts: bool) -> Scored:
    """Score a file in a process of its own, on this processor or the emulated one."""
    command = arm.command() if arm else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scored.npz"
        arguments = [file.resolve(), "--windows", options.windows, "--threads", options.threads]
        done = subprocess.run(
            [*command, str(Path(__file__).resolve()), *map(str, arguments), "--score", str(int(bufts)), str(out)],
            env=arm.environment() if arm else {**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"check_arm: scoring {file} {'on the emulated Arm' if arm else 'here'} ended with {done.returncode}"
            )
        with np.load(out) as saved:
            fields: dict[str, Any] = {name: saved[name] for name in saved.files}
    scalars = {"seconds": float, "tokens": int, "system_info": str}
    return Scored(**fields | {name: kind(fields[name]) for name, kind in scalars.items()})


def score(file: Path, windows: int, threads: int, bufts: bool, out: Path) -> None:
    """Score windows of the shipped text as ``impq-edge validate`` does, and keep the logits."""
    from impq_edge.validation import llama
    from impq_edge.validation.llama import Engine
    from impq_edge.validation.perplexity import CHUNK_TOKENS, WINDOW_TOKENS, cut_windows, nll, scored_logits
    from impq_edge.validation.settings import RunSettings

    settings = RunSettings(WINDOW_TOKENS, threads, 256, 256, CHUNK_TOKENS, use_extra_bufts=bufts)
    text = (ROOT / "impq_edge/data/demo/evaluation.txt").read_text("utf-8")
    kept, losses = [], []
    with Engine(file, settings) as engine:
        cut = cut_windows(engine, text, windows)
        start = time.perf_counter()
        for window in cut:
            for logits, targets in scored_logits(engine, window):
                kept.append(logits.copy())
                losses.append(nll(logits, targets))
        seconds = time.perf_counter() - start
    np.savez(
        out,
        logits=np.concatenate(kept),
        nll=np.concatenate(losses),
        seconds=seconds,
        tokens=len(cut) * (WINDOW_TOKENS - 1),
        system_info=llama.system_info(),
    )


def prepare(architecture: str, cpu: str) -> Arm:
    """Return an Arm Python with the cross-compiled wheel; fetch and build what is missing."""
    for tool in ("qemu-aarch64", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"check_arm: {tool} is missing; on Debian: apt-get install qemu-user apt dpkg")
    done = subprocess.run([ROOT / "scripts/llama-cross", architecture], check=True, capture_output=True, text=True)
    wheel = Path(done.stdout.strip())
    root, site = wheel.parent / "arm-python", wheel.parent / "arm-packages"
    if not root.exists():
        with unfinished(root) as folder:
            fetch_python(folder)
    if not site.exists():
        with unfinished(site) as folder:
            install(wheel, folder)
    return Arm(root, site, cpu)


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a folder that gets its name only when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        yield made
        made.rename(folder)


def fetch_python(root: Path) -> None:
    """Unpack Debian's Python for arm64 and all it needs, without installing anything on this system."""
    with tempfile.TemporaryDirectory() as folder:
        apt = Path(folder)
        for name in ("state/lists/partial", "cache/archives/partial", "parts"):
            (apt / name).mkdir(parents=True)
        (apt / "status").touch()
        (apt / "sources.list").write_text(SOURCE)
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures::": "arm64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Debug::NoLocking": "true",
            "Dir::State": apt / "state",
            "Dir::State::status": apt / "status",
            "Dir::Cache": apt / "cache",
            "Dir::Etc::sourcelist": apt / "sources.list",
            "Dir::Etc::sourceparts": apt / "parts",
        }
        command = ["apt-get", "-qq", "-y", *(f"-o{name}={value}" for name, value in options.items())]
        subprocess.run([*command, "update"], check=True, stdout=sys.stderr)
        subprocess.run([*command, "--download-only", "install", *DEBIAN], check=True, stdout=sys.stderr)
        for package in sorted((apt / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)


def install(wheel: Path, site: Path) -> None:
    """Install the wheel and what it depends on as pip on the board would choose them."""
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile",
         "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON_VERSION, *platforms,
         "--constraint", ROOT / "constraints.txt", "--target", site, wheel],
        check=True, stdout=sys.stderr,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
