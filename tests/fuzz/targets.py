"""What reads input that nobody has vouched for: for each, sound inputs to break and the function that reads them."""

import dataclasses
import functools
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import release_inputs, seeds, service_inputs
from fuzz.mutations import broken_bytes, broken_json, broken_text

from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.card import read_card
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import DeviceProfile, is_this_machine, load_device
from impq_edge.errors import ConversionError
from impq_edge.ggml.header import read_header
from impq_edge.impq.allocation import Allocation
from impq_edge.impq.problem import Constraint
from impq_edge.model.calibration import read_windows
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.records import Record
from impq_edge.releases.lent import BackendLosses
from impq_edge.spqe.choice import choose
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.validation.doctor import DoctorReport
from impq_edge.validation.file import read_facts
from impq_edge.validation.inspection import Inspection, inspect
from impq_edge.validation.report import ValidationReport


@dataclasses.dataclass(frozen=True)
class Target:
    """One way in."""

    name: str
    write: Callable[[Path, random.Random], Path]  # makes a broken input in a folder; returns what ``read`` is given
    read: Callable[[Path], object]
    of_one_file: bool = True  # whether the input is a path that may as well be a pipe or a directory


def _binary(make: Callable[[], bytes], name: str) -> Callable[[Path, random.Random], Path]:
    def write(folder: Path, rng: random.Random) -> Path:
        data = make()
        (folder / name).write_bytes(broken_bytes(data, rng, within=rng.choice((64, 512, 4096, None))))
        return folder / name

    return write


def _json(make: Callable[[], Any], name: str = "record.json") -> Callable[[Path, random.Random], Path]:
    def write(folder: Path, rng: random.Random) -> Path:
        (folder / name).write_bytes(broken_json(make(), rng))
        return folder / name

    return write


def _text(make: Callable[[], str], name: str) -> Callable[[Path, random.Random], Path]:
    def write(folder: Path, rng: random.Random) -> Path:
        (folder / name).write_bytes(broken_text(make(), rng))
        return folder / name

    return write


def _split(folder: Path, rng: random.Random) -> Path:
    files = seeds.split_gguf()
    chosen = rng.choice(list(files))
    for name, data in files.items():
        (folder / name).write_bytes(broken_bytes(data, rng) if name == chosen else data)
    if rng.random() < 0.1:
        (folder / rng.choice(list(files))).unlink()
    return folder / rng.choice(list(files))


def _checkpoint(folder: Path, rng: random.Random) -> Path:
    files = seeds.checkpoint(rng.choice(("one", "shards")))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    chosen = rng.choice(["config.json", "config.json", *files])
    data = files[chosen]
    if chosen.endswith(".safetensors"):
        size = struct.unpack("<Q", data[:8])[0]
        if rng.random() < 0.5:
            data = broken_bytes(data, rng, within=8 + size)
        else:  # a sound frame around a broken header
            header = broken_json(json.loads(data[8 : 8 + size]), rng)
            data = struct.pack("<Q", len(header)) + header + data[8 + size :]
    else:
        data = broken_json(json.loads(data), rng)
    (folder / chosen).write_bytes(data)
    return folder


def _tokenizer(folder: Path, rng: random.Random) -> Path:
    files = seeds.tokenizer(rng.choice(("byte-level", "sentencepiece")))
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), "utf-8")
    chosen = rng.choice(["tokenizer.json", *files])
    (folder / chosen).write_bytes(broken_json(files[chosen], rng))
    if rng.random() < 0.05:
        (folder / "chat_template.jinja").write_bytes(broken_text("{{ messages }}\n", rng))
    return folder


def _card(folder: Path, rng: random.Random) -> Path:
    (folder / "README.md").write_bytes(broken_text(seeds.CARD, rng))
    return folder


def _journal(folder: Path, rng: random.Random) -> Path:
    texts = [broken_json(line, rng) if rng.random() < 0.3 else json.dumps(line).encode() for line in seeds.JOURNAL]
    data = b"".join(f"{zlib.crc32(text):08x} ".encode() + text + b"\n" for text in texts)
    (folder / "journal").write_bytes(broken_bytes(data, rng) if rng.random() < 0.5 else data)
    return folder / "journal"


def _read_header(path: Path) -> None:
    read_header(path, ConversionError, lists=("general.tags", "tokenizer.ggml.tokens"))


def _read_facts(path: Path) -> None:
    facts = read_facts(path)
    assert facts.bits_per_weight > 0
    assert facts.trained_context_tokens is None or facts.trained_context_tokens > 0


