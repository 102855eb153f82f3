"""HQQ: half-quadratic quantisation by the library's own optimiser."""

import dataclasses
from typing import ClassVar

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.errors import BackendError


@dataclasses.dataclass(frozen=True)
class Hqq:
    """HQQ as ``HQQLinear`` stores it: ``BaseQuantizeConfig``'s settings, scales and zeros in float16.

    ``Quantizer.quantize`` alone has other defaults (axis 0, no rounded zero at 4 bit).
    """

    LIBRARY: ClassVar[str] = "hqq"

    group_size: int = 64
    axis: int = 1

    @property
    def statistics(self) -> Statistics:
        """HQQ looks at weights alone."""
        return "none"

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:  # noqa: ARG002
        """Quantise and dequantise; ``weight`` is (out, in), groups run along the row for axis 1."""
        if weight.numel() % self.group_size or (self.axis == 1 and weight.shape[1] % self.group_size):
            raise BackendError(
                f"HQQ's group size {self.group_size} does not divide rows of {weight.shape[1]}; choose another."
            )
        config = BaseQuantizeConfig(nbits=bits, group_size=self.group_size, axis=self.axis)
        packed, meta = Quantizer.quantize(weight.float(), device=str(weight.device), **config["weight_quant_params"])
        scales_dtype = torch.float16  # HQQLinear's default compute_dtype
        meta |= {
            "scale": meta["scale"].to(scales_dtype).float(),
            "zero": meta["zero"].to(scales_dtype).float(),
            "compute_dtype": torch.float32,
        }
        bits_per_weight = bits + 2 * torch.finfo(scales_dtype).bits / self.group_size
        return Stored(Quantizer.dequantize(packed, meta), bits_per_weight)
