"""HQQ: half-quadratic quantisation by the library's own optimiser."""

import dataclasses
from typing import ClassVar

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.errors import BackendError


@dataclasses.dataclass(frozen=True)
class Hqq:
    """HQQ as ``HQQLinear`` stores it: ``BaseQuantizeConfig``'s settings; scales, zeros and decoding in float16.

    ``Quantizer.quantize`` alone has other defaults (axis 0, no rounded zero at 4 bit). On CUDA the library searches
    for the zeros in float16, on a CPU in float32, so that the two store slightly different weights.
    """

    LIBRARY: ClassVar[str] = "hqq"
    statistics: ClassVar[Statistics] = "none"  # weights alone

    group_size: int = 64
    axis: int = 1  # 1: groups run along a row; 0: the matrix, read row by row, is cut into group_size equal pieces

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise BackendError(f"HQQ's group size is {self.group_size}; choose a positive multiple of 8.")
        if self.axis not in {0, 1}:
            raise BackendError(f"HQQ's axis is {self.axis}; choose 0 or 1.")

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:  # noqa: ARG002
        """Quantise and dequantise ``weight`` (out, in).

        Raises
        ------
        BackendError
            When the group size does not fit the matrix.
        """
        self._require_fit(weight, bits)
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False, device="meta")  # draws no random numbers
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        config = BaseQuantizeConfig(nbits=bits, group_size=self.group_size, axis=self.axis)
        layer = HQQLinear(linear, config, device=str(weight.device))
        held_bytes = sum(tensor.nbytes for tensor in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
        return Stored(layer.dequantize().float(), 8 * held_bytes / weight.numel())

    def _require_fit(self, weight: torch.Tensor, bits: Bits) -> None:
        rows, columns = weight.shape
        if self.axis == 1 and columns % self.group_size:
            # The library would let a group run on into the next row.
            raise BackendError(f"HQQ's group size {self.group_size} does not divide rows of {columns}; choose another.")
        groups, rest = divmod(weight.numel(), self.group_size)
        if rest or (self.axis == 1 and groups % (8 // bits)):
            raise BackendError(
                f"HQQ cannot pack {rows} × {columns} weights of {bits} bit in groups of {self.group_size} along axis "
                f"{self.axis} into whole bytes; choose another group size."
            )
