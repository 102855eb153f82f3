"""K-quants: ggml's own encoder, and the weights that its bytes stand for: the game is played with what ships."""

import dataclasses
from typing import ClassVar

import torch

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.backends.kquant_decode import decode
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType, type_for_row

TYPES: dict[Bits, TensorType] = {2: TensorType.Q2_K, 4: TensorType.Q4_K}
"""What "2 bit" and "4 bit" are in a GGUF: 2.625 and 4.5 bits per weight."""


@dataclasses.dataclass(frozen=True)
class KQuant:
    """Q2_K and Q4_K; rows that hold no K-quants get the type that llama.cpp stores instead."""

    LIBRARY: ClassVar[str] = "llama-cpp-python"

    importance: bool = False
    """Whether errors are weighed by the mean squared input of their column, as llama.cpp's importance matrix does."""

    @property
    def statistics(self) -> Statistics:
        """The importances are the inputs' mean squares."""
        return "squares" if self.importance else "none"

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:
        """Encode on the CPU, all cores, and decode where ``weight`` (out, in) is.

        Raises
        ------
        ConversionError
            When the inputs are not finite, or not those of this matrix.
        """
        kind = type_for_row(TYPES[bits], weight.shape[1])
        importance = None
        if self.importance:
            assert inputs is not None, "a backend that asks for statistics is given them"
            importance = inputs.mean_square.float().cpu().numpy()
        data = torch.from_numpy(encode(weight.float().cpu().numpy(), kind, importance=importance))
        return Stored(decode(data.to(weight.device), kind), kind.bits_per_weight)
