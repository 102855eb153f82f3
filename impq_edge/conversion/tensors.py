"""The values that a GGUF holds where a checkpoint holds others: order of rotary rows, norms, rope factors."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from impq_edge.model.config import Llama3Rope
from impq_edge.model.spec import ROPE_FACTORS, ModelSpec, TensorSpec
from impq_edge.model.weights import find_tensor, require_finite

ReadRows = Callable[[int, int], NDArray[np.float32]]
"""Reads rows first … last - 1 of a tensor, (last - first, …); a vector's rows are its elements."""


def gguf_rows(directory: Path, spec: ModelSpec, tensor: TensorSpec) -> ReadRows:
    """Return what reads rows of a tensor as the GGUF stores them, from any number of threads.

    Raises
    ------
    ModelError
        Now or later, when the weights cannot be read; later, when they are not finite.
    """
    hyper = spec.hyperparameters
    if tensor.gguf_name == ROPE_FACTORS:
        assert hyper.rope_scaling is not None
        factors = llama3_rope_factors(hyper.rope_scaling, hyper.rope_theta, hyper.head_dim)
        return lambda first, last: factors[first:last]
    stored, order = find_tensor(directory, tensor), row_order(spec, tensor)
    gains = hyper.architecture == "gemma2" and tensor.role == "vector"

    def read(first: int, last: int) -> NDArray[np.float32]:
        rows = np.arange(first, last) if order is None else order[first:last]
        lowest = int(rows.min())
        values = stored.rows(lowest, int(rows.max()) + 1)
        require_finite(values, tensor.name, lowest)
        if order is not None:
            values = values[rows - lowest]
        return values + 1 if gains else values  # Gemma's RMSNorm scales by 1 + w, llama.cpp's by w

    return read


def row_order(spec: ModelSpec, tensor: TensorSpec) -> NDArray[np.intp] | None:
    """Return which row of the checkpoint's tensor each row of the GGUF's is, (rows,); None: the same.

    transformers rotates the two halves (x, y) of a head against each other, llama.cpp's ``LLAMA_ROPE_TYPE_NORM``
    (used for the llama architecture only) neighbouring rows: it wants pairs (x₀, y₀, x₁, y₁, …).
    """
    hyper = spec.hyperparameters
    if hyper.architecture != "llama" or tensor.block is None:
        return None
    heads = {"attn_q": hyper.n_heads, "attn_k": hyper.n_kv_heads}.get(tensor.gguf_name.split(".")[-2])
    if heads is None:
        return None
    rows = np.arange(tensor.shape[0]).reshape(heads, 2, -1)
    return rows.swapaxes(1, 2).ravel()


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
