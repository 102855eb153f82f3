"""The record of an allocation: which player gets how many bits, what that takes, and the proof that it is best."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from impq_edge.devices.profile import KvType
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.problem import Problem
from impq_edge.model.players import Player, PlayerKind, players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.records import Record


@dataclasses.dataclass(frozen=True)
class Allocation(Record):
    """A model's recipe for one device (N players), with everything needed to recompute what it claims."""

    SCHEMA: ClassVar[str] = "impq-edge.allocation/2"

    model_name: str
    model_sha256: str  # content of the checkpoint
    profile_sha256: str
    device: str
    context_tokens: int
    kv_type: KvType
    alpha: float
    problem: Problem
    players: PlayerKind
    player_bits: tuple[int, ...]  # (N,)
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
        """The program's q, (N,): 1 where a player is at 2 bit."""
        return tuple(int(bits == 2) for bits in self.player_bits)

    @property
    def everything_fits(self) -> bool:
        """Whether everything is at 4 bit because the budget allows it."""
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
        n_players = len(players_of(spec, self.players))
        lengths = {len(self.player_bits), len(self.problem.linear), len(self.problem.quadratic)}
        lengths |= {len(row) for row in self.problem.quadratic} | {len(c.costs) for c in self.problem.constraints}
        if lengths != {n_players} or not set(self.player_bits) <= BLOCK_TYPES.keys():
            raise AllocationError(f"The allocation is not one of 2 or 4 bit for {n_players} players; allocate again.")
        types = tensor_types(spec, [BLOCK_TYPES[bits] for bits in self.player_bits], self.outer_type, self.players)
        size = self.header_bytes + data_bytes(spec, types)
        claims = {
            "tensor_types": (self.tensor_types == types, True),
            "predicted_file_bytes": (self.predicted_file_bytes, size),
            "bits_per_weight": (self.bits_per_weight, 8 * size / spec.weights),
            "average_bits": (self.average_bits, average_bits(players_of(spec, self.players), self.player_bits)),
            "feasibility": (self.problem.is_feasible(self.demoted) and size <= self.budget_bytes, True),
        }
        for name, (claimed, found) in claims.items():
            if claimed != found:
                raise AllocationError(f"The allocation's {name} is {claimed}, recomputed {found}; allocate again.")
        if abs(self.objective - self.problem.objective(self.demoted)) > 1e-9:
            raise AllocationError("The allocation's objective does not follow from its problem; allocate again.")


def average_bits(players: Sequence[Player], bits: Sequence[int]) -> float:
    """Return the nominal bits of the blocks' matrices, weighted by their number of weights."""
    return sum(p.weights * b for p, b in zip(players, bits, strict=True)) / sum(p.weights for p in players)
