"""Block formats as values: bytes per block, bits per weight, and what a row that does not fit becomes.

The numbers come from ``gguf.GGML_QUANT_SIZES`` (ggml's ``block_q*`` structs); the fallbacks from
``tensor_type_fallback`` in llama.cpp's ``src/llama-quant.cpp``.
"""

import functools
from collections.abc import Sequence
from enum import StrEnum
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


class TensorType(StrEnum):
    """A storage format of one tensor, named as llama.cpp names it, in lower case."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q6_K = "q6_k"
    Q5_K = "q5_k"
    Q4_K = "q4_k"
    Q3_K = "q3_k"
    Q2_K = "q2_k"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_0 = "q4_0"

    @functools.cached_property
    def ggml(self) -> GGMLQuantizationType:
        """The same type as the ``gguf`` package and ggml number it."""
        return GGMLQuantizationType[self.name]

    @functools.cached_property
    def block_weights(self) -> int:
        """Weights per block along a row: 256 for K-quants, 32 for the older formats, 1 for floats."""
        return int(GGML_QUANT_SIZES[self.ggml][0])

    @functools.cached_property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(GGML_QUANT_SIZES[self.ggml][1])

    @functools.cached_property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and minima included."""
        return 8.0 * self.block_bytes / self.block_weights

    def fits_rows_of(self, row_length: int) -> bool:
        """Whether a row of that many weights is a whole number of blocks."""
        return row_length % self.block_weights == 0

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this type; ``shape`` is (…, row length)."""
        assert self.fits_rows_of(shape[-1]), f"rows of {shape[-1]} do not fit {self}"
        return prod(shape) // self.block_weights * self.block_bytes


_SMALL_BLOCK_FALLBACK = {
    TensorType.Q2_K: TensorType.Q4_0,
    TensorType.Q3_K: TensorType.Q4_0,
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}

BLOCK_TYPES = {2: TensorType.Q2_K, 4: TensorType.Q4_K}
"""What "2 bit" and "4 bit" are in a GGUF: 2.625 and 4.5 bits per weight."""

LADDER = {
    2: TensorType.Q2_K,
    3: TensorType.Q3_K,
    4: TensorType.Q4_K,
    5: TensorType.Q5_K,
    6: TensorType.Q6_K,
    8: TensorType.Q8_0,
}
"""Every width that a player may be given, and what it is in a GGUF."""


def type_for_row(wanted: TensorType, row_length: int) -> TensorType:
    """Return ``wanted``, or what llama.cpp stores instead when the row is not a whole number of blocks."""
    if wanted.fits_rows_of(row_length):
        return wanted
    small = _SMALL_BLOCK_FALLBACK.get(wanted, TensorType.F16)
    return small if small.fits_rows_of(row_length) else TensorType.F16
