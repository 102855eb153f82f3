"""llama.cpp's own encoder, called through the ``libggml-base`` that llama-cpp-python ships.

The ``gguf`` package decodes every format but encodes no K-quant; re-implementing the encoders would
only risk other bytes than ``llama-quantize`` writes.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ConversionError
from impq_edge.ggml.types import TensorType

_CHUNK_WEIGHTS = 1 << 20  # rows are handed to threads in pieces of about this many weights


def encode(weights: NDArray[np.float32], kind: TensorType, threads: int | None = None) -> NDArray[np.uint8]:
    """Encode a matrix as ggml does (``ggml_quantize_chunk``, ggml/src/ggml.c), without importance matrix.

    Parameters
    ----------
    weights
        Shape (rows, row length), finite; the row length is a multiple of the type's block.
    kind
        The format to store.
    threads
        Rows are independent, so the bytes do not depend on this; all cores by default.

    Returns
    -------
    The bytes, shape (rows, bytes per row).

    Raises
    ------
    ConversionError
        When a weight does not fit the range of the format (F16: 65,504).
    """
    rows, row_length = weights.shape
    source = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty((rows, kind.tensor_bytes((1, row_length))), dtype=np.uint8)
    if kind is TensorType.F16 and np.abs(source).max(initial=0) > np.finfo(np.float16).max:
        raise ConversionError(f"A weight of {np.abs(source).max():g} exceeds F16's 65504; choose --type f32.")
    step = max(1, _CHUNK_WEIGHTS // row_length)

    def encode_rows(first: int) -> None:
        count = min(step, rows - first)
        written = _quantize_chunk()(
            int(kind.ggml), source.ctypes.data, out.ctypes.data, first * row_length, count, row_length, None
        )
        assert written == count * out.shape[1], f"ggml wrote {written} bytes of {kind}"

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # ctypes releases the interpreter's lock
        list(pool.map(encode_rows, range(0, rows, step)))
    return out


def decode(data: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """Decode the bytes of :func:`encode`, shape (rows, bytes per row), to weights (rows, row length)."""
    return gguf.dequantize(data, kind.ggml).astype(np.float32, copy=False)


@cache
def _quantize_chunk() -> Callable[..., int]:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise ConversionError("llama-cpp-python is not installed; run the README's set-up command again.")
    folder = Path(next(iter(found.submodule_search_locations))) / "lib"
    library = next((path for name in ("libggml-base.so*", "*ggml-base*") for path in sorted(folder.glob(name))), None)
    if library is None:
        raise ConversionError(f"{folder} holds no ggml-base library; install llama-cpp-python again.")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
