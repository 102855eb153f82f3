"""The values that a GGUF holds where a checkpoint holds others: order of rotary rows, norms, rope factors."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from impq_edge.model.config import Llama3Rope
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import ROPE_FACTORS, ModelSpec, TensorSpec


def gguf_values(directory: Path, spec: ModelSpec, tensor: TensorSpec) -> NDArray[np.float32]:
    """Return a tensor's values as the GGUF stores them, in the tensor's own shape.

    Raises
    ------
    ModelError
        When the weights cannot be read or are not finite.
    """
    hyper = spec.hyperparameters
    if tensor.gguf_name == ROPE_FACTORS:
        assert hyper.rope_scaling is not None
        return llama3_rope_factors(hyper.rope_scaling, hyper.rope_theta, hyper.head_dim)
    values = read_tensor(directory, tensor)
    if hyper.architecture == "llama":
        heads = {"attn_q": hyper.n_heads, "attn_k": hyper.n_kv_heads}.get(tensor.gguf_name.split(".")[-2])
        if heads is not None:
            return interleave_rotary_rows(values, heads)
    if hyper.architecture == "gemma2" and tensor.role == "vector":
        return values + 1  # Gemma's RMSNorm scales by 1 + w, llama.cpp's by w
    return values


def interleave_rotary_rows(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the output rows of each head from halves (x, y) to pairs (x₀, y₀, x₁, y₁, …).

    transformers rotates the two halves of a head against each other, llama.cpp's ``LLAMA_ROPE_TYPE_NORM``
    (used for the llama architecture only) neighbouring rows. ``values`` is (heads · head_dim, …).
    """
    head_dim = len(values) // heads
    halves = values.reshape(heads, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def llama3_rope_factors(scaling: Llama3Rope, theta: float, head_dim: int) -> NDArray[np.float32]:
    """Return what llama.cpp divides each rotary frequency by, shape (head_dim / 2,).

    Wavelengths shorter than original_context / high_freq_factor keep their frequency, those longer than
    original_context / low_freq_factor are slowed by ``factor``, those between interpolate linearly in
    frequency (``_compute_llama3_parameters`` in transformers' modeling_rope_utils.py).
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_context * frequencies / (2 * math.pi)  # rotations within the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = np.clip(share, 0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)
