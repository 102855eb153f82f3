"""The time of a generated token as a budget of the program, in whole nanoseconds."""

import math
from fractions import Fraction

from impq_edge.devices.latency import GenerationCosts, generation_costs, kernel_speeds, read_tensors
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec

NAME = "generation time"
_NS = 10**9


class TokenTime:
    """How long a token may take, and how long it takes, rounded so that what is kept here is kept in truth.

    Raises
    ------
    AllocationError
        When nobody has measured how fast the device is, or not all types that may be used.
    """

    def __init__(
        self, spec: ModelSpec, device: DeviceProfile, used: set[TensorType], kv_type: str, min_tok_per_s: float
    ) -> None:
        self.costs: GenerationCosts = generation_costs(spec, device, used, kv_type=kv_type)
        speeds = kernel_speeds(device, spec)
        if speeds is not None and not used <= speeds.generation.weight_s.keys():
            missing = ", ".join(sorted(used - speeds.generation.weight_s.keys()))
            raise AllocationError(
                f"The measured speeds of {device.name} lack {missing}; run impq-edge calibrate-device on it again."
            )
        if self.costs.basis == "peak bandwidth":
            raise AllocationError(
                f"How fast {device.name} generates was never measured, so --min-tokens-per-second {min_tok_per_s:g} "
                "cannot be promised; run impq-edge calibrate-device on it and pass the profile that it writes."
            )
        self.limit_ns = math.floor(_NS / Fraction(min_tok_per_s))
        self.fixed_ns = math.ceil(_NS * self.costs.fixed_s)

    def matrices_ns(self, spec: ModelSpec, types: TensorTypes) -> int:
        """Return the part that depends on the types: a sum over tensors."""
        return sum(
            math.ceil(_NS * tensor.weights * self.costs.weight_s[types[tensor.gguf_name]])
            for tensor in read_tensors(spec)
        )

    def tok_per_s(self, spec: ModelSpec, types: TensorTypes) -> float:
        """Return a speed that can be asked for and kept, to six digits."""
        exact = Fraction(_NS, self.fixed_ns + self.matrices_ns(spec, types))
        digits = Fraction(10) ** (5 - math.floor(math.log10(exact)))
        return float(math.floor(exact * digits) / digits)
