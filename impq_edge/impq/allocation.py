"""The record of an allocation: which block gets how many bits, what that takes, and the proof that it is best."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from impq_edge.devices.profile import KvType
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import TensorType
from impq_edge.impq.problem import Problem
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.records import Record

BLOCK_TYPES = {2: TensorType.Q2_K, 4: TensorType.Q4_K}
"""What 2 and 4 bit are in the file: 2.625 and 4.5 bits per weight."""


@dataclasses.dataclass(frozen=True)
class Allocation(Record):
    """A model's recipe for one device, with everything needed to recompute what it claims."""

    SCHEMA: ClassVar[str] = "impq-edge.allocation/1"

    model_name: str
    model_sha256: str  # content of the checkpoint
    profile_sha256: str
    device: str
    context_tokens: int
    kv_type: KvType
    alpha: float
    problem: Problem
    block_bits: tuple[int, ...]  # (L,)
    objective: float  # nats per token: the program's estimate of the loss increase over all-4-bit
    lower_bound: float | None  # proven; None where everything fits at 4 bit and nothing had to be solved
    relaxation_bound: float | None  # of the continuous relaxation
    outer_type: TensorType  # embedding and head
    tensor_types: dict[str, TensorType]
    header_bytes: int
    budget_bytes: int  # the largest file that meets the device and --budget
    predicted_file_bytes: int
    average_bits: float  # nominal, over the blocks' weights
    bits_per_weight: float  # file bytes over all weights

    @property
    def demoted(self) -> tuple[int, ...]:
        """The program's q, (L,): 1 where a block is at 2 bit."""
        return tuple(int(bits == 2) for bits in self.block_bits)

    @property
    def everything_fits(self) -> bool:
        """Whether all blocks are at 4 bit because the budget allows it."""
        return self.lower_bound is None

    def check(self, spec: ModelSpec) -> None:
        """Recompute objective, budgets and bytes, trusting nothing that was stored.

        Raises
        ------
        AllocationError
            When the record belongs to another model or contradicts itself.
        """
        if self.model_sha256 != spec.content_sha256:
            raise AllocationError(
                f"The allocation was made for {self.model_name} ({self.model_sha256[:12]}…), not for these weights "
                f"({spec.content_sha256[:12]}…); allocate again from a profile of this model."
            )
        n_blocks = spec.n_blocks
        lengths = {len(self.block_bits), len(self.problem.linear), len(self.problem.quadratic)}
        lengths |= {len(row) for row in self.problem.quadratic} | {len(c.costs) for c in self.problem.constraints}
        if lengths != {n_blocks} or not set(self.block_bits) <= BLOCK_TYPES.keys():
            raise AllocationError(f"The allocation is not one of 2 or 4 bit for {n_blocks} blocks; allocate again.")
        types = tensor_types(spec, [BLOCK_TYPES[bits] for bits in self.block_bits], self.outer_type)
        size = self.header_bytes + data_bytes(spec, types)
        claims = {
            "tensor_types": (self.tensor_types == types, True),
            "predicted_file_bytes": (self.predicted_file_bytes, size),
            "bits_per_weight": (self.bits_per_weight, 8 * size / spec.weights),
            "average_bits": (self.average_bits, average_bits(spec, self.block_bits)),
            "feasibility": (self.problem.is_feasible(self.demoted) and size <= self.budget_bytes, True),
        }
        for name, (claimed, found) in claims.items():
            if claimed != found:
                raise AllocationError(f"The allocation's {name} is {claimed}, recomputed {found}; allocate again.")
        if abs(self.objective - self.problem.objective(self.demoted)) > 1e-9:
            raise AllocationError("The allocation's objective does not follow from its problem; allocate again.")


def average_bits(spec: ModelSpec, block_bits: Sequence[int]) -> float:
    """Return the nominal bits of the blocks' matrices, weighted by their number of weights."""
    weights = [sum(tensor.weights for tensor in spec.block_matrices(i)) for i in range(spec.n_blocks)]
    return sum(w * bits for w, bits in zip(weights, block_bits, strict=True)) / sum(weights)
