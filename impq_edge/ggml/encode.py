"""llama.cpp's own encoder, called through the ``libggml-base`` that llama-cpp-python ships.

The ``gguf`` package decodes every format but encodes no K-quant; re-implementing the encoders would
only risk other bytes than ``llama-quantize`` writes.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ConversionError
from impq_edge.ggml.types import TensorType

ENCODERS = ("rtn", "imatrix", "gptq")
"""How weights become K-quants: by this encoder, by the same with an importance matrix, by GPTQ onto the same grids."""

DEFAULT_ENCODER = "gptq"
"""At equal types its files diverge from F16 by 41 to 67 % less than plain ggml's, on three models at 2 and at 4 bit and
in a mix of both; an importance matrix takes 1 to 25 % off (docs/method.md, tools/compare_encoders.py)."""


def encode(
    weights: NDArray[np.float32], kind: TensorType, *, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Encode rows as ggml does (``ggml_quantize_chunk``, ggml/src/ggml.c), on this thread alone.

    Rows are independent, so a matrix may be encoded in pieces on several threads: no other holds up this one.

    Parameters
    ----------
    weights
        Shape (rows, row length), finite; the row length is a multiple of the type's block.
    kind
        The format to store.
    importance
        Shape (row length,), finite and not negative: how much an error counts in each column, in every row alike;
        llama.cpp's importance matrix holds the mean squared input (tools/imatrix/imatrix.cpp). The formats weigh it
        in their own ways; floats and Q8_0 ignore it. As in llama.cpp, zeros are taken at their word: a block of
        columns that are all 0 (256 for K-quants) is stored as zeros. None is no importance matrix, which is
        another encoder and not the same as ones.

    Returns
    -------
    The bytes, shape (rows, bytes per row).

    Raises
    ------
    ConversionError
        When a weight does not fit the range of the format (F16: 65,504), or the importances are not one finite,
        non-negative number per column.
    """
    rows, row_length = weights.shape
    columns = None if importance is None else _checked(importance, row_length)
    source = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty((rows, kind.tensor_bytes((1, row_length))), dtype=np.uint8)
    if kind is TensorType.F16:
        _require_f16(source)
    written = _quantize_chunk()(  # ctypes releases the interpreter's lock
        int(kind.ggml),
        source.ctypes.data,
        out.ctypes.data,
        0,
        rows,
        row_length,
        None if columns is None else columns.ctypes.data,
    )
    assert written == out.nbytes, f"ggml wrote {written} bytes of {kind}"
    return out


def _require_f16(weights: NDArray[np.float32]) -> None:
    largest = max(weights.max(initial=0), -weights.min(initial=0))
    if largest > np.finfo(np.float16).max:
        raise ConversionError(f"A weight of {largest:g} exceeds F16's 65504; choose --type f32.")


def _checked(importance: NDArray[np.float32], row_length: int) -> NDArray[np.float32]:
    if importance.shape != (row_length,):
        raise ConversionError(
            f"Importances of shape {importance.shape} were given for rows of {row_length} weights; give one per column."
        )
    bad = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if bad.size:
        raise ConversionError(
            f"The importance of column {bad[0]} is {importance[bad[0]]:g}, not a finite number of at least 0; "
            "measure the inputs again."
        )
    return np.ascontiguousarray(importance, dtype=np.float32)


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
