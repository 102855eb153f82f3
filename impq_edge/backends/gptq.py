"""GPTQ: gptqmodel's own solver, on Hessians of what enters a matrix when nothing is quantised."""

import dataclasses
import math
from typing import ClassVar

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

from impq_edge.backends import Bits, Inputs, Statistics, Stored, undisturbed
from impq_edge.errors import BackendError

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""What gptqmodel's layers can hold (``TorchLinear.SUPPORTS_GROUP_SIZE``), but for one group per row."""

_SCALE_DTYPE = torch.float16
_WORD_BITS = 32  # codes, zeros and group indices are packed into int32


@dataclasses.dataclass(frozen=True)
class Gptq:
    """GPTQ as gptqmodel stores it; fields and defaults are those of its ``QuantizeConfig``.

    Columns are visited in the library's default order ("group aware"), or by falling diagonal of the
    Hessian with ``desc_act``. With ``sym`` the grid is centred on zero.
    """

    LIBRARY: ClassVar[str] = "gptqmodel"
    statistics: ClassVar[Statistics] = "hessian"

    group_size: int = 128
    damp_percent: float = 0.05  # of the Hessian's mean diagonal, added to the diagonal
    desc_act: bool = False
    sym: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise BackendError(f"GPTQ's group size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}.")
        if not 0 < self.damp_percent < 1:
            raise BackendError(f"GPTQ's damp-percent {self.damp_percent} is not between 0 and 1; the usual is 0.05.")

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:
        """Quantise and dequantise; ``weight`` is (out, in), groups run along the row, a last one may be shorter.

        As in the library, the weights of inputs that are always zero become zero, and the damping is
        raised until the Hessian can be factored. Scales are rounded to float16, as its layers hold them.

        Raises
        ------
        BackendError
            When the Hessian cannot be factored at any damping, where the library would round to nearest.
        """
        assert inputs is not None and inputs.second_moment is not None, "GPTQ needs the second moment of the inputs"
        rows, columns = weight.shape
        solved, scale, group_of_column = self._solve(weight, bits, inputs.second_moment, inputs.tokens)
        scale, group_of_column = scale.to(weight.device), group_of_column.to(weight.device)
        codes = torch.round(solved / scale[:, group_of_column])  # the zero taken off already
        stored = codes * scale.to(_SCALE_DTYPE).float()[:, group_of_column]
        return Stored(stored, _stored_bits(rows, columns, bits, groups=scale.shape[1]) / (rows * columns))

    def _solve(
        self, weight: torch.Tensor, bits: Bits, second_moment: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the dequantised weight (out, in), scales (out, groups), and the group of each column (in,)."""
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        with undisturbed():
            # No directory for offloading, and no silent change to round-to-nearest.
            config = QuantizeConfig(bits=bits, offload_to_disk=False, fallback=None, **dataclasses.asdict(self))
            solver = GPTQ(NamedModule(layer, "matrix", "matrix", 0), config)
            solver.quantizer.configure(perchannel=True)
            # What add_batch arrives at: 2/n Σ x xᵀ over n tokens. The solver writes into it.
            solver.H = 2.0 * second_moment.to(device=weight.device, dtype=torch.float32)
            solver.nsamples = tokens
            try:
                solved, scale, _, group_of_column, _, _, damping, _ = solver.quantize()
            except ValueError as error:  # a loss that is not a number
                raise BackendError(
                    f"GPTQ failed on a {tuple(weight.shape)} matrix ({error}); raise damp-percent."
                ) from None
        if damping >= 1.0:
            raise BackendError(
                f"GPTQ cannot factor the Hessian of a {tuple(weight.shape)} matrix at any damping; "
                "use a text and a dtype with which the model's activations are finite."
            )
        return solved, scale, group_of_column.long()


def _stored_bits(rows: int, columns: int, bits: int, groups: int) -> int:
    """Size of gptqmodel's buffers: codes, and per group and row a zero and a scale, and a group index per column."""
    words = math.ceil(columns * bits / _WORD_BITS) * rows + groups * math.ceil(rows * bits / _WORD_BITS) + columns
    return words * _WORD_BITS + groups * rows * torch.finfo(_SCALE_DTYPE).bits
