"""Calibrating this machine, with models so small that it takes seconds: what it writes, keeps, refuses and resumes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from impq_edge.devices.latency import model_size, predict_speeds
from impq_edge.devices.profile import device_names, load_device, load_uncalibrated
from impq_edge.errors import DeviceError, ValidationError
from impq_edge.ggml.types import TensorType
from impq_edge.records import load_toml
from impq_edge.validation.calibration import Measurements, calibrate, plan_trials
from impq_edge.validation.machine import cache_bytes, cpu_name
from impq_edge.validation.process import run_child
from impq_edge.validation.results import Times
from impq_edge.validation.shapes import read_shapes
from impq_edge.validation.synthetic import write_random

TYPES = (TensorType.Q4_K, TensorType.Q8_0)
WEIGHTS, LARGE = 1_000_000, 12_000_000
MINE = """
name = "mine"  # a comment, which is lost
title = 'My "machine" \\ ü'
memory_bytes = "4 GiB"
system_reserve_bytes = "512 MiB"
cores = 2
threads = 1
isa = "x86-64+avx2"
memory_bandwidth_bytes_per_s = 17e9
context_tokens = 64
mmap = true

[identify]
cpu = "no processor is called so"

[sources]
memory_bytes = "Read off the box."
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_a_calibrated_profile_is_the_old_one_with_speeds(mine: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out" / "calibrated.toml", []
    Measurements("0" * 64).save(out.with_name("calibrated.toml.measurements.json"))  # of other settings: not used
    out.with_name(".calibrated.toml.models").mkdir()
    (out.with_name(".calibrated.toml.models") / "left-by-a-killed-run").write_text("")
    made = calibrate(
        str(mine), out, minutes=0, force=True, types=TYPES, weights=WEIGHTS, large_weights=LARGE, say=told.append
    )
    assert [path.name for path in out.parent.iterdir()] == ["calibrated.toml"]
    assert len(told) == 1 and told[0].startswith("This writes 11 models of ")

    before, after = load_toml(mine), load_toml(out)
    speed, source = after.pop("speed"), after["sources"].pop("speed")
    assert after == before and "Measured on the device" in source
    assert (speed["threads"], speed["rounds"], speed["prompt_tokens"]) == (1, 3, 64)
    assert (speed["small_weights"], speed["large_weights"]) == (WEIGHTS, LARGE)
    assert speed["llama_cpp"] and "CPU" in speed["system_info"] and speed["cpu"] == cpu_name()

    loaded = load_device(str(out))
    assert loaded.speed == made.speed and loaded.speed and loaded.speed.plain and loaded.speed.repacked
    for kernels in (loaded.speed.plain, loaded.speed.repacked):
        assert set(kernels.generation.weight_s) == set(kernels.prompt.weight_s) == set(TYPES)
        assert kernels.generation.large_weight_s and set(kernels.generation.large_weight_s) == set(TYPES)
        # One core multiplies between a thousand million and a million million weights a second.
        assert all(1e-12 < cost < 1e-8 for cost in kernels.generation.weight_s.values())
    trial = plan_trials(TYPES, WEIGHTS, 2048)[0]
    speeds = predict_speeds(trial.spec, trial.types, loaded)
    assert speeds.basis == "formats" and speeds.generation and speeds.prompt

    out.write_text(out.read_text().replace("threads = 1", "threads = 2", 1))
    with pytest.raises(DeviceError, match=r"speed was measured with other threads.*run calibrate-device again"):
        load_device(str(out))
    assert load_uncalibrated(str(out))[0].threads == 2


def test_an_interrupted_calibration_goes_on(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibrated.toml"
    journal = tmp_path / "calibrated.toml.measurements.json"
    seen: list[tuple[str, int, int]] = []

    def stop_in_the_second_turn(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if (stage, done) == ("timing models", 10):
            raise KeyboardInterrupt

    options = {"minutes": 0.0, "force": True, "types": TYPES, "weights": WEIGHTS, "large_weights": 0}
    with pytest.raises(KeyboardInterrupt):
        calibrate(str(mine), out, progress=stop_in_the_second_turn, **options)  # type: ignore[arg-type]
    assert seen[-1] == ("timing models", 10, 54)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, journal.name}
    kept = Measurements.load(journal)
    assert [turn.use_extra_bufts for turn in kept.turns] == [False] and len(kept.turns[0].times) == 9

    # The kept times are really used: were they absurd, the fit would be.
    absurd = tuple(Times(t.prompt_s, (1e3,) * 9, (1e3,) * 9) for t in kept.turns[0].times)
    dataclasses.replace(kept, turns=(dataclasses.replace(kept.turns[0], times=absurd),)).save(journal)
    seen.clear()
    made = calibrate(str(mine), out, progress=lambda *step: seen.append(step), **options)  # type: ignore[arg-type]
    assert next(step for step in seen if step[0] == "timing models") == ("timing models", 9, 54)
    assert not journal.exists() and out.exists()
    assert made.speed and made.speed.plain and made.speed.repacked
    trial = plan_trials(TYPES, WEIGHTS, 2048)[0]
    device = dataclasses.replace(made, use_extra_bufts=False)
    slow = predict_speeds(trial.spec, trial.types, device).generation
    assert slow and slow.likely_tok_per_s < 1


def test_another_machine_is_refused(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibrated.toml"
    with pytest.raises(ValidationError, match=r"mine is not this machine.* --force"):
        calibrate(str(mine), out)
    mine.write_text(MINE.replace('cpu = "no processor is called so"', ""))
    with pytest.raises(ValidationError, match=r"mine is not this machine|mine says nothing by which to recognise it"):
        calibrate(str(mine), out)
    mine.write_text(MINE.replace("threads = 1", "threads = 9999").replace("cores = 2", "cores = 9999"))
    with pytest.raises(ValidationError, match="mine runs 9999 threads, but this process may use"):
        calibrate(str(mine), out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name}


@pytest.mark.parametrize("kind", ["f16", "q2_k", "q5_1"])
@pytest.mark.parametrize("shape", [2, 5])
def test_random_models_run_and_are_read_back(tmp_path: Path, kind: str, shape: int) -> None:
    trial = plan_trials([TensorType(kind)], WEIGHTS, 512)[shape]
    path = tmp_path / "random.gguf"
    write_random(path, trial.spec, trial.types)
    assert 0 < path.stat().st_size - trial.file_bytes < 50_000
    spec, types = read_shapes(path)
    assert types == {t.gguf_name: trial.types[t.gguf_name] if t.role != "vector" else "f32" for t in trial.spec.tensors}
    assert {t.gguf_name: (t.shape, t.role, t.block) for t in spec.tensors} == {
        t.gguf_name: (t.shape, t.role, t.block) for t in trial.spec.tensors
    }
    settings = {"context_tokens": 64, "threads": 1}
    assert run_child({"kind": "decode", "file": str(path), "settings": settings}, timeout_s=60) == {"tokens": 32}


def test_models_are_of_one_size_and_of_every_type() -> None:
    trials = plan_trials(tuple(TensorType), 12_000_000, 4096, 128_000_000)
    sizes = {trial.spec.name.split("-")[0]: model_size(trial.spec) for trial in trials}
    assert sizes.keys() == {"wide", "deep", "heads", "dimensions", "softcap", "short", "logits", "large"}
    for name, size in sizes.items():
        wanted = {"large": 128_000_000, "short": 1_600_000}.get(name, 12_000_000)
        assert 0.9 * wanted < size < 1.1 * wanted, name
    for kind in TensorType:
        assert sum(set(trial.types.values()) == {kind} for trial in trials) >= 3


def test_the_machine_is_described_or_nothing_is_said(tmp_path: Path) -> None:
    assert cpu_name(tmp_path) == "" and cache_bytes(tmp_path) == 0
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    for index, size in enumerate(("64K", "512K", "2M", "odd")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert cpu_name(tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"
    assert cache_bytes(tmp_path) == 2 << 20


@pytest.mark.parametrize("name", device_names())
def test_a_shipped_device_survives_being_written(name: str, tmp_path: Path) -> None:
    from impq_edge.records import to_toml

    device, given = load_uncalibrated(name)
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(given))
    assert load_toml(path) == given and load_device(str(path)) == device


def test_odd_texts_survive_toml(tmp_path: Path) -> None:
    from impq_edge.records import to_toml

    odd: dict[str, Any] = {"a b": 'quo"te \\ \n \t \x7f \u2028 ü 😀', "e": ""}
    odd["n"] = {"x.y": {"z": 1e-12, "big": 1e22, "yes": True, "no": -3}}
    (tmp_path / "odd.toml").write_text(to_toml(odd))
    assert load_toml(tmp_path / "odd.toml") == odd
    assert json.loads(json.dumps(odd)) == odd
