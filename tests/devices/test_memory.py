"""The memory plan: the KV cache against numbers worked out by hand, copies, budgets, and what does not fit."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from impq_edge.devices.memory import (
    MemoryPlan,
    is_repacked,
    kv_cache_bytes,
    largest_context_tokens,
    memory_plan,
    require_fit,
    resident_bytes,
    weight_budget_bytes,
)
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import DeviceError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.records import parse

MakeDevice = Callable[..., DeviceProfile]
Uniform = Callable[[ModelSpec, TensorType], TensorTypes]
HEADER_BYTES = 7_000_000
GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("name", "context", "kv_type", "expected"),
    [
        # 32 blocks × 8192 cells × 2 (K and V) × 8 heads × 128 × 2 bytes
        ("llama-3.1-8b", 8192, "f16", GIB),
        # 34 bytes hold 32 numbers, where f16 takes 64
        ("llama-3.1-8b", 8192, "q8_0", GIB * 34 // 64),
        # 8193 tokens take another group of 256 cells
        ("llama-3.1-8b", 8193, "f16", GIB // 8192 * 8448),
        # 13 blocks of 8192 cells and 13 of 4096 + 512, each 2 × 4 heads × 256 × 2 bytes
        ("gemma2-2b", 8192, "f16", 13 * (8192 + 4608) * 4096),
        # the whole context is shorter than window + batch
        ("gemma2-2b", 4096, "f16", 26 * 4096 * 4096),
        ("qwen3-4b", 1, "f16", 36 * 256 * 2 * 8 * 128 * 2),
    ],
)
def test_the_kv_cache_by_hand(
    published: dict[str, ModelSpec], make_device: MakeDevice, name: str, context: int, kv_type: str, expected: int
) -> None:
    assert kv_cache_bytes(published[name].hyperparameters, make_device(), context, kv_type) == expected


@pytest.mark.parametrize(
    ("isa", "repacked"),
    [
        ("aarch64", set()),
        ("aarch64+dotprod", {"q4_k", "q5_k", "q6_k", "q4_0", "q8_0"}),
        ("aarch64+dotprod+i8mm", {"q4_k", "q5_k", "q6_k", "q4_0", "q8_0"}),
        ("x86-64", set()),
        ("x86-64+avx2", {"q4_k", "q4_0"}),
        ("x86-64+avx2+avx512", {"q2_k", "q4_k", "q4_0"}),
    ],
)
def test_what_is_repacked_follows_the_instruction_set(make_device: MakeDevice, isa: str, repacked: set[str]) -> None:
    device = make_device(isa=isa, use_extra_bufts=True)
    assert {kind for kind in TensorType if is_repacked(kind, 4096, device)} == repacked
    assert not any(is_repacked(kind, 4095, device) for kind in TensorType)
    off = make_device(isa=isa, use_extra_bufts=False)
    assert not any(is_repacked(kind, 4096, off) for kind in TensorType)


def test_with_mmap_what_is_repacked_is_held_twice(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["llama-3.1-8b"]
    types = uniform(spec, TensorType.Q4_K)
    data = data_bytes(spec, types)
    plain = make_device(use_extra_bufts=False)
    assert resident_bytes(spec, types, plain) == data
    doubled = make_device(use_extra_bufts=True)
    once = {t.gguf_name: types[t.gguf_name].tensor_bytes(t.shape) for t in spec.tensors if t.role in ("matrix", "head")}
    assert resident_bytes(spec, types, doubled) == data + sum(once.values())
    # Read without mmap, a tensor exists in its repacked form alone.
    assert resident_bytes(spec, types, make_device(use_extra_bufts=True, mmap=False)) == data


def test_without_mmap_only_a_tied_embedding_is_held_twice(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec = published["qwen3-4b"]
    types = uniform(spec, TensorType.Q4_K)
    embedding = TensorType.Q6_K.tensor_bytes((151936, 2560))
    device = make_device(use_extra_bufts=True, mmap=False)
    assert resident_bytes(spec, types, device) == data_bytes(spec, types) + embedding


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b"])
def test_promoting_blocks_costs_the_sum_of_promoting_each(
    published: dict[str, ModelSpec], make_device: MakeDevice, name: str, mmap: bool
) -> None:
    spec, device = published[name], make_device(use_extra_bufts=True, mmap=mmap)

    def resident(promoted: set[int]) -> int:
        blocks = [TensorType.Q4_K if i in promoted else TensorType.Q2_K for i in range(spec.n_blocks)]
        return resident_bytes(spec, tensor_types(spec, blocks, TensorType.Q6_K), device)

    costs = [resident({block}) - resident(set()) for block in range(spec.n_blocks)]
    assert resident(set(range(spec.n_blocks))) - resident(set()) == sum(costs)
    assert min(costs) > 0


def test_the_budget_is_what_a_plan_leaves(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec, device = published["llama-3.1-8b"], make_device(use_extra_bufts=True, context_tokens=2048)
    types = uniform(spec, TensorType.Q2_K)
    file_bytes = HEADER_BYTES + data_bytes(spec, types)
    plan = memory_plan(spec, types, file_bytes, device)
    budget = weight_budget_bytes(spec.hyperparameters, device)
    assert plan.free_bytes == budget - HEADER_BYTES - resident_bytes(spec, types, device)
    assert plan.total_bytes == sum(plan.parts().values()) == device.memory_bytes - plan.free_bytes
    assert plan.weights_bytes == file_bytes
    assert parse(MemoryPlan, dataclasses.asdict(plan), Path("plan")) == plan


def test_heads_that_are_no_whole_blocks_hold_no_quantised_cache(
    published: dict[str, ModelSpec], make_device: MakeDevice
) -> None:
    hyper = dataclasses.replace(published["llama-3.1-8b"].hyperparameters, head_dim=80)
    assert weight_budget_bytes(hyper, make_device(), kv_type="bf16") > 0
    with pytest.raises(DeviceError, match="do not divide this model's heads of 80; use f16"):
        weight_budget_bytes(hyper, make_device(), kv_type="q8_0")


@pytest.mark.parametrize("kv_type", get_args(KvType))
def test_every_cache_type_takes_its_bits(
    published: dict[str, ModelSpec], make_device: MakeDevice, kv_type: KvType
) -> None:
    bits = {
        "f32": 32,
        "f16": 16,
        "bf16": 16,
        "q8_0": 8.5,
        "q5_1": 6,
        "q5_0": 5.5,
        "q4_1": 5,
        "q4_0": 4.5,
        "iq4_nl": 4.5,
    }
    hyper = published["llama-3.1-8b"].hyperparameters
    assert kv_cache_bytes(hyper, make_device(), 8192, kv_type) == GIB * bits[kv_type] / 16


def test_matrices_in_floats_need_a_larger_work_buffer(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    """A token's activations are multiplied with F16 in F16, and with K-quants in 292 bytes for 256."""
    spec, device = published["llama-3.1-8b"], make_device()
    plans = {
        kind: memory_plan(spec, types := uniform(spec, kind), data_bytes(spec, types), device)
        for kind in (TensorType.Q4_K, TensorType.Q8_0, TensorType.F16)
    }
    assert plans[TensorType.Q4_K].work_bytes == plans[TensorType.Q8_0].work_bytes == 512 * 14336 // 256 * 292
    assert plans[TensorType.F16].work_bytes == 512 * 14336 * 2


