"""K-quants as the file holds them, and the weights that its bytes stand for: the game is played with what ships."""

import dataclasses
from typing import ClassVar

import torch

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.backends.kquant_decode import decode
from impq_edge.backends.kquant_gptq import SOLVED, encode_gptq
from impq_edge.errors import BackendError
from impq_edge.ggml.encode import DEFAULT_ENCODER, ENCODERS
from impq_edge.ggml.encode import encode as encode_as_ggml
from impq_edge.ggml.types import BLOCK_TYPES, TensorType, type_for_row

_STATISTICS: dict[str, Statistics] = {"rtn": "none", "imatrix": "squares", "gptq": "hessian"}


@dataclasses.dataclass(frozen=True)
class KQuant:
    """Q2_K and Q4_K; rows that hold no K-quants get the type that llama.cpp stores instead."""

    LIBRARY: ClassVar[str] = "llama-cpp-python"

    encode: str = DEFAULT_ENCODER
    """ggml's own encoder (``rtn``), also with the inputs' mean squares as llama.cpp's importance matrix (``imatrix``),
    or GPTQ onto the same grids (``gptq``), where types that it does not know get ggml's with the importance matrix."""

    def __post_init__(self) -> None:
        if self.encode not in _STATISTICS:
            raise BackendError(
                f"The encoder {self.encode!r} of K-quants is unknown; choose one of {', '.join(ENCODERS)}."
            )

    @property
    def statistics(self) -> Statistics:
        """What the encoder weighs errors with."""
        return _STATISTICS[self.encode]

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:
        """Encode, and decode where ``weight`` (out, in) is; ggml's encoder runs on the CPU, all cores.

        Raises
        ------
        ConversionError, BackendError
            When the inputs are not finite, or not those of this matrix.
        """
        return self.store(weight, type_for_row(BLOCK_TYPES[bits], weight.shape[1]), inputs)

    def store(self, weight: torch.Tensor, kind: TensorType, inputs: Inputs | None) -> Stored:
        """Do the same with any type that rows of this length hold."""
        return Stored(decode(self.encoded(weight, kind, inputs), kind), kind.bits_per_weight)

    def encoded(self, weight: torch.Tensor, kind: TensorType, inputs: Inputs | None) -> torch.Tensor:
        """Return the bytes of ``weight`` (out, in), where it is: uint8, (out, bytes per row).

        Where nothing multiplies the weights and ``inputs`` is therefore None, as for an embedding that is only
        looked up, all columns count alike.
        """
        if inputs is None or self.encode == "rtn":
            importance = None
        elif self.encode == "gptq" and kind in SOLVED:
            assert inputs.second_moment is not None, "GPTQ needs the second moment of the inputs"
            return encode_gptq(weight, inputs.second_moment, kind)
        else:
            importance = inputs.mean_square.float().cpu().numpy()
        data = encode_as_ggml(weight.float().cpu().numpy(), kind, importance=importance)
        return torch.from_numpy(data).to(weight.device)
