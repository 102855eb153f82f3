"""A small GGUF of random Q4_K weights, to try llama.cpp's kernels where there is no model at hand."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from impq_edge.ggml.types import TensorType
from impq_edge.validation.synthetic import llama_shape, model_of, write_random

_HIDDEN, _HEADS, _VOCABULARY, _CONTEXT_TOKENS = 256, 4, 256, 512


def write_sample(path: Path) -> None:
    """Write a one-block llama without a tokenizer; every matrix is 256 × 256 and holds Q4_K."""
    hyper = llama_shape(
        blocks=1, hidden=_HIDDEN, ffn=_HIDDEN, heads=_HEADS, kv_heads=_HEADS, head_dim=_HIDDEN // _HEADS,
        vocabulary=_VOCABULARY, context=_CONTEXT_TOKENS,
    )  # fmt: skip
    spec = model_of("sample", hyper)
    types = {tensor.gguf_name: TensorType.Q4_K for tensor in spec.tensors}
    write_random(path, spec, types, _random_bytes)


def _random_bytes(length: int, kind: TensorType) -> NDArray[np.uint8]:
    """Return rows as ``block_q4_K`` without ggml, which may be what is broken: scales, then random bytes."""
    rows = np.random.default_rng(0).integers(0, 256, size=(length, kind.tensor_bytes((1, length))), dtype=np.uint8)
    blocks = rows.reshape(-1, kind.block_bytes)
    blocks[:, :4] = np.full(2, 1e-4, np.float16).view(np.uint8)  # d and dmin
    return rows