def test_a_budget_shrinks_with_context_and_grows_with_a_smaller_cache(
    published: dict[str, ModelSpec], make_device: MakeDevice
) -> None:
    hyper, device = published["llama-3.1-8b"].hyperparameters, make_device()
    budgets = [weight_budget_bytes(hyper, device, context_tokens=context) for context in (256, 2048, 8192, 131072)]
    assert all(short > long for short, long in pairwise(budgets))
    assert budgets[-1] < 0  # a cache of 16 GiB on 8
    saved = weight_budget_bytes(hyper, device, context_tokens=8192, kv_type="q8_0") - budgets[2]
    assert saved == pytest.approx(480 * MIB, rel=0.05)


def test_every_logit_of_a_batch_costs_its_row(published: dict[str, ModelSpec], make_device: MakeDevice) -> None:
    hyper, device = published["llama-3.1-8b"].hyperparameters, make_device()
    cost = weight_budget_bytes(hyper, device) - weight_budget_bytes(hyper, device, outputs=512)
    assert cost >= 511 * 128256 * 4


def test_the_largest_context_fits_and_the_next_does_not(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec, device = published["llama-3.1-8b"], make_device()
    types = uniform(spec, TensorType.Q4_K)
    file_bytes = HEADER_BYTES + data_bytes(spec, types)
    largest = largest_context_tokens(spec, types, file_bytes, device)
    assert 0 < largest < spec.hyperparameters.context
    assert require_fit(spec, types, file_bytes, device, context_tokens=largest).free_bytes >= 0
    with pytest.raises(DeviceError) as caught:
        require_fit(spec, types, file_bytes, device, context_tokens=largest + 1)
    message = str(caught.value)
    for told in (
        "llama-3.1-8b needs",
        "weights",
        "KV cache",
        "system reserve",
        "board has 8,192 MiB",
        f"{largest} tok",
    ):
        assert told in message


def test_a_model_that_fits_no_context_is_told_so(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec, device = published["llama-3.1-8b"], make_device(memory_bytes=3 * GIB)
    types = uniform(spec, TensorType.Q4_K)
    with pytest.raises(DeviceError, match="no context fits"):
        require_fit(spec, types, data_bytes(spec, types), device)
    assert largest_context_tokens(spec, types, data_bytes(spec, types), device) == 0


def test_the_largest_context_is_never_more_than_the_model_was_made_for(
    published: dict[str, ModelSpec], make_device: MakeDevice, uniform: Uniform
) -> None:
    spec, device = published["gemma2-2b"], make_device(memory_bytes=64 * GIB)
    types = uniform(spec, TensorType.Q4_K)
    assert largest_context_tokens(spec, types, data_bytes(spec, types), device) == 8192


@pytest.mark.parametrize(
    ("changes", "arguments", "complaint"),
    [
        ({}, {"context_tokens": 0}, "context of 0 tokens"),
        ({}, {"context_tokens": -5}, "context of -5 tokens"),
        ({}, {"kv_type": "q3_k"}, "'q3_k' is not one of f32, f16, bf16, q8_0"),
        ({"flash_attention": False}, {"kv_type": "q8_0"}, "needs flash attention"),
        ({"flash_attention": False}, {"kv_type": "iq4_nl"}, "needs flash attention"),
    ],
)
def test_impossible_requests_are_refused(
    published: dict[str, ModelSpec],
    make_device: MakeDevice,
    changes: dict[str, Any],
    arguments: dict[str, Any],
    complaint: str,
) -> None:
    with pytest.raises(DeviceError, match=complaint):
        weight_budget_bytes(published["qwen3-4b"].hyperparameters, make_device(**changes), **arguments)
