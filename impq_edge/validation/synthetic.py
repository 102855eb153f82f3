"""Models of random weights, for what does not depend on their values: their speed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from impq_edge.conversion.metadata import add_hyperparameters
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec, implied_inventory
from impq_edge.records import sha256_json

_POOL_ROWS = 16  # encoded for real and then repeated


_SOFTCAPS = (50.0, 30.0)  # Gemma-2's, of attention and of the head


def llama_shape(
    *, blocks: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, context: int
) -> HyperParameters:
    """Return the hyperparameters of a llama with a head of its own."""
    return HyperParameters(
        architecture="llama", n_blocks=blocks, hidden=hidden, ffn=ffn, n_heads=heads, n_kv_heads=kv_heads,
        head_dim=head_dim, vocabulary=vocabulary, context=context, rms_epsilon=1e-5, rope_theta=10_000.0,
        rope_scaling=None, tied_embeddings=False, attention_bias=False, sliding_window=None, attention_softcap=None,
        final_softcap=None,
    )  # fmt: skip


def gemma_shape(**shape: int) -> HyperParameters:
    """Return those of a Gemma-2, whose attention is softcapped, with windows of the whole context."""
    attention, final = _SOFTCAPS
    return dataclasses.replace(
        llama_shape(**shape), architecture="gemma2", tied_embeddings=True, sliding_window=shape["context"],
        attention_softcap=attention, final_softcap=final,
    )  # fmt: skip


def model_of(name: str, hyper: HyperParameters) -> ModelSpec:
    """Return the record of a model of that shape that lies nowhere."""
    return ModelSpec(name, hyper, implied_inventory(hyper), sha256_json([name, repr(hyper)]))


def write_random(
    path: Path, spec: ModelSpec, types: TensorTypes, rows: Callable[[int, TensorType], NDArray[np.uint8]] | None = None
) -> None:
    """Write a llama or a Gemma-2 without a tokenizer.

    Parameters
    ----------
    types
        GGUF name → type; vectors are F32 ones.
    rows
        Makes some encoded rows, (any, bytes per row), of a length and type; random numbers, by ggml, by default.

    Raises
    ------
    ConversionError
        When ggml's encoder is not there.
    """
    hyper = spec.hyperparameters
    writer = GGUFWriter(path, hyper.architecture)
    add_hyperparameters(writer, hyper)
    writer.add_tokenizer_model("none")
    pools: dict[tuple[int, TensorType], NDArray[np.uint8]] = {}
    for tensor in spec.tensors:
        if tensor.role == "vector":
            writer.add_tensor(tensor.gguf_name, np.ones(tensor.shape, np.float32))
            continue
        count, length = tensor.shape
        kind = types[tensor.gguf_name]
        if (length, kind) not in pools:
            pools[length, kind] = (rows or _random_rows)(length, kind)
        pool = pools[length, kind]
        data = np.tile(pool, (-(-count // len(pool)), 1))[:count]
        writer.add_tensor(tensor.gguf_name, data, raw_dtype=kind.ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_rows(length: int, kind: TensorType) -> NDArray[np.uint8]:
    values = np.random.default_rng(0).normal(0, length**-0.5, size=(_POOL_ROWS, length))
    return encode(values.astype(np.float32), kind)
