from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from impq_edge.errors import ModelError
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import TensorSpec, read_model
from impq_edge.model.weights import find_tensor


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, name, tuple(tensor.shape), "matrix", 0, "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_reads_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """All finite 16-bit patterns, subnormals and negative zeros among them."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = (bits.view(dtype) if dtype != torch.float32 else torch.randn(1 << 16)).reshape(512, 128)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values))
    save_file({"a": torch.ones(3), "b": values.contiguous()}, tmp_path / "x.safetensors")
    read = read_tensor(tmp_path, spec_of("b", values))
    assert read.dtype == np.float32
    assert np.array_equal(read.view(np.uint32), values.float().numpy().view(np.uint32))


def test_rows_are_a_slice_of_the_whole(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["qwen3"]
    state = load_file(directory / "model.safetensors")
    for tensor in read_model(directory).tensors:
        rows = tensor.shape[0]
        part = find_tensor(directory, tensor).rows(rows // 3, rows - 1)
        assert np.array_equal(part, state[tensor.name][rows // 3 : rows - 1].float().numpy())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_counted(tmp_path: Path, bad: float) -> None:
    values = torch.ones(40, 32)
    values[7, 3] = values[30, 0] = bad
    save_file({"b": values}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"'b' has 2 NaN or infinite weights in its rows 0 to 39; use"):
        read_tensor(tmp_path, spec_of("b", values))


def changed(path: Path, change: str) -> None:
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "length":
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    elif change == "json":
        path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
    elif change == "list":
        path.write_bytes((2).to_bytes(8, "little") + b"[]")
    else:
        state = load_file(path)
        state = {"other": state["b"]} if change == "name" else {"b": state["b"].T.contiguous()}
        save_file(state, path)


@pytest.mark.parametrize("change", ["gone", "cut", "length", "json", "list", "name", "shape"])
def test_a_shard_that_changed_since_it_was_opened_is_refused(tmp_path: Path, change: str) -> None:
    values = torch.ones(40, 32)
    save_file({"b": values}, tmp_path / "x.safetensors")
    changed(tmp_path / "x.safetensors", change)
    with pytest.raises(ModelError, match=r"x.safetensors cannot be read \(.+\); download the checkpoint again") as said:
        read_tensor(tmp_path, spec_of("b", values))
    assert "\n" not in str(said.value)
