"""The stage: a GGUF on this machine, as a device would run it → a :class:`ValidationReport`."""

import dataclasses
import os
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, is_this_machine
from impq_edge.errors import ValidationError
from impq_edge.ggml.cache import KvType
from impq_edge.records import read_text, sha256_file, sha256_files, sha256_json
from impq_edge.validation.checks import check_all, check_divergence
from impq_edge.validation.file import FileFacts, read_facts
from impq_edge.validation.process import Progress, choose_limit, run_child
from impq_edge.validation.report import Check, ValidationReport
from impq_edge.validation.results import Build, Divergence, MemoryLimit, Run, Score
from impq_edge.validation.settings import RunSettings

DEFAULT_WINDOWS = 24
DEFAULT_CONTEXT_TOKENS = 2048  # without a device; less where the model was trained for less
MIN_CONTEXT_TOKENS = 64  # room for a prompt and an answer
FILL_S = 300.0
CHAT_TOKENS = 128  # one short sentence ends well before

# Perplexity is compared between files, devices and tools, so it is always measured as llama-perplexity does
# by default (F16 cache, flash attention), only in smaller batches, which bound its memory. Of the device's
# settings only use_extra_bufts reaches it: kernels for repacked weights round differently (about 0.1 %).
_SCORE_CONTEXT_TOKENS, _SCORE_BATCH_TOKENS, _SCORE_OUTPUTS_TOKENS = 512, 256, 64


def validate(
    path: Path,
    *,
    device: DeviceProfile | None = None,
    text: Path | None = None,
    reference: Path | None = None,
    windows: int = DEFAULT_WINDOWS,
    threads: int | None = None,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    use_extra_bufts: bool | None = None,
    generated_tokens: int = 64,
    repetitions: int = 3,
    fill_s: float = FILL_S,
    timeout_s: float = 3600.0,
    memory_limit_bytes: int | Literal["device"] | None = "device",
    progress: Progress = lambda _stage, _done, _total: None,
) -> ValidationReport:
    """Measure a finished GGUF: perplexity, speed, peak memory, text; and check it against a device.

    Parameters
    ----------
    path
        The GGUF.
    device
        Whose settings to run with and whose limits to check; None: llama.cpp's defaults, no limits.
    text
        Evaluation text, UTF-8; the one that ships by default.
    reference
        A GGUF of the same model, as a rule its F16: how far this file's predictions are from its on the text.
        The two are loaded side by side for that.
    windows
        Windows of 512 tokens to score, as many as the text has at most.
    threads, context_tokens, kv_type, use_extra_bufts
        Instead of the device's own.
    generated_tokens, repetitions
        Length of a timed generation, and how often speeds are timed after a warm-up.
    fill_s
        How long the context may be filled for the memory check, in seconds.
    timeout_s
        How long each of the two child processes may take, in seconds.
    memory_limit_bytes
        What each child process that loads the file may hold, in bytes; "device": the device's memory less its system
        reserve, or no limit where there is no device; None: no limit. On a machine that is not the device, a child
        that compares with a reference has no limit of the device's: the reference is not for it.
    progress
        Called with the stage, what is done and what there is.

    Raises
    ------
    ValidationError
        When the file or the reference is no sound GGUF, the file is larger than the limit of memory or its process
        reaches it, llama.cpp refuses one or dies of it, the two have different vocabularies, the text is too
        short, or an option is out of range.
    RecordError
        When the text cannot be read.
    """
    limit_bytes = _limit_bytes(memory_limit_bytes, device)
    _check_counts(windows=windows, generated_tokens=generated_tokens, repetitions=repetitions, threads=threads,
                  memory_limit_bytes=limit_bytes)  # fmt: skip
    facts = read_facts(path)
    if limit_bytes is not None and facts.file_bytes > limit_bytes:
        raise _too_large(facts, limit_bytes, device)
    memory = None if limit_bytes is None else choose_limit(limit_bytes)
    reference_facts = None if reference is None else read_facts(reference)
    here = device is not None and is_this_machine(device)
    settings = _settings(facts, device, here, threads, context_tokens, kv_type, use_extra_bufts)
    evaluation = text or data_path("demo", "evaluation.txt")
    content = read_text(evaluation)
    file_sha256 = _hash(facts, progress)
    reference_sha256 = None if reference_facts is None else _hash(reference_facts, progress)

    build = Build(**run_child({"kind": "describe"}, timeout_s=timeout_s))
    run_job = {
        "kind": "run",
        "file": str(path),
        "settings": dataclasses.asdict(settings),
        "generated_tokens": generated_tokens,
        "repetitions": repetitions,
        "chat_tokens": CHAT_TOKENS,
        "fill_s": fill_s,
    }
    # First, because here a text that is too short or a reference of another model shows.
    beside = None if reference is not None and not here and memory_limit_bytes == "device" else memory
    score, divergence = _score(path, reference, content, windows, settings, timeout_s, beside, progress)
    run = Run.from_json(run_child(run_job, timeout_s=timeout_s, memory=memory, progress=progress))
    checks = check_all(run, score, facts.file_bytes, settings.context_tokens, device, here)
    if reference is not None:
        checks = (*checks, check_divergence(divergence, reference.name))
    request = request_sha256(
        device, evaluation, windows=windows, context_tokens=context_tokens, kv_type=kv_type, fill_s=fill_s,
        reference_sha256=reference_sha256,
    )  # fmt: skip
    report = _report(path, file_sha256, facts, evaluation, device, settings, build, run, score, checks, request)
    return dataclasses.replace(
        report,
        reference=None if reference is None else reference.name,
        reference_sha256=reference_sha256,
        divergence=divergence,
        memory_limit=memory,
    )


