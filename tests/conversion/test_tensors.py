from pathlib import Path

import numpy as np
import torch

from impq_edge.conversion.tensors import gguf_values, interleave_rotary_rows, llama3_rope_factors
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


def test_rotary_rows_are_paired_within_each_head() -> None:
    rows = np.arange(2 * 6, dtype=np.float32)[:, None]  # 2 heads of 6
    assert interleave_rotary_rows(rows, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_gemma_norms_carry_their_one(checkpoints: dict[str, Path]) -> None:
    spec = read_model(checkpoints["gemma2"])
    for tensor in spec.tensors:
        stored, written = read_tensor(checkpoints["gemma2"], tensor), gguf_values(checkpoints["gemma2"], spec, tensor)
        assert np.array_equal(written, stored + 1 if tensor.role == "vector" else stored)
