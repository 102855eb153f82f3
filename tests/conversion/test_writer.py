import json
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, make_checkpoint

import impq_edge
from impq_edge.backends import load_backend
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.tensors import interleave_rotary_rows
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.conversion.writer import file_bytes, header_bytes
from impq_edge.errors import AllocationError, ConversionError, ImpqError, ModelError, RecordError
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import Request, allocate_blocks
from impq_edge.impq.allocation import Allocation
from impq_edge.model.load import read_tensor
from impq_edge.model.recipe import tensor_types
from impq_edge.model.spec import ModelSpec, read_model


def mixed(spec: ModelSpec, directory: Path) -> Allocation:
    """An allocation of the random model at 10/3 bits: blocks 0 and 2 at 4 bit."""
    tokenizer = read_tokenizer(directory, spec.hyperparameters.vocabulary, spec.hyperparameters.architecture)
    request = Request(impq_edge.load_device("laptop-16gb"), 512, "f16", average_bits=Fraction(10, 3))
    phi = np.array([0.3, 0.1, 0.2])
    return allocate_blocks(spec, header_bytes(spec, tokenizer), phi, np.zeros((3, 3)), "0" * 64, request)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_file_holds_what_the_game_was_played_with(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Every matrix of the blocks dequantises to the backend's weights, read by an independent reader."""
    import torch

    directory = checkpoints[architecture]
    spec = read_model(directory)
    allocation = mixed(spec, directory)
    assert allocation.player_bits == (4, 2, 4)
    artifact = impq_edge.convert(str(directory), allocation=allocation, out=tmp_path / "mix.gguf")
    written, backend = weights_of(tmp_path / "mix.gguf"), load_backend("kquant")
    for block, bits in enumerate(allocation.player_bits):
        for tensor in spec.block_matrices(block):
            played = backend.quantise(torch.from_numpy(read_tensor(directory, tensor)), bits).weight.numpy()
            heads = {"attn_q": 4, "attn_k": 2}.get(tensor.gguf_name.split(".")[2])
            if architecture == "llama" and heads:
                played = interleave_rotary_rows(played, heads)
            assert np.array_equal(written[tensor.gguf_name], played), tensor.gguf_name
    assert artifact.tensor_types == allocation.tensor_types
    assert set(written) == set(allocation.tensor_types)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k", "q2_k", "mix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_size_is_predicted_to_the_byte(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    directory, out = checkpoints[architecture], tmp_path / "m.gguf"
    spec = read_model(directory)
    if kind == "mix":
        allocation = mixed(spec, directory)
        predicted = allocation.predicted_file_bytes
        made = impq_edge.convert(str(directory), allocation=allocation, out=out)
    else:
        tokenizer = read_tokenizer(directory, 8192, spec.hyperparameters.architecture)
        outer = TensorType(kind) if kind in ("f32", "f16", "q8_0") else TensorType.Q6_K
        predicted = file_bytes(spec, tokenizer, tensor_types(spec, [TensorType(kind)] * 3, outer))
        made = impq_edge.convert(str(directory), type=kind, out=out)
    assert made.file_bytes == made.predicted_file_bytes == predicted == out.stat().st_size
    assert made.is_intact(tmp_path) and Artifact.load(tmp_path / "m.gguf.json") == made


def test_shards_threads_and_repetition_change_no_byte(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", "llama")
    three = make_checkpoint(tmp_path / "three", "llama", shards=3)
    for directory in (one, three):
        for threads in (1, 3):
            impq_edge.convert(
                str(directory), type="q2_k", out=tmp_path / f"{directory.name}-{threads}", threads=threads
            )
    assert (tmp_path / "one-1").read_bytes() == (tmp_path / "one-3").read_bytes()
    assert (tmp_path / "three-1").read_bytes() == (tmp_path / "three-3").read_bytes()
    first, second = (weights_of(tmp_path / name) for name in ("one-1", "three-1"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_row_that_holds_no_k_quants_needs_permission(tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    directory = make_checkpoint(tmp_path / "m", "llama", **shape)
    with pytest.raises(ModelError, match="--allow-fallback"):
        impq_edge.convert(str(directory), type="q2_k", out=tmp_path / "m.gguf")
    made = impq_edge.convert(str(directory), type="q2_k", out=tmp_path / "m.gguf", allow_fallback=True)
    assert made.tensor_types["blk.0.attn_q.weight"] == "q4_0" and made.tensor_types["blk.0.ffn_down.weight"] == "q2_k"
    report = impq_edge.validate(tmp_path / "m.gguf", windows=1, repetitions=1, generated_tokens=4)
    assert report.passed


def test_nan_weights_leave_nothing_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(checkpoints["llama"], tmp_path / "nan"))
    state = load_file(directory / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out" / "m.gguf"
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' has 1 NaN"):
        impq_edge.convert(str(directory), type="q2_k", out=out)
    assert not out.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_nothing_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        with pytest.raises(RecordError, match="is full; free some space"):
            impq_edge.convert(str(checkpoints["llama"]), type="q2_k", out=mount / "m.gguf")
        assert not any(mount.iterdir())
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("arguments", [{}, {"type": "q2_k", "allocation": Path("a.json")}, {"type": "q3"}])
def test_what_to_write_must_be_clear(demo: Path, tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ConversionError):
        impq_edge.convert(str(demo), out=tmp_path / "m.gguf", **arguments)  # type: ignore[arg-type]


def test_an_allocation_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    allocation = mixed(read_model(checkpoints["llama"]), checkpoints["llama"])
    with pytest.raises(AllocationError, match="not for these weights"):
        impq_edge.convert(str(checkpoints["qwen3"]), allocation=allocation, out=tmp_path / "m.gguf")


def test_size_is_predicted_whatever_the_directory_is_called(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    allocation = mixed(read_model(checkpoints["llama"]), checkpoints["llama"])
    renamed = shutil.copytree(checkpoints["llama"], tmp_path / "a-checkpoint-under-quite-another-name-than-before")
    made = impq_edge.convert(str(renamed), allocation=allocation, out=tmp_path / "m.gguf")
    assert made.file_bytes == allocation.predicted_file_bytes


def test_kill_at_any_moment_leaves_no_file_under_the_final_name(demo: Path, tmp_path: Path) -> None:
    """SIGKILL at spread moments of the writing; the next run cleans up and completes with the same bytes."""
    impq_edge.convert(str(demo), type="q2_k", out=tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    out = tmp_path / "k" / "m.gguf"
    code = f"import impq_edge, pathlib; impq_edge.convert(type='q2_k', out=pathlib.Path({str(out)!r}))"
    for delay_s in (0.0, 0.1, 0.3):
        child = subprocess.Popen([sys.executable, "-c", code])
        while child.poll() is None and not list(out.parent.glob(".m.gguf.*.tmp")):
            time.sleep(0.01)
        time.sleep(delay_s)
        child.kill()
        child.wait()
        assert not out.exists() or out.read_bytes() == whole
    impq_edge.convert(str(demo), type="q2_k", out=out)
    assert out.read_bytes() == whole
    assert sorted(path.name for path in out.parent.iterdir()) == ["m.gguf", "m.gguf.json"]


def test_the_recipe_tells_how_the_file_was_made(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    spec = read_model(checkpoints["llama"])
    allocation = mixed(spec, checkpoints["llama"])
    impq_edge.convert(str(checkpoints["llama"]), allocation=allocation, out=tmp_path / "m.gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["impq_edge.recipe"]
    recipe = json.loads(bytes(field.parts[field.data[0]]))
    assert recipe["allocation_sha256"] == allocation.identity() and recipe["model_sha256"] == spec.content_sha256
    assert isinstance(recipe["budget_bytes"], int) and issubclass(AllocationError, ImpqError)
