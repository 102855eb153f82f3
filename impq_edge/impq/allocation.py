"""The record of an allocation: which player gets how many bits, what that takes, and the proof that it is best."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import pydantic

from impq_edge.devices.latency import Speeds
from impq_edge.errors import AllocationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import BLOCK_TYPES, LADDER, TensorType
from impq_edge.impq.problem import Choice, Problem
from impq_edge.impq.speed import NAME as GENERATION_TIME
from impq_edge.model.players import Player, PlayerKind, players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT, PlainName, Record, shown_text

PUBLISHED_TYPES = tuple(BLOCK_TYPES)
"""The bits of the paper's program, in which embedding and head are no players."""


Objective = Literal["loss", "divergence"]
"""v(S): the published −log p of a text's tokens, or the KL divergence from the unquantised model's predictions."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What speaks for a choice that is not the optimum of a program: v on the calibration text."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    method: Literal["rounds"]
    is_measured: bool  # or predicted by a model of the game that was fitted to the evaluations
    loss: float  # nats per token, of the choice
    loss_at_4_bit: float  # nats per token, of everything at 4 bit
    evaluations: int  # coalitions that were measured, among them those that cannot be afforded
    objective: Annotated[Objective, pydantic.Field(exclude_if="loss".__eq__)] = "loss"  # what is called a loss above

    @property
    def increase(self) -> float:
        """Loss increase over everything at 4 bit, nats per token."""
        return self.loss - self.loss_at_4_bit

    def told(self) -> str:
        """Return it as part of a sentence."""
        what = "calibration loss" if self.objective == "loss" else "KL divergence from the unquantised model of"
        loss = f"{what} {self.loss:.4f} nats/token, {self.increase:+.4f} to everything at 4 bit"
        if self.is_measured:
            return f"the best of {self.evaluations:,} measured coalitions that fits, {loss}"
        return f"predicted from {self.evaluations:,} measured coalitions, not measured itself, {loss}"


@dataclasses.dataclass(frozen=True)
class Allocation(Record):
    """A model's recipe for one device (N players, T types), with everything needed to recompute what it claims."""

    SCHEMA: ClassVar[str] = "impq-edge.allocation/3"

    model_name: PlainName
    model_sha256: str  # content of the checkpoint
    profile_sha256: str
    device: PlainName
    context_tokens: int
    kv_type: KvType
    alpha: float | None  # None where no program was solved
    types: tuple[int, ...]  # (T,), bits a player may have, ascending
    problem: Problem  # of a choice by evidence the constraints alone: it minimises no sum of losses
    players: PlayerKind  # of the blocks; with other types than 2 and 4, embedding and head follow them
    player_bits: tuple[int, ...]  # (N,)
    objective: float  # nats per token: the program's estimate; with types 2 and 4 of the increase over all-4-bit
    lower_bound: float | None  # proven; None where nothing had to be solved as everything fits at 4 bit, or by evidence
    relaxation_bound: float | None  # of the continuous relaxation
    outer_type: TensorType | None  # embedding and head, None where they are players
    tensor_types: dict[str, TensorType]
    header_bytes: int
    budget_bytes: int  # the largest file that meets the device and --budget
    predicted_file_bytes: int
    average_bits: float  # nominal, over the blocks' weights
    bits_per_weight: float  # file bytes over all weights
    min_generation_tok_per_s: float | None = None  # what was asked for
    speeds: Speeds | None = None  # predicted; None in records of earlier versions
    # None where the choice is the optimum of the program, as it was in all records before there was evidence.
    evidence: Annotated[Evidence | None, pydantic.Field(exclude_if=lambda evidence: evidence is None)] = None

    @property
    def choice(self) -> Choice:
        """The program's answer, (N,): the index of every player's type."""
        return tuple(self.types.index(bits) for bits in self.player_bits)

    @property
    def everything_fits(self) -> bool:
        """Whether everything is at the highest type because the budget allows it."""
        return set(self.player_bits) == {self.types[-1]}

    def check(self, spec: ModelSpec) -> None:
        """Recompute objective, budgets and bytes, trusting nothing that was stored.

        Raises
        ------
        AllocationError
            When the record belongs to another model or contradicts itself.
        """
        if self.model_sha256 != spec.content_sha256:
            raise AllocationError(
                f"The allocation was made for {shown_text(self.model_name)} "
                f"({shown_text(self.model_sha256[:12])}…), not for these weights "
                f"({spec.content_sha256[:12]}…); allocate again from a profile of this model."
            )
        if not are_types(self.types) or (self.outer_type is None) == (self.types == PUBLISHED_TYPES):
            outer = self.outer_type or "a choice of them"
            raise AllocationError(
                f"The allocation's types are {listed(self.types)} bit, with {outer} for embedding and head, which do "
                "not go together; allocate again."
            )
        who = players_of(spec, self.players, outer=self.outer_type is None)
        if not self._is_of(who):
            raise AllocationError(
                f"The allocation is not one of {listed(self.types)} bit for {len(who)} players; allocate again."
            )
        types = tensor_types(spec, [LADDER[bits] for bits in self.player_bits], self.outer_type, self.players)
        size = self.header_bytes + data_bytes(spec, types)
        objective = self.problem.objective(self.choice) if self.evidence is None else self.evidence.increase
        bound = self._unsolved_bound() if self.lower_bound is None else self.lower_bound
        claims = {
            "tensor_types": (self.tensor_types == types, True),
            "predicted_file_bytes": (self.predicted_file_bytes, size),
            "bits_per_weight": (self.bits_per_weight, 8 * size / spec.weights),
            "average_bits": (self.average_bits, average_bits(who, self.player_bits)),
            "feasibility": (self.problem.is_feasible(self.choice) and size <= self.budget_bytes, True),
            "promise of a speed": (self._keeps_its_speed(), True),
            "bound below its objective": (bound <= objective + 1e-9, True),
            "proof or evidence": (self._has_one_of_both(), True),
        }
        for name, (claimed, found) in claims.items():
            if claimed != found:
                raise AllocationError(f"The allocation's {name} is {claimed}, recomputed {found}; allocate again.")
        if abs(self.objective - objective) > 1e-9:
            raise AllocationError("The allocation's objective does not follow from its problem; allocate again.")

    def _keeps_its_speed(self) -> bool:
        """Whether the predicted speed is the one asked for; the exact limit is one of the problem's constraints."""
        if self.min_generation_tok_per_s is None:
            return True
        predicted = None if self.speeds is None else self.speeds.generation
        asked = any(constraint.name == GENERATION_TIME for constraint in self.problem.constraints)
        return asked and predicted is not None and predicted.likely_tok_per_s >= self.min_generation_tok_per_s

    def _unsolved_bound(self) -> float:
        """No bound was needed where everything is at 4 bit, and losses give none; anything else has to have one."""
        unneeded = self.types == PUBLISHED_TYPES and (self.everything_fits or self.evidence is not None)
        return float("-inf") if unneeded else float("inf")

    def _has_one_of_both(self) -> bool:
        """Whether it is the optimum of a program, or has nothing that only such an optimum has."""
        if self.evidence is None:
            return self.alpha is not None
        return self.alpha is None and self.lower_bound is None and self.relaxation_bound is None

    def _is_of(self, who: Sequence[Player]) -> bool:
        """Whether everything has the shape of these players and types."""
        problem, n_types = self.problem, len(self.types)
        inside = sum(player.block is not None for player in who)
        tables = [problem.losses, *(constraint.costs for constraint in problem.constraints)]
        if self.evidence is not None:
            del tables[0]
        return (
            len(self.player_bits) == len(who)
            and set(self.player_bits) <= set(self.types)
            and all(len(table) == len(who) and {len(row) for row in table} == {n_types} for table in tables)
            and len(problem.quadratic) in (0, inside)
            and not (self.evidence is not None and (problem.losses or problem.quadratic))
            and all(len(row) == len(problem.quadratic) for row in problem.quadratic)
        )


def are_types(types: Sequence[int]) -> bool:
    """Whether these are bits that a player may choose from: two or more of the ladder's, ascending."""
    return len(types) > 1 and set(types) <= LADDER.keys() and list(types) == sorted(set(types))


def listed(types: Sequence[int]) -> str:
    """Return types as the command line writes them, such as 2,3,4."""
    return ",".join(map(str, types))


def average_bits(players: Sequence[Player], bits: Sequence[int]) -> float:
    """Return the nominal bits of the blocks' matrices, weighted by their number of weights."""
    inside = [(p.weights, b) for p, b in zip(players, bits, strict=True) if p.block is not None]
    return sum(weights * b for weights, b in inside) / sum(weights for weights, _ in inside)
