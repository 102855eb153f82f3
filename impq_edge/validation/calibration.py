"""The stage: a device profile on the device itself → the same with measured speeds.

Models of random weights are timed in turns, so that a machine that slows down slows all of them, and medians are
fitted. Every format appears in a wide model and in a deep, narrow one; five more have many heads, large heads,
softcapped attention, and next to no blocks, with few or with many softcapped logits, so that what else takes time can
be told apart. All but one have about as many weights, so that caches serve them alike: where they fit the last-level
cache, a large model of every format follows.
"""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

from impq_edge.devices.fitting import Observation, fit_speeds
from impq_edge.devices.latency import PROMPT_TOKENS
from impq_edge.devices.profile import DeviceProfile, is_this_machine, load_uncalibrated
from impq_edge.devices.speeds import KernelSpeeds, MeasuredSpeeds
from impq_edge.errors import ValidationError
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, data_bytes
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT, Record, atomic_path, sha256_json, to_toml
from impq_edge.validation.machine import cache_bytes, cpu_name
from impq_edge.validation.process import Progress, run_child
from impq_edge.validation.results import Build, Times
from impq_edge.validation.settings import RunSettings
from impq_edge.validation.synthetic import gemma_shape, llama_shape, model_of, write_random
from impq_edge.validation.validate import available_threads, device_settings

TYPES = tuple(kind for kind in TensorType if kind not in {TensorType.F32, TensorType.BF16})
"""The formats measured: all that an allocation can hold."""

DEFAULT_MINUTES = 5.0
_GENERATED_TOKENS = 32
_REPETITIONS = 2  # each time a file is loaded, after a warm-up
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 12
_TIMEOUT_S = 3600.0
# Weights of a model: more than the last-level cache holds where that takes less than _MOST_WEIGHTS; else few, and a
# large model follows.
_USUAL_WEIGHTS, _MOST_WEIGHTS = 12_000_000, 64_000_000
_LARGE_WEIGHTS = 128_000_000
_BEYOND_CACHE = 1.5
_OF_FREE_MEMORY = 0.25  # for all files, which should stay in the page cache
_OVERHEAD_TYPE = TensorType.Q8_0


@dataclasses.dataclass(frozen=True)
class Trial:
    """A model to be timed."""

    spec: ModelSpec
    types: TensorTypes
    large: bool = False  # timed once per round, and no tokens after the prompt

    @property
    def file_bytes(self) -> int:
        """Bytes of its tensors."""
        return data_bytes(self.spec, self.types)