def compare(
    path: Path,
    reference: Path,
    *,
    text: Path | None = None,
    windows: int = DEFAULT_WINDOWS,
    threads: int | None = None,
    timeout_s: float = 3600.0,
    progress: Progress = lambda _stage, _done, _total: None,
) -> tuple[Score, Divergence]:
    """Measure only perplexity, and how far predictions are from a reference's; arguments as for :func:`validate`.

    Raises
    ------
    ValidationError
        As :func:`validate`, and when a prediction of the file is not finite.
    """
    _check_counts(windows=windows, threads=threads)
    for file in (path, reference):
        read_facts(file)
    content = read_text(text or data_path("demo", "evaluation.txt"))
    settings = RunSettings(_SCORE_CONTEXT_TOKENS, threads or available_threads())
    score, divergence = _score(path, reference, content, windows, settings, timeout_s, None, progress)
    if divergence is None:
        raise ValidationError(f"The predictions of {path} are not finite; its weights are broken, build it again.")
    return score, divergence


def _score(
    path: Path,
    reference: Path | None,
    text: str,
    windows: int,
    run: RunSettings,
    timeout_s: float,
    memory: MemoryLimit | None,
    progress: Progress,
) -> tuple[Score, Divergence | None]:
    """Measure the perplexity and, in the same pass, the divergence where there is a reference."""
    settings = dataclasses.asdict(_score_settings(run))
    job = {"kind": "score", "file": str(path), "settings": settings, "text": text, "windows": windows}
    if reference is None:
        return Score.from_json(run_child(job, timeout_s=timeout_s, memory=memory, progress=progress)), None
    job |= {"kind": "compare", "reference": str(reference)}
    found = run_child(job, timeout_s=timeout_s, memory=memory, progress=progress)
    divergence = found["divergence"] and Divergence.from_json(found["divergence"])
    return Score.from_json(found["score"]), divergence


def _report(
    path: Path,
    file_sha256: str,
    facts: FileFacts,
    text: Path,
    device: DeviceProfile | None,
    settings: RunSettings,
    build: Build,
    run: Run,
    score: Score,
    checks: tuple[Check, ...],
    request: str,
) -> ValidationReport:
    return ValidationReport(
        file=path.name,
        sha256=file_sha256,
        file_bytes=facts.file_bytes,
        architecture=facts.architecture,
        weights=facts.weights,
        bits_per_weight=facts.bits_per_weight,
        device=device.name if device else None,
        settings=settings,
        text=text.name,
        text_sha256=sha256_file(text),
        perplexity=score.perplexity,
        perplexity_stderr=score.stderr,
        tokens=score.scored_tokens,
        window_nlls=score.window_nlls,
        load_s=run.load_s,
        prompt_tokens=run.prompt.tokens,
        prompt_tok_per_s=run.prompt.mean_tok_per_s,
        prompt_sd_tok_per_s=run.prompt.sd_tok_per_s,
        generation_tokens=run.generation.tokens,
        generation_tok_per_s=run.generation.mean_tok_per_s,
        generation_sd_tok_per_s=run.generation.sd_tok_per_s,
        peak_rss_bytes=run.peak_rss_bytes,
        anonymous_bytes=run.anonymous_bytes,
        process_bytes=run.process_bytes,
        filled_tokens=run.filled_tokens,
        generated_text=run.continuation,
        chat_text=run.chat.text,
        llama_cpp=build.llama_cpp,
        llama_cpp_python=build.llama_cpp_python,
        system_info=build.system_info,
        checks=checks,
        request_sha256=request,
        passed=all(check.status != "failed" for check in checks),
    )


