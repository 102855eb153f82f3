"""How many tokens per second a device will prompt and generate, before a file exists."""

import dataclasses
from typing import ClassVar, Literal

import pydantic

from impq_edge.devices.memory import kv_cache_bytes
from impq_edge.devices.profile import DeviceProfile
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT

GENERATED_TOKENS = 128
"""Speeds are those of llama-bench's tg128 and pp512: from an empty context."""

# Of a bandwidth: what a measured one spreads by between files and boards, and what share of a theoretical peak
# llama.cpp reaches on the shipped devices for which both are known (a Raspberry Pi 5: 10.1 of 17.1 GB/s).
_OF_MEASURED = (0.8, 1.0, 1.15)
_OF_THEORETICAL = (0.35, 0.55, 0.8)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second: what to expect, and between what."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    low_tok_per_s: float
    likely_tok_per_s: float
    high_tok_per_s: float


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a device is expected to do with a file."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    generation: Rate | None
    prompt: Rate | None  # None: nothing is known that would tell
    basis: Literal["formats", "bandwidth", "peak bandwidth"]  # measured, measured, theoretical


def predict_speeds(spec: ModelSpec, types: TensorTypes, device: DeviceProfile, *, kv_type: str | None = None) -> Speeds:
    """Predict generation (tg128) and prompt (pp512) speed of a model on a device.

    Parameters
    ----------
    types
        GGUF name → type of every tensor.
    kv_type
        Of the cache; the device's own by default.
    """
    measured = device.generation_bandwidth_bytes_per_s
    bandwidth, shares = (measured, _OF_MEASURED) if measured else (device.memory_bandwidth_bytes_per_s, _OF_THEORETICAL)
    tied = spec.hyperparameters.tied_embeddings
    # Of an embedding that is no head as well, one row is read.
    weights = sum(
        types[t.gguf_name].tensor_bytes(t.shape) for t in spec.tensors if t.role != "embedding" or tied
    )  # fmt: skip
    cache = kv_cache_bytes(spec.hyperparameters, device, GENERATED_TOKENS, kv_type) // 2
    generation = Rate(*(share * bandwidth / (weights + cache) for share in shares))
    return Speeds(generation, None, "bandwidth" if measured else "peak bandwidth")
