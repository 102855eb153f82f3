"""Layers on a GPU: which tensors and caches leave main memory, for both kinds of memory, and what fits."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest

from impq_edge.devices.memory import (
    MemoryPlan,
    gpu_resident_bytes,
    gpu_weight_budget_bytes,
    kv_cache_bytes,
    largest_context_tokens,
    largest_gpu_layers,
    memory_plan,
    require_fit,
    resident_bytes,
    weight_budget_bytes,
)
from impq_edge.devices.offload import offload
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import DeviceError
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, data_bytes
from impq_edge.model.spec import ModelSpec

MakeDevice = Callable[..., DeviceProfile]
Uniform = Callable[[ModelSpec, TensorType], TensorTypes]
GIB, MIB = 2**30, 2**20
NAMES = ["llama-3.1-8b", "qwen3-4b", "gemma2-2b"]
OWN = {"gpu": "A GPU", "gpu_reserve_bytes": 512 * MIB, "gpu_memory_bytes": 6 * GIB, "mmap": False}
SHARED = {**OWN, "gpu_memory_bytes": None}


def plan(spec: ModelSpec, types: TensorTypes, device: DeviceProfile) -> MemoryPlan:
    return memory_plan(spec, types, data_bytes(spec, types), device)


@pytest.mark.parametrize(
    ("layers", "first_block", "head", "counted"),
    [(0, 32, False, 0), (1, 32, True, 1), (2, 31, True, 2), (32, 1, True, 32), (33, 0, True, 33), (999, 0, True, 33)],
)
def test_the_last_layers_are_the_gpus_and_the_head_is_the_first_of_them(
    published: dict[str, ModelSpec], make_device: MakeDevice, layers: int, first_block: int, head: bool, counted: int
) -> None:
    where = offload(published["llama-3.1-8b"].hyperparameters, make_device(**OWN, gpu_layers=layers))
    assert (where.first_block, where.head, where.layers) == (first_block, head, counted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [True, False])
def test_nothing_is_lost_between_two_memories(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform, name: str, extra: bool
) -> None:
    spec = published[name]
    types, hyper = uniform(spec, TensorType.Q4_K), spec.hyperparameters
    device = make_device(**OWN, use_extra_bufts=extra, context_tokens=8192)
    on_cpu = plan(spec, types, device)
    embedding = types["token_embd.weight"].tensor_bytes((hyper.vocabulary, hyper.hidden))
    for layers in (1, 2, spec.n_blocks // 2, spec.n_blocks, spec.n_blocks + 1):
        split = plan(spec, types, dataclasses.replace(device, gpu_layers=layers))
        assert split.kv_cache_bytes + split.gpu_kv_cache_bytes == on_cpu.kv_cache_bytes
        # A tied embedding is needed by both: the CPU looks it up, and on the GPU it is the head.
        twice = embedding if hyper.tied_embeddings else 0
        freed = 256 if hyper.rope_scaling and 1 < layers <= spec.n_blocks else 0  # 64 factors of rope, in both
        assert split.weights_bytes + split.gpu_weights_bytes == on_cpu.weights_bytes + twice + freed
        assert split.total_bytes + sum(split.gpu_parts().values()) - split.gpu_reserve_bytes >= on_cpu.total_bytes


@pytest.mark.parametrize("name", NAMES)
def test_with_every_layer_on_the_gpu_main_memory_keeps_the_embedding(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform, name: str
) -> None:
    spec = published[name]
    types, hyper = uniform(spec, TensorType.Q4_K), spec.hyperparameters
    embedding = types["token_embd.weight"].tensor_bytes((hyper.vocabulary, hyper.hidden))
    for mmap in (True, False):
        device = make_device(**{**OWN, "mmap": mmap}, gpu_layers=999, use_extra_bufts=True)
        split = plan(spec, types, device)
        assert (split.weights_bytes, split.repack_bytes, split.kv_cache_bytes) == (embedding, 0, 0)
        assert split.gpu_kv_cache_bytes == kv_cache_bytes(hyper, device, device.context_tokens)


def test_with_mmap_a_divided_file_stays_mapped(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["llama-3.1-8b"]
    types = uniform(spec, TensorType.Q4_K)
    mapped = plan(spec, types, make_device(**{**OWN, "mmap": True}, gpu_layers=20))
    read = plan(spec, types, make_device(**OWN, gpu_layers=20))
    assert mapped.weights_bytes == data_bytes(spec, types) > read.weights_bytes
    assert mapped.gpu_weights_bytes == read.gpu_weights_bytes


@pytest.mark.parametrize("name", NAMES)
def test_where_memory_is_shared_nothing_leaves_it(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform, name: str
) -> None:
    spec = published[name]
    types, hyper = uniform(spec, TensorType.Q4_K), spec.hyperparameters
    on_cpu, device = plan(spec, types, make_device(mmap=False)), make_device(**SHARED, gpu_layers=999)
    shared = plan(spec, types, device)
    embedding = types["token_embd.weight"].tensor_bytes((hyper.vocabulary, hyper.hidden))
    more = on_cpu.compute_bytes + 512 * MIB + (embedding if hyper.tied_embeddings else 0)
    assert shared.total_bytes == on_cpu.total_bytes + more
    assert (shared.gpu_parts(), shared.gpu_free_bytes) == ({}, None)
    assert gpu_resident_bytes(spec, types, device) == 0
    assert gpu_weight_budget_bytes(hyper, device) is None
    assert shared.parts()["GPU driver"] == 512 * MIB


@pytest.mark.parametrize("gpu", [OWN, {**OWN, "mmap": True}, SHARED])
@pytest.mark.parametrize("name", NAMES)
def test_the_budgets_are_what_a_plan_leaves(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform, name: str, gpu: dict[str, object]
) -> None:
    spec = published[name]
    types, header = uniform(spec, TensorType.Q2_K), 7_000_000
    for layers in (0, 1, 10, 999):
        device = make_device(**gpu, gpu_layers=layers, use_extra_bufts=True)
        found = memory_plan(spec, types, header + data_bytes(spec, types), device)
        budget = weight_budget_bytes(spec.hyperparameters, device)
        assert found.free_bytes == budget - header - resident_bytes(spec, types, device)
        of_gpu = gpu_weight_budget_bytes(spec.hyperparameters, device)
        if of_gpu is not None:
            assert found.gpu_free_bytes == of_gpu - gpu_resident_bytes(spec, types, device)


def test_more_layers_take_more_of_the_gpu_and_less_of_main_memory(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["llama-3.1-8b"]
    types = uniform(spec, TensorType.Q4_K)
    plans = [plan(spec, types, make_device(**OWN, gpu_layers=layers)) for layers in range(1, 34)]
    for fewer, more in pairwise(plans):
        assert more.total_bytes < fewer.total_bytes
        assert sum(more.gpu_parts().values()) > sum(fewer.gpu_parts().values())


def test_both_memories_must_hold_their_part(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["llama-3.1-8b"]
    types = uniform(spec, TensorType.Q4_K)
    size = data_bytes(spec, types)
    device = make_device(**OWN, gpu_layers=999)
    assert require_fit(spec, types, size, device, context_tokens=2048).fits
    assert 2048 < (largest := largest_context_tokens(spec, types, size, device)) < spec.hyperparameters.context
    assert memory_plan(spec, types, size, device, context_tokens=largest).fits
    assert not memory_plan(spec, types, size, device, context_tokens=largest + 256).fits
    small = dataclasses.replace(device, gpu_memory_bytes=4 * GIB)
    with pytest.raises(DeviceError) as caught:
        require_fit(spec, types, size, small)
    most = largest_gpu_layers(spec, types, size, small)
    assert 0 < most < 33
    for told in ("MiB of GPU memory", "weights of 33 layers", "has 4,096 MiB", f"with gpu_layers at {most} this one"):
        assert told in str(caught.value)
    for layers, fits in ((most, True), (most + 1, False)):
        found = plan(spec, types, dataclasses.replace(small, gpu_layers=layers))
        assert found.gpu_free_bytes is not None
        assert (found.gpu_free_bytes >= 0) is fits
    crowded = dataclasses.replace(device, memory_bytes=GIB, gpu_layers=5)
    with pytest.raises(DeviceError, match=r"of memory .* has 1,024 MiB"):
        require_fit(spec, types, size, crowded)


def test_a_device_without_a_gpu_has_no_number_of_layers(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["qwen3-4b"]
    types = uniform(spec, TensorType.Q4_K)
    with pytest.raises(DeviceError, match="board names no gpu with its gpu_reserve_bytes"):
        largest_gpu_layers(spec, types, data_bytes(spec, types), make_device())
    assert largest_gpu_layers(spec, types, data_bytes(spec, types), make_device(**SHARED)) == spec.n_blocks + 1