@dataclasses.dataclass(frozen=True)
class Turn:
    """All models timed once under one setting."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    use_extra_bufts: bool
    times: tuple[Times, ...]


@dataclasses.dataclass(frozen=True)
class Measurements(Record):
    """What has been measured so far, kept until the profile is whole."""

    SCHEMA: ClassVar[str] = "impq-edge.measurements/1"

    request_sha256: str  # of everything the times depend on
    turns: tuple[Turn, ...] = ()


def calibrate(
    name_or_path: str,
    out: Path,
    *,
    minutes: float = DEFAULT_MINUTES,
    force: bool = False,
    types: Sequence[TensorType] = TYPES,
    weights: int | None = None,
    large_weights: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _stage, _done, _total: None,
) -> DeviceProfile:
    """Measure the formats' speeds on this machine and write a copy of its profile that holds them.

    Parameters
    ----------
    name_or_path
        The device: a shipped name or a TOML file.
    out
        The TOML to write; beside it, finished measurements are kept until it is whole, and a killed run goes on.
    minutes
        How long to measure; three rounds are made in any case.
    force
        Whether to trust that this machine is the device.
    types, weights, large_weights
        Formats to measure, and weights of each model; chosen for the machine by default, 0 for no large ones.
    say
        Told what is going to happen.

    Raises
    ------
    ValidationError
        When this machine is not the device or has too little of something, or llama.cpp dies.
    """
    device, given = load_uncalibrated(name_or_path)
    _require_device(device, force)
    prompt_tokens = min(PROMPT_TOKENS, device.context_tokens)
    context = max(device.context_tokens, prompt_tokens + _GENERATED_TOKENS)
    small, large = _sizes(types, device)
    weights, large_weights = weights or small, large if large_weights is None else large_weights
    trials = plan_trials(types, weights, context, large_weights)
    folder = out.with_name(f".{out.name}.models")
    _require_room(trials, out, folder)
    build = Build(**run_child({"kind": "describe"}, timeout_s=_TIMEOUT_S))
    settings = dataclasses.replace(
        device_settings(device, device.threads), context_tokens=prompt_tokens + _GENERATED_TOKENS
    )
    total_bytes = sum(trial.file_bytes for trial in trials)
    say(f"This writes {len(trials)} models of {total_bytes / 2**20:,.0f} MiB beside {out} for as long as it runs, "
        f"and takes {minutes:g} minutes, or longer where three rounds of all need it.")  # fmt: skip
    request = sha256_json([cpu_name(), build.system_info, build.llama_cpp, dataclasses.asdict(settings), repr(trials)])
    try:
        files = _written(trials, folder, progress)
        tasks = [_task(file, trial, prompt_tokens) for file, trial in zip(files, trials, strict=True)]
        turns = _measured(tasks, settings, out, request, device, 60 * minutes, say, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = (weights, large_weights or weights)
    speed = _speeds(device, settings, build, trials, turns, prompt_tokens, sizes)
    _save(given, speed, out)
    _journal(out).unlink(missing_ok=True)
    return dataclasses.replace(device, speed=speed)


def plan_trials(types: Sequence[TensorType], weights: int, context: int, large_weights: int = 0) -> tuple[Trial, ...]:
    """Return the models to time, of about that many weights."""
    trials = []

    def add(name: str, kind: TensorType, blocks: float, **shape: int) -> None:
        make = gemma_shape if name in {"softcap", "logits"} else llama_shape
        hyper = make(blocks=max(2, round(blocks)), **{"head_dim": 64, "vocabulary": 256, "context": context, **shape})
        spec = model_of(f"{name}-{kind}", hyper)
        trials.append(Trial(spec, {tensor.gguf_name: kind for tensor in spec.tensors}, name == "large"))

    wide_block, deep_block = 3_932_160, 786_432  # weights
    for kind in types:
        add("wide", kind, weights / wide_block, hidden=1024, ffn=1024, heads=4, kv_heads=2)
        add("deep", kind, weights / deep_block, hidden=256, ffn=768, heads=4, kv_heads=2)
    kind = _OVERHEAD_TYPE if _OVERHEAD_TYPE in types else types[0]
    heads_block = 983_040
    add("heads", kind, weights / heads_block, hidden=256, ffn=256, heads=16, kv_heads=8)
    add("dimensions", kind, weights / heads_block, hidden=256, ffn=256, heads=4, kv_heads=2, head_dim=256)
    add("short", kind, 2, hidden=256, ffn=768, heads=4, kv_heads=2)
    add("softcap", kind, weights / deep_block, hidden=256, ffn=768, heads=4, kv_heads=2)
    logits = max(4096, (weights - 2 * deep_block) // 256)
    add("logits", kind, 2, hidden=256, ffn=768, heads=4, kv_heads=2, vocabulary=logits)
    for kind in types if large_weights else ():
        add("large", kind, large_weights / wide_block, hidden=1024, ffn=1024, heads=4, kv_heads=2)
    return tuple(trials)


def _require_device(device: DeviceProfile, force: bool) -> None:
    if device.threads > available_threads():
        raise ValidationError(
            f"{device.name} runs {device.threads} threads, but this process may use {available_threads()} processors; "
            "calibrate on the device, or with a profile of this machine."
        )
    if not force and not is_this_machine(device):
        why = "is not this machine" if device.identify else "says nothing by which to recognise it"
        raise ValidationError(
            f"{device.name} {why}, and speeds of another would be wrong; run this on the device, or pass --force if "
            "this is it."
        )


def _sizes(types: Sequence[TensorType], device: DeviceProfile) -> tuple[int, int]:
    """Choose the weights of small models and of large ones, 0 for none, by cache and memory.

    By the profile's memory, not by what is free at the moment: a run that goes on must choose the same again.
    """
    bytes_per_weight = [kind.bits_per_weight / 8 for kind in types]
    beyond_cache = round(_BEYOND_CACHE * cache_bytes() / min(bytes_per_weight))
    small, large = max(_USUAL_WEIGHTS, beyond_cache), 0
    if beyond_cache > _MOST_WEIGHTS:
        small, large = _USUAL_WEIGHTS, _LARGE_WEIGHTS
    free_bytes = device.memory_bytes - device.system_reserve_bytes
    most = round(_OF_FREE_MEMORY * free_bytes / sum(bytes_per_weight))  # of one model of every type
    large = min(large, most - 3 * small)  # of the small ones there are two, and a few
    return min(small, most // 3), large if large > 4 * small else 0


def _require_room(trials: Sequence[Trial], out: Path, folder: Path) -> None:
    needed = sum(trial.file_bytes for trial in trials)
    shutil.rmtree(folder, ignore_errors=True)  # a killed run's
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValidationError(
            f"The models to be timed take {needed / 2**20:,.0f} MiB, but {place} has {free / 2**20:,.0f} MiB free; "
            "choose another place with -o."
        )


def _written(trials: Sequence[Trial], folder: Path, progress: Progress) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for done, trial in enumerate(trials):
        progress("writing models", done, len(trials))
        path = folder / f"{trial.spec.name}.gguf"
        write_random(path, trial.spec, trial.types)
        files.append(str(path))
    progress("writing models", len(trials), len(trials))
    return files


def _task(file: str, trial: Trial, prompt_tokens: int) -> dict[str, Any]:
    return {
        "file": file, "generated_tokens": _GENERATED_TOKENS, "repetitions": 1 if trial.large else _REPETITIONS,
        "prompt_tokens": prompt_tokens, "after_prompt": not trial.large,
    }  # fmt: skip


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.measurements.json")


def _measured(
    tasks: list[dict[str, Any]],
    settings: RunSettings,
    out: Path,
    request: str,
    device: DeviceProfile,
    limit_s: float,
    say: Callable[[str], None],
    progress: Progress,
) -> list[Turn]:
    """Time all files in rounds, with and without repacking in turn, until the time is up."""
    journal = _journal(out)
    done = Measurements(request)
    if journal.exists():
        kept = Measurements.load(journal)
        whole = all(len(turn.times) == len(tasks) and all(t.generation_s for t in turn.times) for turn in kept.turns)
        done = kept if whole and kept.request_sha256 == request else done
    start, before = time.monotonic(), len(done.turns)
    variants = [False, True]
    while True:
        variant = _next(done.turns, variants)
        count = sum(turn.use_extra_bufts == variant for turn in done.turns)
        made = len(done.turns) - before
        elapsed = time.monotonic() - start
        rounds = _rounds(done.turns, elapsed / made if made else None, limit_s, len(variants))
        if count >= rounds:
            return [turn for turn in done.turns if turn.use_extra_bufts in variants]
        total = rounds * len(variants) * len(tasks)
        at = len(done.turns) * len(tasks)
        job: dict[str, Any] = {
            "kind": "speeds",
            "tasks": tasks if count % 2 == 0 else tasks[::-1],  # what drifts within a turn cancels
            "settings": dataclasses.asdict(dataclasses.replace(settings, use_extra_bufts=variant)),
        }
        try:
            found = run_child(job, timeout_s=_TIMEOUT_S, progress=_counted(progress, at, total))
        except ValidationError as error:
            if variant == device.use_extra_bufts:
                raise
            say(f"Speeds with use_extra_bufts {'on' if variant else 'off'} are left out: {error}")
            variants.remove(variant)
            continue
        times = [Times.from_json(one) for one in found["times"]]
        turn = Turn(variant, tuple(times if count % 2 == 0 else times[::-1]))
        done = dataclasses.replace(done, turns=(*done.turns, turn))
        done.save(journal)


def _counted(progress: Progress, before: int, total: int) -> Progress:
    """Count the files of a turn on from those of all turns before."""
    return lambda _stage, done, _total: progress("timing models", before + done, total)


def _next(turns: Sequence[Turn], variants: Sequence[bool]) -> bool:
    """Return the setting that has had the fewest turns."""
    return min(variants, key=lambda variant: sum(turn.use_extra_bufts == variant for turn in turns))


def _rounds(turns: Sequence[Turn], turn_s: float | None, limit_s: float, n_variants: int) -> int:
    """Return how many rounds the time allows, given how long a turn has taken."""
    if turn_s is None:
        return max(_LEAST_ROUNDS, -(-len(turns) // n_variants))
    return min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(limit_s / turn_s / n_variants)))


def _speeds(
    device: DeviceProfile,
    settings: RunSettings,
    build: Build,
    trials: Sequence[Trial],
    turns: Sequence[Turn],
    prompt_tokens: int,
    sizes: tuple[int, int],
) -> MeasuredSpeeds:
    fitted = {
        variant: _fitted(
            device, trials, [turn.times for turn in turns if turn.use_extra_bufts == variant], prompt_tokens
        )
        for variant in {turn.use_extra_bufts for turn in turns}
    }
    return MeasuredSpeeds(
        llama_cpp=build.llama_cpp, llama_cpp_python=build.llama_cpp_python, system_info=build.system_info.strip(),
        cpu=cpu_name(), threads=settings.threads, ubatch_tokens=settings.ubatch_tokens,
        flash_attention=settings.flash_attention, prompt_tokens=prompt_tokens,
        rounds=min(sum(turn.use_extra_bufts == variant for turn in turns) for variant in fitted),
        small_weights=sizes[0], large_weights=sizes[1], cache_bytes=cache_bytes(),
        plain=fitted.get(False), repacked=fitted.get(True),
    )  # fmt: skip


def _fitted(
    device: DeviceProfile, trials: Sequence[Trial], rounds: Sequence[Sequence[Times]], prompt_tokens: int
) -> KernelSpeeds:
    """Fit the medians over all rounds."""
    observations: dict[bool, list[Observation]] = {False: [], True: []}
    spreads = []
    for trial, visits in zip(trials, zip(*rounds, strict=True), strict=True):
        each_s = [seconds / _GENERATED_TOKENS for visit in visits for seconds in visit.generation_s]
        later_s = [seconds / _GENERATED_TOKENS for visit in visits for seconds in visit.later_s]
        prompt_s = [seconds for visit in visits for seconds in visit.prompt_s]
        spreads += [_spread(seconds) for seconds in (each_s, later_s, prompt_s) if seconds]
        medians = [statistics.median(seconds) if seconds else None for seconds in (later_s, prompt_s)]
        observations[trial.large].append(
            Observation(trial.spec, trial.types, prompt_tokens, _GENERATED_TOKENS, statistics.median(each_s), *medians)
        )
    return fit_speeds(observations[False], observations[True], device, statistics.median(spreads))


def _spread(seconds: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def _save(given: dict[str, Any], speed: MeasuredSpeeds, out: Path) -> None:
    source = (
        f"Measured on the device by impq-edge calibrate-device: {speed.rounds} rounds with llama.cpp "
        f"{speed.llama_cpp}, times spread by {_worst(speed, 'spread'):.0%}, and the fit is off by "
        f"{_worst(speed, 'generation_error'):.0%} in generation and {_worst(speed, 'prompt_error'):.0%} in prompts."
    )
    shown = pydantic.TypeAdapter(MeasuredSpeeds).dump_python(speed, mode="json", exclude_none=True)
    whole = {**given, "speed": shown, "sources": {**given.get("sources", {}), "speed": source}}
    with atomic_path(out) as temporary:
        temporary.write_text(to_toml(whole), "utf-8")


def _worst(speed: MeasuredSpeeds, name: str) -> float:
    return float(max(getattr(kernels, name) for kernels in (speed.plain, speed.repacked) if kernels))
