"""A small GGUF of random Q4_K weights, to try llama.cpp's kernels where there is no model at hand."""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

_HIDDEN, _HEADS, _VOCABULARY, _CONTEXT_TOKENS = 256, 4, 256, 512
_Q4_K = GGMLQuantizationType.Q4_K
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_sample(path: Path) -> None:
    """Write a one-block llama without a tokenizer; every matrix is 256 × 256 and holds Q4_K."""
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(_VOCABULARY)
    writer.add_context_length(_CONTEXT_TOKENS)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)
    for name in ("token_embd", "output", *(f"blk.0.{matrix}" for matrix in _MATRICES)):
        writer.add_tensor(f"{name}.weight", _random_q4_k(generator), raw_dtype=_Q4_K)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_q4_k(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return rows of one block each: float16 d and dmin, then random scales and weights (``block_q4_K``)."""
    block_bytes = GGML_QUANT_SIZES[_Q4_K][1]
    rows = generator.integers(0, 256, size=(_HIDDEN, block_bytes), dtype=np.uint8)
    rows[:, :4] = np.full((_HIDDEN, 2), 1e-4, np.float16).view(np.uint8)
    return rows
