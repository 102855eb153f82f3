"""Thousands of broken inputs: only sentences come out, soon and in little memory.

The long run: ``IMPQ_FUZZ_COUNT=20000 pytest -m slow tests/fuzz``; ``IMPQ_FUZZ_SEED`` draws other inputs.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import seeds
from fuzz.mutations import broken_bytes
from fuzz.release_inputs import manifest, write_release
from fuzz.targets import targets

from impq_edge.errors import ImpqError, ValidationError
from impq_edge.releases.verify import verify
from impq_edge.validation.file import read_facts
from impq_edge.validation.process import run_child
from impq_edge.validation.results import MemoryLimit
from impq_edge.validation.sample import write_sample
from impq_edge.validation.settings import RunSettings

TESTS = Path(__file__).parents[1]
FEW, SEED = 40, 0
MANY = int(os.environ.get("IMPQ_FUZZ_COUNT", "3000"))
OTHER_SEED = int(os.environ.get("IMPQ_FUZZ_SEED", "1"))
LLAMA_INPUTS = 40

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the worker's limits are Linux's")


def fuzz(count: int, seed: int, *names: str) -> None:
    """Run the worker and tell the first failures, each with what it takes to see it again."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.worker", str(count), str(seed), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["target"] for report in reports] == list(names)
    for report in reports:
        told = "\n".join(f"{report['target']} {seed} {f['index']}: {f['what']}" for f in report["failures"])
        assert not told, told[:8000]
        assert sum(report["outcomes"].values()) == count


def test_few_broken_inputs_of_every_kind_end_in_sentences() -> None:
    fuzz(FEW, SEED, *targets())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(targets()))
def test_many_broken_inputs_end_in_sentences(name: str) -> None:
    fuzz(MANY, OTHER_SEED, name)


NEVER_SOUND = {"card", "tokenizer", "windows", "release.toml", "manifest", "release directory", "hub", "agent"}
"""Targets that refuse nothing, or whose inputs are also broken by other names, headers, orders and kinds of file."""


@pytest.mark.parametrize("name", [name for name in targets() if name not in NEVER_SOUND])
def test_sound_inputs_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (
        "broken_bytes",
        "broken_json",
        "broken_text",
    ):  # else nothing would show that refusals mean anything
        monkeypatch.setattr(f"fuzz.targets.{function}", _unbroken)
    folder = tmp_path / "input"
    folder.mkdir()
    rng = random.Random(3)
    given = targets()[name].write(folder, rng)
    if name == "gguf split":
        given = folder / "model-00001-of-00002.gguf"
    targets()[name].read(given)


def _unbroken(value: object, _rng: random.Random, within: int | None = None) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def test_a_sound_release_directory_is_read(tmp_path: Path) -> None:
    write_release(tmp_path, json.dumps(manifest().to_json()).encode())
    assert verify(tmp_path).findings == ()


@pytest.mark.slow
def test_whatever_llama_cpp_makes_of_a_broken_file_ends_in_a_sentence(tmp_path: Path) -> None:
    """Files whose header we accept, with other numbers in it than the model has, or other weights."""
    write_sample(tmp_path / "sound.gguf")
    sound = (tmp_path / "sound.gguf").read_bytes()
    header_bytes = min(fact.offset_bytes for fact in read_facts(tmp_path / "sound.gguf").tensors)
    settings = dataclasses.asdict(RunSettings(256, 1))
    memory = MemoryLimit(1 << 29, "data limit and polling")
    outcomes = {"decoded": 0, "refused": 0}
    rng, index = random.Random(f"llama.cpp {OTHER_SEED}"), 0
    while sum(outcomes.values()) < LLAMA_INPUTS:
        index += 1
        path = tmp_path / "broken.gguf"
        path.write_bytes(broken_bytes(sound, rng, within=header_bytes if index % 4 else None))
        try:
            read_facts(path)
        except ImpqError:
            continue  # never reaches llama.cpp
        job = {"kind": "decode", "file": str(path), "settings": settings}
        try:
            run_child(job, timeout_s=60, memory=memory)
            outcomes["decoded"] += 1
        except ValidationError as error:
            outcomes["refused"] += 1
            assert str(error).endswith("."), f"input {index}: {error}"
            assert str(error).isprintable(), f"input {index}: {error}"
    print(outcomes)
    assert outcomes["refused"]


def test_the_seeds_are_small() -> None:
    assert len(seeds.gguf()) < 10_000
