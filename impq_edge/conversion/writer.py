"""Streams a checkpoint straight into one GGUF: a tensor at a time, its size known before it is written."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from impq_edge.conversion.metadata import add_metadata
from impq_edge.conversion.tensors import gguf_values
from impq_edge.conversion.tokenizer import Tokenizer
from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, data_bytes, padded
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import atomic_path

Recipe = Mapping[str, str | int | float | None]
"""How a file was made, as its metadata tells it; see :mod:`impq_edge.conversion.metadata`."""

Progress = Callable[[int], None]
"""Told how many bytes of tensor data have just been written."""


def header_bytes(spec: ModelSpec, tokenizer: Tokenizer) -> int:
    """Return the bytes of a GGUF of this model before its tensor data.

    They do not depend on the tensors' types or on the recipe: both have fields of fixed width.
    """
    types = {tensor.gguf_name: TensorType.F32 for tensor in spec.tensors}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = _open(path, spec, tokenizer, types, {})
        writer.close()
        return padded(path.stat().st_size)


def file_bytes(spec: ModelSpec, tokenizer: Tokenizer, types: TensorTypes) -> int:
    """Return the size of the file that :func:`write_gguf` would write."""
    return header_bytes(spec, tokenizer) + data_bytes(spec, types)


def write_gguf(
    directory: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    types: TensorTypes,
    out: Path,
    *,
    recipe: Recipe,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> int:
    """Write one GGUF and return its size in bytes.

    The same inputs give the same bytes, whatever the number of threads. The file appears under its
    name only when it is whole.

    Raises
    ------
    ModelError
        When weights cannot be read or are not finite.
    ConversionError
        When a weight does not fit its type, or a recipe is too long.
    RecordError
        When the file cannot be written.
    """
    expected = file_bytes(spec, tokenizer, types)
    with atomic_path(out) as temporary:
        writer = _open(temporary, spec, tokenizer, types, recipe)
        try:
            for tensor in spec.tensors:
                data = _tensor_data(directory, spec, tensor, types[tensor.gguf_name], threads)
                writer.write_tensor_data(data)
                progress(data.nbytes)
        finally:
            writer.close()
        written = temporary.stat().st_size
        if written != expected:
            raise ConversionError(f"{out} came out at {written} bytes instead of {expected}; report this as a bug.")
    return written


def _tensor_data(
    directory: Path, spec: ModelSpec, tensor: TensorSpec, kind: TensorType, threads: int | None
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    values = gguf_values(directory, spec, tensor)
    return encode(values.reshape(-1, values.shape[-1]), kind, threads)


def _open(path: Path, spec: ModelSpec, tokenizer: Tokenizer, types: TensorTypes, recipe: Recipe) -> GGUFWriter:
    """Open a writer on ``path`` with header, metadata and tensor table written."""
    writer = GGUFWriter(None, spec.hyperparameters.architecture)
    add_metadata(writer, spec, tokenizer, types, recipe)
    for tensor in spec.tensors:
        kind = types[tensor.gguf_name]
        writer.add_tensor_info(
            tensor.gguf_name, tensor.shape, np.dtype(np.float32), kind.tensor_bytes(tensor.shape), raw_dtype=kind.ggml
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer
