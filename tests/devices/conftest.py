"""Published shapes of models, a device to vary, and the tool that asks llama.cpp."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from impq_edge.devices.profile import DeviceProfile
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters, Llama3Rope
from impq_edge.model.recipe import TensorTypes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.validation.synthetic import model_of

_COMMON: dict[str, Any] = {
    "context": 131072, "rms_epsilon": 1e-5, "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False,
    "sliding_window": None, "attention_softcap": None, "final_softcap": None,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architecture": "llama", "n_blocks": 32, "hidden": 4096, "ffn": 14336, "n_heads": 32, "n_kv_heads": 8,
        "head_dim": 128, "vocabulary": 128256, "tied_embeddings": False, "rope_scaling": Llama3Rope(8, 1, 4, 8192),
    },
    "qwen3-4b": {
        "architecture": "qwen3", "n_blocks": 36, "hidden": 2560, "ffn": 9728, "n_heads": 32, "n_kv_heads": 8,
        "head_dim": 128, "vocabulary": 151936, "tied_embeddings": True, "context": 40960,
    },
    "gemma2-2b": {
        "architecture": "gemma2", "n_blocks": 26, "hidden": 2304, "ffn": 9216, "n_heads": 8, "n_kv_heads": 4,
        "head_dim": 256, "vocabulary": 256000, "tied_embeddings": True, "context": 8192, "sliding_window": 4096,
        "attention_softcap": 50.0, "final_softcap": 30.0,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def compare() -> ModuleType:
    """The tool as a module: tools are scripts, in no package, and import each other from where they lie."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("compare_memory")


@pytest.fixture(scope="session")
def published() -> dict[str, ModelSpec]:
    return {name: model_of(name, HyperParameters(**{**_COMMON, **shape})) for name, shape in _SHAPES.items()}


@pytest.fixture(scope="session")
def make_device() -> Callable[..., DeviceProfile]:
    device = DeviceProfile(
        name="board", title="A board", memory_bytes=8 << 30, system_reserve_bytes=1 << 29, cores=4, threads=4,
        isa="aarch64+dotprod", memory_bandwidth_bytes_per_s=1e10,
    )  # fmt: skip
    return lambda **changes: dataclasses.replace(device, **changes)


@pytest.fixture(scope="session")
def uniform() -> Callable[[ModelSpec, TensorType], TensorTypes]:
    return lambda spec, kind: tensor_types(spec, [kind] * spec.n_blocks, TensorType.Q6_K)
