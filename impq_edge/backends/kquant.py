"""K-quants: ggml's own encoder and decoder, so that the game is played with the weights that ship."""

import dataclasses
from typing import ClassVar

import torch

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.ggml.encode import decode, encode
from impq_edge.ggml.types import TensorType, type_for_row

TYPES: dict[Bits, TensorType] = {2: TensorType.Q2_K, 4: TensorType.Q4_K}
"""What "2 bit" and "4 bit" are in a GGUF: 2.625 and 4.5 bits per weight."""


@dataclasses.dataclass(frozen=True)
class KQuant:
    """Q2_K and Q4_K; rows that hold no K-quants get the type that llama.cpp stores instead."""

    LIBRARY: ClassVar[str] = "llama-cpp-python"

    @property
    def statistics(self) -> Statistics:
        """Without an importance matrix, nothing."""
        return "none"

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:  # noqa: ARG002
        """Encode and decode on the CPU; ``weight`` is (out, in)."""
        kind = type_for_row(TYPES[bits], weight.shape[1])
        data = encode(weight.float().cpu().numpy(), kind)
        return Stored(torch.from_numpy(decode(data, kind)).to(weight.device), kind.bits_per_weight)