def request_sha256(
    device: DeviceProfile | None,
    text: Path,
    *,
    windows: int,
    context_tokens: int | None,
    kv_type: KvType | None,
    fill_s: float,
    reference_sha256: str | None = None,
) -> str:
    """Hash everything a measurement depends on besides the file: device, text, settings, llama.cpp, this machine."""
    return sha256_json(
        {
            **({"reference": reference_sha256} if reference_sha256 else {}),
            "device": device.to_json() if device else None,
            "on_device": device is not None and is_this_machine(device),
            "text": sha256_file(text),
            "windows": windows,
            "context_tokens": context_tokens,
            "kv_type": kv_type,
            "fill_s": fill_s,
            "threads": available_threads(),
            "llama_cpp_python": metadata.version("llama-cpp-python"),
        }
    )


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValidationError(f"{name} is {value}; ask for 1 or more.")


def _settings(
    facts: FileFacts,
    device: DeviceProfile | None,
    here: bool,
    threads: int | None,
    context_tokens: int | None,
    kv_type: KvType | None,
    use_extra_bufts: bool | None,
) -> RunSettings:
    base = (
        RunSettings(_default_context(facts), available_threads())
        if device is None
        else (device_settings(device, device.threads if here else available_threads()))
    )
    if kv_type is not None and kv_type not in get_args(KvType):
        raise ValidationError(f"Cache type {kv_type!r} is unknown; choose one of {', '.join(get_args(KvType))}.")
    settings = dataclasses.replace(
        base,
        threads=threads or base.threads,
        context_tokens=base.context_tokens if context_tokens is None else context_tokens,
        kv_type=kv_type or base.kv_type,
        use_extra_bufts=base.use_extra_bufts if use_extra_bufts is None else use_extra_bufts,
    )
    if settings.context_tokens < MIN_CONTEXT_TOKENS:
        raise ValidationError(
            f"A context of {settings.context_tokens} tokens holds no answer; ask for {MIN_CONTEXT_TOKENS} or more."
        )
    return settings


def device_settings(device: DeviceProfile, threads: int) -> RunSettings:
    """Return how a device runs a file."""
    return RunSettings(
        context_tokens=device.context_tokens,
        threads=threads,
        batch_tokens=device.batch_tokens,
        ubatch_tokens=device.ubatch_tokens,
        kv_type=device.kv_type,
        flash_attention=device.flash_attention,
        use_extra_bufts=device.use_extra_bufts,
        mmap=device.mmap,
    )


def _limit_bytes(limit_bytes: int | Literal["device"] | None, device: DeviceProfile | None) -> int | None:
    if limit_bytes != "device":
        return limit_bytes
    return device.memory_bytes - device.system_reserve_bytes if device else None


def _too_large(facts: FileFacts, limit_bytes: int, device: DeviceProfile | None) -> ValidationError:
    limit = f"{device.name} leaves a process" if device else "the limit of memory is"
    return ValidationError(
        f"{facts.files[0]} has {facts.file_bytes:,} bytes, but {limit} {limit_bytes:,}; choose a smaller file, "
        "or measure it all the same with --memory-limit none."
    )


def _default_context(facts: FileFacts) -> int:
    return min(DEFAULT_CONTEXT_TOKENS, facts.trained_context_tokens or DEFAULT_CONTEXT_TOKENS)


def _score_settings(run: RunSettings) -> RunSettings:
    return dataclasses.replace(
        run,
        context_tokens=_SCORE_CONTEXT_TOKENS,
        batch_tokens=_SCORE_BATCH_TOKENS,
        ubatch_tokens=_SCORE_BATCH_TOKENS,
        outputs_tokens=_SCORE_OUTPUTS_TOKENS,
        kv_type="f16",
        flash_attention=True,
    )


def available_threads() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _hash(facts: FileFacts, progress: Progress) -> str:
    done = 0

    def advance(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        progress("hash", done, facts.file_bytes)

    return sha256_files(facts.files, advance)
