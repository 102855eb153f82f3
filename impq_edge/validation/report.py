"""The record of one validation: what was measured, on what, with which settings, and what was checked."""

import dataclasses
from typing import ClassVar, Literal

import pydantic

from impq_edge.records import STRICT, Record
from impq_edge.validation.results import Divergence, MemoryLimit
from impq_edge.validation.settings import RunSettings

Status = Literal["passed", "failed", "not_checked"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One demand on the file, and whether it holds."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    status: Status
    value: float | None  # in the unit the name carries; None where there is no number
    limit: float | None
    detail: str  # why it failed or was not checked, or what the value is


@dataclasses.dataclass(frozen=True)
class ValidationReport(Record):
    """A file on trial. Numbers of the device run are those of ``settings``; perplexity is the file's alone."""

    SCHEMA: ClassVar[str] = "impq-edge.validation/1"

    file: str  # its name
    sha256: str
    file_bytes: int
    architecture: str
    weights: int
    bits_per_weight: float  # of the whole file
    device: str | None  # name of the device profile, None: this machine without one
    settings: RunSettings

    text: str  # name of the evaluation text
    text_sha256: str
    perplexity: float | None  # None: not finite
    perplexity_stderr: float | None
    tokens: int  # scored
    window_nlls: tuple[float, ...]  # nats per token of each window of 512: compare files pair by pair

    load_s: float
    prompt_tokens: int
    prompt_tok_per_s: float
    prompt_sd_tok_per_s: float
    generation_tokens: int
    generation_tok_per_s: float
    generation_sd_tok_per_s: float

    peak_rss_bytes: int  # of the process that ran the model, weights and interpreter included
    anonymous_bytes: int | None  # of which no file backs and the system cannot drop; None: unknown on this system
    process_bytes: int  # of the same process before it loaded the model
    filled_tokens: int  # tokens the context held when the peak was read

    generated_text: str
    chat_text: str | None

    llama_cpp: str
    llama_cpp_python: str
    system_info: str

    checks: tuple[Check, ...]
    request_sha256: str  # over all that was asked for: a resumed build sees what need not be measured again
    passed: bool  # nothing failed; what could not be checked does not count

    reference: str | None = None  # name of the file that this one was compared with
    reference_sha256: str | None = None
    divergence: Divergence | None = None  # None: there was no reference, or a prediction is not finite
    memory_limit: MemoryLimit | None = None  # of the process that ran the model; None: it had none

    def __post_init__(self) -> None:
        if self.passed != all(check.status != "failed" for check in self.checks):
            raise ValueError(f"passed is {self.passed}, which contradicts the checks")
