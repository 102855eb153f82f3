"""Change a checkpoint under a build or release at random moments, and see whether what it leaves is of one checkpoint.

    python tools/stress_inputs.py FOLDER CHECKPOINT --trials 40 -- build --model {model} --device raspberry-pi-5
    python tools/stress_inputs.py FOLDER CHECKPOINT -- release release.toml

What follows ``--`` is a command of ``impq-edge`` without its ``-o``, with {model} for the checkpoint; in a file that it
names, such as an order, the checkpoint is FOLDER/model. CHECKPOINT is copied there, and every trial changes the copy
once: weights with the size and time of modification of the old, another file under the same name, configuration,
tokenizer, a file cut short or gone, a change that is taken back at once, and a mere touch. The command must end with
status 0, or with one sentence and status 3. Whatever GGUF it leaves must be one of those that undisturbed runs make,
of the checkpoint that its record tells. Then the checkpoint is put back and the command run again: it must end with the
bytes of an undisturbed run, or name what it began with the changed one. Prints counts as JSON.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from stress_build import contents, differences
from stressed import Started, ended, report, tell

from impq_edge.errors import RecordError
from impq_edge.ggml.header import read_header


def main(
    folder: Annotated[Path, typer.Argument(help="Where all of it goes.")],
    checkpoint: Annotated[Path, typer.Argument(help="A directory with a model.safetensors.")],
    words: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    trials: Annotated[int, typer.Option(help="How many.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Try it so many times, with one change after the other."""
    model = folder / "model"
    words = [word.format(model=model) for word in words]
    wanted, whole_s = _made(folder / "undisturbed", checkpoint, model, words, None)
    generator = random.Random(seed)
    counts, wrong = Counter[str](), list[str]()
    for trial, name in zip(range(trials), [*CHANGES] * trials, strict=False):
        _put_back(checkpoint, model)
        out = folder / f"trial-{trial}"
        process, moment = Started(out, words), generator.uniform(0.0, 0.9) * whole_s
        if not process.ends_within(moment):
            CHANGES[name](model)
        done = process.end()
        how = "done" if not done.status else done.errors[0] if done.errors else done.said[-200:]
        counts[f"{name}: {'done' if not done.status else 'refused'}"] += 1
        faults = [] if not done.status else done.faults(str(model), "Shard ", "sensitivity.json")
        left = dict(map(_identity, _files(out)))
        if left.items() - wanted[0].items():  # it may have begun with the changed one
            changed, _ = _made(folder / "undisturbed", checkpoint, model, words, CHANGES[name])
            faults += [
                f"{of} is of no one checkpoint" for of, _ in left.items() - {*wanted[0].items(), *changed[0].items()}
            ]
            counts["of the changed one"] += 1
        _put_back(checkpoint, model)
        again = ended(out, words)
        if again.status:
            faults += again.faults("sensitivity.json")
            counts["put back: refused"] += 1
        else:
            faults += differences(wanted[1], contents(out), out.name)
        wrong += [f"trial {trial}, {name} after {moment:.1f} s: {fault}" for fault in faults]
        tell(f"trial {trial}: {name} after {moment:.1f} s: {how} {faults or ''}")
        shutil.rmtree(out, ignore_errors=True)
    raise typer.Exit(report({"trials": trials, "ended": dict(sorted(counts.items()))}, wrong))


Made = tuple[dict[str, str], dict[str, str]]


def _made(
    out: Path, checkpoint: Path, model: Path, words: list[str], change: "Callable[[Path], None] | None"
) -> tuple[Made, float]:
    """Return what the GGUFs of an undisturbed run are, all its contents, and how long it took."""
    _put_back(checkpoint, model)
    if change is not None:
        change(model)
    started = time.monotonic()
    done = ended(out, words)
    if done.status and change is None:
        raise SystemExit(f"The undisturbed run failed: {done.said}")
    took_s = time.monotonic() - started
    files = dict(_identity(path) for path in _files(out))
    found = contents(out) if out.exists() else {}
    shutil.rmtree(out, ignore_errors=True)
    return (files, found), took_s


def _files(out: Path) -> list[Path]:
    return sorted(out.rglob("*.gguf"))


def _identity(path: Path) -> tuple[str, str]:
    """Return what a GGUF says of its making, and its own hash."""
    header = read_header(path, RecordError)
    return str(header.keys["impq_edge.recipe"]), contents(path.parent)[path.name]


def _put_back(checkpoint: Path, model: Path) -> None:
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(checkpoint, model)


def _flip(model: Path) -> None:
    """Change weights in the middle of the file; nothing but the bytes and the time of change tells."""
    path = model / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        values = bytearray(file.read(1 << 16))
        for index in range(0, len(values), 64):
            values[index] ^= 0x55
        file.seek(before.st_size // 2)
        file.write(values)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _flip_all(model: Path) -> None:
    """Give every tensor other weights, in another file of the same name, size and time."""
    path = model / "model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start::4096] = bytes(byte ^ 1 for byte in data[start::4096])
    other = model / "other"
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def _flip_and_back(model: Path) -> None:
    kept = (model / "model.safetensors").read_bytes()
    _flip(model)
    time.sleep(0.2)
    with (model / "model.safetensors").open("r+b") as file:
        file.write(kept)


def _configure(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.05}))


def _tokenize(model: Path) -> None:
    path = model / "tokenizer.json"
    found = json.loads(path.read_text())
    merges = found["model"]["merges"]
    found["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
    path.write_text(json.dumps(found))


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 3)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights in place": _flip,
    "another file of weights": _flip_all,
    "weights and back": _flip_and_back,
    "configuration": _configure,
    "tokenizer": _tokenize,
    "weights cut short": _cut,
    "weights gone": lambda model: (model / "model.safetensors").unlink(),
    "configuration gone": lambda model: (model / "config.json").unlink(),
    "touched": lambda model: (model / "model.safetensors").touch(),
}


if __name__ == "__main__":
    typer.run(main)
