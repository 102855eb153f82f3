"""Quanto: linear quantisation between the extremes of each group, as optimum-quanto's layers do it."""

import dataclasses
from typing import ClassVar

import torch
from optimum.quanto import QLinear, WeightQBitsTensor, qint2, qint4

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.errors import BackendError

_QTYPES = {2: qint2, 4: qint4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Quanto:
    """Quanto as ``quantize(model, weights=qint2)`` (or ``qint4``) and ``freeze(model)`` store it.

    A group size of 128 is the library's default and follows its rule: in rows longer than that, the next smaller
    multiple of 32, down to 32, that divides them; else the whole row. Any other size must divide the row.

    The library computes, keeps its scales and shifts, and decodes in the model's own dtype, which is ``dtype``:
    float32 takes 2·32 bits per group, and bfloat16, what a model loaded in bfloat16 gets, 2·16. At 4 bit, in groups of
    128, the library may keep 16-bit weights in the layout of a kernel (TinyGemm, AWQ) that rounds the shift once more;
    ours are the plain ones.
    """

    LIBRARY: ClassVar[str] = "optimum-quanto"
    statistics: ClassVar[Statistics] = "none"  # weights alone

    group_size: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise BackendError(f"Quanto's group size is {self.group_size}; choose a positive number.")
        if self.dtype not in _DTYPES:
            raise BackendError(f"Quanto's dtype is {self.dtype!r}; choose one of {', '.join(_DTYPES)}.")

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:  # noqa: ARG002
        """Quantise and dequantise ``weight`` (out, in); a group runs along a row.

        Raises
        ------
        BackendError
            When the group size does not divide the row.
        """
        rows, columns = weight.shape
        base = weight.to(_DTYPES[self.dtype])
        # The library's layer, without weights, tells what it would do.
        layer = QLinear(columns, rows, bias=False, dtype=base.dtype, device="meta", weights=_QTYPES[bits])
        group_size = layer.weight_group_size if self.group_size == 128 else self._divisor_of(columns)
        scale, shift = layer.optimizer(base, qtype=layer.weight_qtype, axis=0, group_size=group_size)
        data = torch.ops.quanto.quantize_affine(base, bits, 0, group_size, scale, shift)
        held = WeightQBitsTensor(layer.weight_qtype, 0, group_size, base.size(), base.stride(), data, scale, shift)
        held_bytes = sum(tensor.nbytes for tensor in (held._data._data, scale, shift))
        # Unpacking compiles a C++ or CUDA extension on first use: decode what was packed instead.
        held._data = data
        return Stored(held.dequantize().float(), 8 * held_bytes / weight.numel())

    def _divisor_of(self, columns: int) -> int:
        if columns % self.group_size:
            raise BackendError(
                f"Quanto's group size {self.group_size} does not divide rows of {columns}; choose a divisor, "
                "or 128, which the library adapts to the row."
            )
        return self.group_size
