from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.conversion.tensors import gguf_rows, llama3_rope_factors, row_order
from impq_edge.model.config import Llama3Rope
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import read_model


def test_rope_factors_are_those_of_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = llama3_rope_factors(Llama3Rope(32.0, 1.0, 4.0, 8192), 500000.0, 64)
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-6)


def test_rotary_rows_are_paired_within_each_head(checkpoints: dict[str, Path]) -> None:
    """transformers' own rotation of halves, and llama.cpp's of pairs (ggml's rope_norm), agree on reordered rows."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    spec = read_model(checkpoints["llama"])
    key = next(tensor for tensor in spec.tensors if tensor.gguf_name == "blk.1.attn_k.weight")
    order, head_dim = row_order(spec, key), spec.hyperparameters.head_dim
    assert order is not None and sorted(order) == list(range(key.shape[0]))
    projected = torch.randn(1, 2, 1, head_dim)  # heads of one token
    angles = torch.rand(1, 1, head_dim // 2)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    halves, _ = apply_rotary_pos_emb(projected, projected, cos, sin)
    x, y = projected.ravel()[order].reshape(2, -1, 2).unbind(-1)
    pairs = torch.stack([x * angles.cos() - y * angles.sin(), x * angles.sin() + y * angles.cos()], -1)[0]
    assert torch.allclose(halves.ravel()[order], pairs.ravel(), atol=1e-6)


def test_only_llamas_queries_and_keys_are_reordered(checkpoints: dict[str, Path]) -> None:
    for architecture, directory in checkpoints.items():
        spec = read_model(directory)
        moved = {tensor.gguf_name.split(".")[-2] for tensor in spec.tensors if row_order(spec, tensor) is not None}
        assert moved == ({"attn_q", "attn_k"} if architecture == "llama" else set())


@pytest.mark.parametrize("step", [1, 7, 64, 100])
def test_rows_do_not_depend_on_the_pieces_they_are_read_in(checkpoints: dict[str, Path], step: int) -> None:
    for directory in checkpoints.values():
        spec = read_model(directory)
        for tensor in spec.tensors:
            if tensor.role == "embedding":
                continue
            rows, read = tensor.shape[0], gguf_rows(directory, spec, tensor)
            pieces = [read(first, min(first + step, rows)) for first in range(0, rows, step)]
            assert np.array_equal(np.concatenate(pieces), read(0, rows)), tensor.name


def test_rows_are_those_of_the_checkpoint_in_the_order_of_the_file(checkpoints: dict[str, Path]) -> None:
    for directory in checkpoints.values():
        spec = read_model(directory)
        for tensor in spec.block_matrices(1):
            order, whole = row_order(spec, tensor), read_tensor(directory, tensor)
            written = gguf_rows(directory, spec, tensor)(0, tensor.shape[0])
            assert np.array_equal(written, whole if order is None else whole[order])


def test_gemma_norms_carry_their_one(checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["gemma2"]
    spec = read_model(directory)
    for tensor in spec.tensors:
        stored, written = read_tensor(directory, tensor), gguf_rows(directory, spec, tensor)(0, tensor.shape[0])
        assert np.array_equal(written, stored + 1 if tensor.role == "vector" else stored)