def _inspect(path: Path) -> None:
    found = inspect(path)
    json.dumps(found.to_json(), allow_nan=False)


def _read_device(path: Path) -> None:
    device = load_device(str(path))
    is_this_machine(device)
    spec, types, header = seeds.model(), seeds.uniform_types(), 1 << 20
    memory_plan(spec, types, header, device)


def _read_tokenizer(path: Path) -> None:
    read_tokenizer(path, seeds.TOKENIZER_ROWS, "llama")


def _read_windows(path: Path) -> None:
    text = path / "text"
    text.write_text("Once upon a time there was a model. " * 20)
    try:
        read_windows(path, text, 64, 32)
    except Exception as error:
        if type(error) is Exception:  # of a tokenizer that was read but cannot encode: read_tokenizer goes first
            return
        raise


def _record(kind: type[Record], check: Callable[[Any], object]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        found = kind.load(path)
        json.dumps(found.to_json(), allow_nan=False)
        assert len(found.identity()) == 64
        check(found)

    return read


def _read_journal(path: Path) -> None:
    journal = Journal(path, seeds.JOURNAL_INPUTS)
    for losses in journal.losses.values():
        assert losses.dtype == np.float64


def _look_at_profile(profile: SensitivityProfile) -> None:
    profile.estimate()
    if profile.design.rounds is not None and profile.n_players == 2:
        choose(profile, (Constraint("file budget", "bytes", ((0, 10), (0, 12)), 15),))


def _look_at_ladder(profile: LadderProfile) -> None:
    profile.divergences()


def _look_at_allocation(allocation: Allocation) -> None:
    allocation.check(seeds.model())


def _look_at_spec(spec: ModelSpec) -> None:
    assert spec.weights is not None
    spec.block_matrices(0)


def _look_at_artifact(artifact: Artifact) -> None:
    artifact.is_intact(Path("/nowhere"))


@functools.cache
def targets() -> dict[str, Target]:
    """Return all of them by name."""
    records: list[tuple[type[Record], Callable[[Any], object]]] = [
        (SensitivityProfile, _look_at_profile),
        (LadderProfile, _look_at_ladder),
        (Allocation, _look_at_allocation),
        (Artifact, _look_at_artifact),
        (ValidationReport, lambda _: None),
        (ModelSpec, _look_at_spec),
        (DoctorReport, lambda _: None),
        (Inspection, lambda _: None),
        (BackendLosses, lambda _: None),
        (DeviceProfile, is_this_machine),
    ]
    found = [
        Target("gguf header", _binary(seeds.gguf, "model.gguf"), _read_header),
        Target("gguf facts", _binary(seeds.gguf, "model.gguf"), _read_facts),
        Target("gguf split", _split, _read_facts, of_one_file=False),
        Target("gguf inspect", _binary(seeds.gguf, "model.gguf"), _inspect),
        Target("imatrix", _binary(seeds.imatrix, "imatrix.gguf"), Imatrix.read),
        Target("device", _text(seeds.device_toml, "device.toml"), _read_device),
        Target("checkpoint", _checkpoint, read_model, of_one_file=False),
        Target("tokenizer", _tokenizer, _read_tokenizer, of_one_file=False),
        Target("windows", _tokenizer, _read_windows, of_one_file=False),
        Target("card", _card, read_card, of_one_file=False),
        Target("journal", _journal, _read_journal),
        Target("release.toml", release_inputs.order_from_anybody, release_inputs.read_order, of_one_file=False),
        Target("manifest", release_inputs.renamed_manifest, release_inputs.read_manifest),
        Target(
            "release directory", release_inputs.release_from_anybody, release_inputs.check_release, of_one_file=False
        ),
        Target("kept encodings", release_inputs.kept_encodings, release_inputs.read_kept, of_one_file=False),
        Target("hub", service_inputs.hub_answers, service_inputs.ask_hub, of_one_file=False),
        Target("agent", service_inputs.agent_answers, service_inputs.hear_agent, of_one_file=False),
        *(
            Target(kind.__name__, _json(functools.partial(seeds.record, kind)), _record(kind, check))
            for kind, check in records
        ),
        *(
            Target(f"{kind.__name__} of rounds", _json(functools.partial(seeds.in_rounds, kind)), _record(kind, check))
            for kind, check in records
            if kind in (SensitivityProfile, Allocation)
        ),
    ]
    return {target.name: target for target in found}
