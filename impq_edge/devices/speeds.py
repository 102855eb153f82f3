"""How fast llama.cpp ran on a device: the record that ``impq-edge calibrate-device`` adds to a profile."""

import dataclasses
from typing import Annotated, ClassVar

import pydantic

from impq_edge.ggml.types import TensorType
from impq_edge.records import STRICT

Seconds = Annotated[float, pydantic.Field(ge=0, lt=1e3)]
Share = Annotated[float, pydantic.Field(ge=0, lt=10)]
Count = Annotated[int, pydantic.Field(strict=True, gt=0, lt=2**50)]
Natural = Annotated[int, pydantic.Field(strict=True, ge=0, lt=2**50)]


@dataclasses.dataclass(frozen=True)
class TokenCosts:
    """What is done costs, per unit of work."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    call_s: Seconds  # per batch
    element_s: Seconds  # per element that an operation writes; 0 in generation, see fitting
    attention_s: Seconds  # per dimension of a query head and token that it attends to
    score_s: Seconds  # per head and token that it attends to
    softcap_s: Seconds  # per head and token that it attends to, more, where attention is softcapped
    logit_s: Seconds  # per logit, where those are softcapped: one thread does it
    weight_s: dict[TensorType, Seconds]  # per weight of a matrix
    large_weight_s: dict[TensorType, Seconds] | None = None  # the same in a large model; None: as in a small one


@dataclasses.dataclass(frozen=True)
class KernelSpeeds:
    """All costs under one setting of ``use_extra_bufts``; :mod:`impq_edge.devices.latency` says how they add up."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    operation_s: Seconds  # per operation of a batch's graph
    generation: TokenCosts  # of tokens one at a time
    prompt: TokenCosts  # of tokens in a batch
    generation_error: Share  # root mean square of fitted over measured times, less 1
    prompt_error: Share
    spread: Share  # of a measured time: interquartile range over median, the median of all files


@dataclasses.dataclass(frozen=True)
class MeasuredSpeeds:
    """What was measured, by which llama.cpp, and on what."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    llama_cpp: str
    llama_cpp_python: str
    system_info: str  # of llama.cpp, in its own words
    cpu: str
    threads: Natural
    ubatch_tokens: Natural
    flash_attention: bool
    prompt_tokens: Natural
    rounds: Natural
    small_weights: Count  # that a token reads, in models whose costs are weight_s
    large_weights: Count  # and large_weight_s
    cache_bytes: Natural = 0  # of the last-level cache; 0 where the system does not say
    plain: KernelSpeeds | None = None  # use_extra_bufts off
    repacked: KernelSpeeds | None = None  # and on; None where llama.cpp dies of it

    def __post_init__(self) -> None:
        """Check what no single field can."""
        for kernels in (self.plain, self.repacked):
            if kernels and kernels.generation.large_weight_s and self.small_weights >= self.large_weights:
                raise ValueError(f"small_weights {self.small_weights} are not below large_weights {self.large_weights}")
