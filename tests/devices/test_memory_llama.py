"""The memory plan against llama.cpp's own buffers: of files it has loaded, and of shapes it only simulates."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from checkpoints import make_checkpoint

from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import DeviceProfile
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import read_model

MakeDevice = Callable[..., DeviceProfile]
CACHES = [(True, kv_type) for kv_type in get_args(KvType)] + [(False, kv_type) for kv_type in ("f32", "f16", "bf16")]


def assert_exact(rows: list[Any]) -> None:
    assert rows
    for row in rows:
        assert set(row.ratios.values()) == {1.0}, row


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize(("flash_attention", "kv_type"), CACHES)
@pytest.mark.parametrize(("context", "ubatch", "outputs"), [(256, 64, 1), (700, 512, 1), (2048, 128, 128)])
def test_the_buffers_are_what_llama_cpp_allocates(
    compare: ModuleType, checkpoints: dict[str, Path], tiny_ggufs: dict[str, Path], architecture: str,
    flash_attention: bool, kv_type: str, context: int, ubatch: int, outputs: int,
) -> None:  # fmt: skip
    case = compare.Case(context, ubatch, kv_type, flash_attention, outputs)
    spec, path = read_model(checkpoints[architecture]), tiny_ggufs[architecture]
    types = tensor_types(spec, [TensorType.F16] * spec.n_blocks, TensorType.F16)
    assert_exact([compare.row(spec, types, case, compare.allocate(path, case.device(), outputs))])


@pytest.mark.parametrize(("batch", "ubatch"), [(2048, 512), (512, 512), (64, 64), (512, 1)])
def test_only_the_physical_batch_counts(
    compare: ModuleType, checkpoints: dict[str, Path], tiny_ggufs: dict[str, Path], batch: int, ubatch: int
) -> None:
    spec, path = read_model(checkpoints["gemma2"]), tiny_ggufs["gemma2"]
    types = tensor_types(spec, [TensorType.F16] * spec.n_blocks, TensorType.F16)
    device = compare.Case(1024, ubatch).device()
    device = dataclasses.replace(device, batch_tokens=batch)
    plan, found = memory_plan(spec, types, data_bytes(spec, types), device), compare.allocate(path, device)
    assert plan.compute_bytes == pytest.approx(found.compute, abs=compare.LOGGED_BYTES)
    assert plan.kv_cache_bytes == pytest.approx(found.kv_cache, abs=found.caches * compare.LOGGED_BYTES)


@pytest.mark.parametrize("use_extra_bufts", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_the_weights_and_their_copies_are_what_llama_cpp_holds(
    compare: ModuleType, demo: Path, demo_gguf: Path, use_extra_bufts: bool, mmap: bool
) -> None:
    spec = read_model(demo)
    case = compare.Case(512, mmap=mmap, use_extra_bufts=use_extra_bufts)
    found = compare.row(spec, compare.types_of(spec), case, compare.allocate(demo_gguf, case.device()))
    if mmap and use_extra_bufts:  # what is repacked at an end of the file is not mapped: a few tensors too many
        assert 1 <= found.ratios["weights"] < 1.002
    else:
        assert_exact([found])


@pytest.mark.parametrize(("heads", "tied"), [(9, True), (9, False)])
def test_rows_that_hold_no_k_quants(compare: ModuleType, tmp_path: Path, heads: int, tied: bool) -> None:
    """SmolLM2-135M's shape, less the blocks and the vocabulary that make it slow: rows of 576 become Q4_0 … Q8_0."""
    model = make_checkpoint(
        tmp_path / "smol", "llama", hidden_size=576, intermediate_size=1536, num_attention_heads=heads,
        num_key_value_heads=3, tie_word_embeddings=tied,
    )  # fmt: skip
    options = argparse.Namespace(
        contexts=[512, 1500], ubatches=[512], kv_types=["f16", "q4_0"], outputs=[1]
    )  # fmt: skip
    rows = compare.compare_loaded(model, compare.convert(model, tmp_path), options)
    assert all(compare.within(ratio) for row in rows for ratio in row.ratios.values())
    assert_exact([row for row in rows if not (row.case.mmap and row.case.use_extra_bufts)])


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen3-8b", "gemma-2-9b"])
def test_shapes_too_large_to_load(compare: ModuleType, tmp_path: Path, name: str) -> None:
    options = argparse.Namespace(
        contexts=[700, 8192], ubatches=[512], kv_types=["f16", "q8_0", "q4_0"], outputs=[1, 256]
    )  # fmt: skip
    assert_exact(compare.compare_shape(name, tmp_path, options))


@pytest.mark.slow
def test_the_whole_grid(compare: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(
        contexts=[100, 700, 4096, 32768, 131072], ubatches=[1, 64, 512, 2048], kv_types=get_args(KvType),
        outputs=[1, 256],
    )  # fmt: skip
    for name in compare.SHAPES:
        assert_exact(compare.compare_shape(name, tmp_path, options))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_the_trained_models(
    compare: ModuleType, trained: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    model = trained(architecture)
    options = argparse.Namespace(contexts=[700], ubatches=[512], kv_types=["f16", "q8_0"], outputs=[1])
    rows = compare.compare_loaded(model, compare.convert(model, tmp_path), options)
    assert all(compare.within(ratio) for row in rows for ratio in row.ratios.values())


@pytest.mark.parametrize(("kv_type", "mmap", "extra"), [("f16", True, False), ("q8_0", False, True)])
def test_a_real_run_stays_under_the_prediction(
    compare: ModuleType, demo: Path, demo_gguf: Path, kv_type: str, mmap: bool, extra: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # beside other tests, threads that spin wait for each other
    case = compare.Case(1024, kv_type=kv_type, mmap=mmap, use_extra_bufts=extra)
    found = compare.peak(read_model(demo), demo_gguf, case)
    assert found["filled_tokens"] == 1024
    assert found["peak_rss_bytes"] <= found["predicted_bytes"]
    # A process that waits for the one measured is predicted too; nothing else may be far from what was taken.
    assert found["over_bytes"] < 60 * 2**20
