"""What every file of a release must keep, and whether it does."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import pydantic

from impq_edge.devices.latency import Rate, Speeds
from impq_edge.devices.memory import MemoryPlan
from impq_edge.records import STRICT
from impq_edge.releases.order import Gates, Reference
from impq_edge.releases.quality import Quality
from impq_edge.validation.report import ValidationReport

_MIB = 2**20
_REFERENCES = {"f16": "the unquantised model in F16", "4bit": "all blocks at 4 bit"}


@dataclasses.dataclass(frozen=True)
class Gate:
    """One demand on a file for a device, and whether it holds."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    status: Literal["passed", "failed"]
    value: float | None  # in the unit the name carries; None: nothing is known, which fails
    limit: float | None
    detail: str  # what the value is, and where it comes from


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is known of a file on a device."""

    report: ValidationReport
    quality: Quality
    at_4_bit: Quality
    plan: MemoryPlan
    speeds: Speeds | None
    on_device: bool  # whether speed and memory were measured on the device itself
    over_ssh: bool = False  # and not on the machine that makes the release


def perplexity_ratio(trial: Trial, reference: Reference) -> float:
    """Return a file's perplexity over that of a reference, measured on the same windows."""
    ratio = trial.quality.divergence.perplexity_ratio
    return ratio if reference == "f16" else ratio / trial.at_4_bit.divergence.perplexity_ratio


def process_bytes(plan: MemoryPlan) -> int:
    """Return what the process that runs a file holds of main memory, as predicted."""
    return plan.total_bytes - plan.system_reserve_bytes


def evaluate(asked: Gates, reference: Reference, trial: Trial) -> tuple[Gate, ...]:
    """Return every gate that was asked for, and the validation, which is always one."""
    return tuple(_evaluated(asked, reference, trial))


def _evaluated(asked: Gates, reference: Reference, trial: Trial) -> Iterator[Gate]:
    failed = [check.name for check in trial.report.checks if check.status == "failed"]
    told = f"failed: {', '.join(failed)}" if failed else "every check of the file on the device's settings holds"
    yield Gate("validation", "failed" if failed else "passed", None, None, told)
    if asked.max_perplexity_ratio is not None:
        detail = f"over {_REFERENCES[reference]}"
        yield _at_most("max_perplexity_ratio", perplexity_ratio(trial, reference), asked.max_perplexity_ratio, detail)
    if asked.max_kl_divergence is not None:
        value = trial.quality.divergence.kld_mean
        detail = f"nats per token, from {_REFERENCES['f16']}"
        yield _at_most("max_kl_divergence", value, asked.max_kl_divergence, detail)
    report, speeds = trial.report, trial.speeds
    for name, limit, measured, predicted in (
        ("min_tokens_per_second", asked.min_tokens_per_second, report.generation_tok_per_s,
         speeds.generation if speeds else None),
        ("min_prompt_tokens_per_second", asked.min_prompt_tokens_per_second, report.prompt_tok_per_s,
         speeds.prompt if speeds else None),
    ):  # fmt: skip
        if limit is not None:
            yield _speed(name, limit, measured, predicted, trial)
    if asked.max_memory is not None:
        yield _memory(asked.max_memory, trial)


def _at_most(name: str, value: float, limit: float, detail: str) -> Gate:
    return Gate(name, "passed" if value <= limit else "failed", value, limit, detail)  # NaN fails


def counted_bytes(trial: Trial) -> int:
    """Return what counts of a process's memory: as measured on the device with its context full, else the worse."""
    planned, measured = process_bytes(trial.plan), trial.report.peak_rss_bytes
    return measured if trial.on_device and _is_filled(trial) else max(planned, measured)


def _is_filled(trial: Trial) -> bool:
    return trial.report.filled_tokens >= trial.plan.context_tokens


def _memory(limit_bytes: int, trial: Trial) -> Gate:
    planned, measured = process_bytes(trial.plan), trial.report.peak_rss_bytes
    filled = "" if _is_filled(trial) else f" with {trial.report.filled_tokens:,} tokens in the context"
    where = told_place(trial.on_device, trial.over_ssh)
    detail = f"bytes: predicted {planned / _MIB:,.0f} MiB, measured {where} {measured / _MIB:,.0f} MiB{filled}"
    return _at_most("max_memory", counted_bytes(trial), limit_bytes, detail)


def told_place(on_device: bool, over_ssh: bool) -> str:
    """Return where a file was run, in words."""
    return "on the device, over ssh," if over_ssh else "on the device" if on_device else "here"


def _speed(name: str, limit: float, measured: float, predicted: Rate | None, trial: Trial) -> Gate:
    if trial.on_device:
        where = f"measured {told_place(True, trial.over_ssh).removesuffix(',')}"
        return Gate(name, "passed" if measured >= limit else "failed", measured, limit, where)
    if predicted is None or trial.speeds is None:
        detail = "the device was not reached, and nothing is known to predict it from; calibrate-device measures it"
        return Gate(name, "failed", None, limit, detail)
    likely = predicted.likely_tok_per_s
    detail = (
        f"predicted from {_basis(trial.speeds)}, {told_speed(predicted.low_tok_per_s)} to "
        f"{told_speed(predicted.high_tok_per_s)}; "
        "the device was not reached"
    )
    return Gate(name, "passed" if likely >= limit else "failed", likely, limit, detail)


def told_speed(tok_per_s: float) -> str:
    """Return tokens per second for people."""
    return f"{tok_per_s:,.0f}" if tok_per_s >= 10 else f"{tok_per_s:.2g}"


def told_number(value: float | None) -> str:
    """Return the value or limit of a gate for people."""
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _basis(speeds: Speeds) -> str:
    return {
        "formats": "what each format was measured at on the device",
        "bandwidth": "the bandwidth measured on the device",
        "peak bandwidth": "the memory's theoretical bandwidth",
    }.get(speeds.basis, speeds.basis)
