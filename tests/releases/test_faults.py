"""Builds and releases under faults: read-only places, checkpoints and files that change, clocks that jump."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import impq_edge
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.devices.profile import load_device
from impq_edge.errors import ImpqError, ModelError, RecordError
from impq_edge.impq.allocation import Allocation
from impq_edge.model.source import find
from impq_edge.releases.order import Order, OrderedDevice, OrderedModel
from impq_edge.releases.release import release
from impq_edge.releases.trial import validated
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.table import Progress
from impq_edge.stages import open_model

GAME = GameOptions(method="impq", permutations=1, tokens=512, calibration_tokens=512)
RTN = dataclasses.replace(GAME, backend_settings={"encode": "rtn"})
ENCODING = EncodeOptions(calibration_tokens=512)
TIMED = (".validation.json", "report.md", "report.html")
DEVICE = "laptop-16gb"


def quick_build(model: Path, out: Path, **changes: object) -> None:
    given: dict[str, Any] = {
        "game": RTN,
        "windows": 1,
        "context_tokens": 64,
        "average_bits": 3,
        "encode": "rtn",
        **changes,
    }
    impq_edge.build(DEVICE, model=str(model), out=out, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): b"" if p.name.endswith(TIMED) else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkpoints["qwen3"], tmp_path_factory.mktemp("faults") / "model"))


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(model, tmp_path_factory.mktemp("wanted"))


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    quick_build(model, out)
    return out


def flip(model: Path) -> None:
    """Write other weights in place; twice gives the old ones back. Sizes and times of modification stay."""
    path = model / "model.safetensors"
    before = path.stat()
    data = np.memmap(path, np.uint8, "r+", offset=before.st_size // 4)
    data[::512] ^= 1
    data.flush()
    del data
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextlib.contextmanager
def flipped_once(model: Path, when: Callable[[str, int, int], bool]) -> Iterator[Progress]:
    """Yield a progress that writes other weights at the first step that is ``when``; the old ones come back."""
    flipped = list[str]()

    def progress(now: str, done: int, total: int) -> None:
        if when(now, done, total) and not flipped:
            flipped.append(now)
            flip(model)

    try:
        yield progress
    finally:
        if flipped:
            flip(model)
    assert flipped


def made(model: Path, folder: Path, **changes: Progress) -> dict[str, bytes]:
    """Play a game and write a file, as a build does, with what GPTQ makes kept between the two."""
    kept, source = folder / "encoded", find(str(model))
    source = dataclasses.replace(source, content_sha256=open_model(source)[1].content_sha256)
    impq_edge.profile(source, out=folder / "s.json", game=GAME, kept=kept, **changes)
    impq_edge.convert(source, out=folder / "m.gguf", type="q2_k", encode=ENCODING, kept=kept, **changes)
    return contents(folder)


@pytest.mark.parametrize("phase", ["quantising", "writing, MiB"])
def test_weights_that_change_while_they_are_read_end_the_stage_and_spoil_nothing(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, phase: str
) -> None:
    with (
        flipped_once(model, lambda now, _done, _total: now == phase) as progress,
        pytest.raises(ModelError, match=r"model\.safetensors: a file of the checkpoint, which changed"),
    ):
        made(model, tmp_path, progress=progress)
    assert not (tmp_path / "m.gguf").exists()
    assert made(model, tmp_path) == wanted  # losses and encodings that were kept are of the checkpoint as it was


def test_a_checkpoint_that_changed_between_two_files_of_a_build_is_named(
    built: Path, model: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    (out / "uniform-4bit.gguf").unlink()
    with (
        flipped_once(model, lambda now, done, total: now == "writing, MiB" and done == total) as progress,
        pytest.raises(ModelError, match=r"model\.safetensors: a file of the checkpoint"),
    ):
        quick_build(model, out, progress=progress)


def test_a_file_that_is_not_the_artifact_is_not_taken_for_it(built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    allocation = Allocation.load(out / "allocation.json")
    record = next(out.glob("*IMPQ*.gguf.json"))
    artifact = dataclasses.replace(Artifact.load(record), sha256="0" * 64)
    path = out / artifact.artifact
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number} and" for number in range(2000)))
    with pytest.raises(RecordError, match="was changed by something else before it was measured; run the same command"):
        validated(path, artifact, load_device(DEVICE), allocation, text, 1, False, lambda *_: None)


def test_nothing_is_decided_by_the_times_of_files(built: Path, model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    for number, path in enumerate(sorted([*out.rglob("*"), *model.rglob("*")])):
        os.utime(path, (number % 2 * 4e9, number % 3 * 2e9))  # 1970, 2033, 2096
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.gguf*")}
    quick_build(model, out)
    assert contents(out) == contents(built) and {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("kind", ["build", "release"])
def test_places_that_cannot_be_written_are_told_in_a_sentence_and_stay_as_they_are(
    built: Path, model: Path, tmp_path: Path, small_disk: Callable[[str], Path], kind: str
) -> None:
    def run(out: Path) -> None:
        if kind == "build":
            quick_build(model, out)
        else:
            release(Order("x", (OrderedModel(str(model)),), (OrderedDevice(DEVICE),)), out=out)

    small = small_disk("size=64m")
    finished = Path(shutil.copytree(built, small / "finished"))
    (small / "file").write_text("kept")
    before = contents(small)
    small_disk("ro")
    for out, message in (
        (small / "new" / "deep", "deep cannot be written: Read-only file system; choose another output path"),
        (finished, "finished cannot be written: Read-only file system"),
        (small / "file", "a file stands where a directory is needed"),
        (small / "file" / "out", "a file stands where a directory is needed"),
    ):
        with pytest.raises(ImpqError, match=message):
            run(out)
    assert contents(small) == before and not (small / "new").exists()
