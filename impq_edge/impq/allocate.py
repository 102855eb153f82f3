"""The stage: what a profile measured, a device and its budget in, an allocation out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from impq_edge.devices.latency import predict_speeds, read_tensors
from impq_edge.devices.memory import (
    gpu_resident_bytes,
    gpu_weight_budget_bytes,
    resident_bytes,
    weight_budget_bytes,
)
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import AllocationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import LADDER, TensorType
from impq_edge.impq.allocation import PUBLISHED_TYPES, Allocation, Evidence, are_types, average_bits, listed
from impq_edge.impq.problem import Choice, Constraint, Problem, ladder_objective, published_objective
from impq_edge.impq.solve import Solution, least, solve
from impq_edge.impq.speed import NAME as GENERATION_TIME
from impq_edge.impq.speed import TokenTime
from impq_edge.model.players import Player, PlayerKind, players_of
from impq_edge.model.recipe import TensorTypes, data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec

_LADDER_GAP = 1e-4
"""Share of a ladder's objective that may be left between it and its bound, far below what losses are measured to."""

DEFAULT_ALPHA = 0.5
"""Damping of interactions, the paper's."""

_FASTEST_TOK_PER_S = 1e6  # a token then takes as long as a single barrier of threads


@dataclasses.dataclass(frozen=True)
class Request:
    """What an allocation is asked to meet, all at once."""

    device: DeviceProfile
    context_tokens: int
    kv_type: KvType
    file_budget_bytes: int | None = None  # --budget
    average_bits: Fraction | None = None  # --average-bits, nominal
    alpha: float = DEFAULT_ALPHA  # of the program's interactions; 1 drops them
    outer_type: TensorType = TensorType.Q6_K  # embedding and head, where they are no players
    types: tuple[int, ...] = PUBLISHED_TYPES  # (T,), bits a player may have, ascending
    min_generation_tok_per_s: float | None = None  # --min-tokens-per-second

    @property
    def is_ladder(self) -> bool:
        """Whether the types are others than the paper's 2 and 4; embedding and head are then players too."""
        return self.types != PUBLISHED_TYPES


def allocate_blocks(
    spec: ModelSpec,
    header_bytes: int,
    phi: NDArray[np.float64],
    covariance: NDArray[np.float64],
    profile_sha256: str,
    request: Request,
    players: PlayerKind = "blocks",
) -> Allocation:
    """Solve IMPQ, the paper's program of 2 and 4 bit, for one device.

    Parameters
    ----------
    spec, header_bytes
        The model and the bytes of its GGUF before the tensor data.
    phi, covariance
        (N,) in nats and (N, N) in nats².
    profile_sha256
        The profile they come from.
    players
        What the N players are.

    Raises
    ------
    AllocationError
        When the model does not fit even with every block at 2 bit (says the smallest budget that
        works), or a setting is out of range.
    """
    sizes, constraints = _feasible(spec, header_bytes, request, players)
    if request.is_ladder:
        raise AllocationError(
            f"φ holds no losses at {listed(request.types)} bit; measure those types, or leave --types at 2,4."
        )
    problem, solution, choice = _solved(phi, covariance, request.alpha, constraints)
    return _allocation(sizes, problem, solution, choice, profile_sha256)


def allocate_ladder(
    spec: ModelSpec,
    header_bytes: int,
    losses: NDArray[np.float64],
    covariance: NDArray[np.float64] | None,
    profile_sha256: str,
    request: Request,
    players: PlayerKind = "blocks",
) -> Allocation:
    """Choose one of T types for every player, for one device.

    Parameters
    ----------
    spec, header_bytes, profile_sha256, players
        As for :func:`allocate_blocks`.
    losses
        (N, T) in nats per token: of each player alone at each type. The players are the blocks' and, where the
        types are others than 2 and 4, the embedding and an untied head.
    covariance
        (P, P) in nats², of the P players of the blocks at 2 bit; None where a profile has none. It says nothing of
        other types, so that there are no interactions where 2 is not among them.

    Returns
    -------
    Allocation
        Within 1e-4 of the best objective, or the solver's precision; its ``lower_bound`` says how near.

    Raises
    ------
    AllocationError
        When the model does not fit even with everything at the types that take the least (says the smallest budget
        that works), the losses are not those of the players, or a setting is out of range.
    """
    sizes, constraints = _feasible(spec, header_bytes, request, players)
    wanted = (len(sizes.players), len(request.types))
    if losses.shape != wanted or not np.isfinite(losses).all():
        raise AllocationError(
            f"The profile's losses, of shape {losses.shape}, are not numbers for {wanted[0]} players at "
            f"{listed(request.types)} bit; make it anew with those types."
        )
    interactions = covariance if request.types[0] == PUBLISHED_TYPES[0] else None
    corrected, quadratic = ladder_objective(losses, interactions, request.alpha)
    problem = _problem(corrected, quadratic, constraints)
    solution = solve(problem, _LADDER_GAP)
    return _allocation(sizes, problem, solution, solution.choice, profile_sha256)


Choose = Callable[[tuple[Constraint, ...]], tuple[Choice, Evidence]]
"""Chooses among what keeps all budgets, and says what speaks for it."""


def allocate_chosen(
    spec: ModelSpec,
    header_bytes: int,
    choose: Choose,
    profile_sha256: str,
    request: Request,
    players: PlayerKind = "blocks",
) -> Allocation:
    """Take what ``choose`` chooses within the budgets of one device; no program is solved, and nothing is proven.

    Other arguments and errors are those of :func:`allocate_blocks`.
    """
    sizes, constraints = _feasible(spec, header_bytes, request, players)
    choice, evidence = choose(constraints)
    return _allocation(sizes, Problem((), (), constraints), None, choice, profile_sha256, evidence)


def budgets_of(
    spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind = "blocks"
) -> tuple[Constraint, ...]:
    """Return every budget of a request.

    Raises
    ------
    AllocationError
        As :func:`allocate_blocks`.
    """
    return _feasible(spec, header_bytes, request, players)[1]


def bits_at(
    players: Sequence[Player],
    phi: NDArray[np.float64],
    covariance: NDArray[np.float64],
    target: Fraction,
    alpha: float = DEFAULT_ALPHA,
) -> tuple[int, ...]:
    """Return the bits of the N players in IMPQ's answer to a limit on average bits alone, without a device."""
    return bits_within((average_bits_constraint(players, PUBLISHED_TYPES, target),), phi, covariance, alpha)


def bits_within(
    budgets: tuple[Constraint, ...],
    phi: NDArray[np.float64],
    covariance: NDArray[np.float64],
    alpha: float = DEFAULT_ALPHA,
) -> tuple[int, ...]:
    """Return the bits of the N players in IMPQ's answer to any budgets that can be kept."""
    *_, choice = _solved(phi, covariance, alpha, budgets)
    return tuple(PUBLISHED_TYPES[kind] for kind in choice)


def require_feasible(spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind = "blocks") -> None:
    """Refuse a request that no allocation can meet, before anything expensive is done for it.

    Raises
    ------
    AllocationError
        As :func:`allocate_blocks`.
    """
    _feasible(spec, header_bytes, request, players)


def _solved(
    phi: NDArray[np.float64], covariance: NDArray[np.float64], alpha: float, constraints: tuple[Constraint, ...]
) -> tuple[Problem, Solution | None, Choice]:
    """Return the paper's program, what proves the answer (None where everything fits at 4 bit), and the answer."""
    linear, quadratic = published_objective(phi, covariance, alpha)
    problem = _problem(np.column_stack([linear, np.zeros(len(linear))]), quadratic, constraints)
    all_4 = (1,) * len(phi)
    if problem.is_feasible(all_4):
        return problem, None, all_4
    solution = solve(problem)
    return problem, solution, solution.choice


def _problem(
    losses: NDArray[np.float64], quadratic: NDArray[np.float64], constraints: tuple[Constraint, ...]
) -> Problem:
    return Problem(tuple(map(tuple, losses.tolist())), tuple(map(tuple, quadratic.tolist())), constraints)


def average_bits_constraint(players: Sequence[Player], types: tuple[int, ...], target: Fraction) -> Constraint:
    """Σ weights_i (bits_i − lowest) ≤ (target − lowest) Σ weights_i over the blocks; the outer players are free."""
    weights = [0 if player.block is None else player.weights for player in players]
    costs = tuple(tuple(count * (bits - types[0]) for bits in types) for count in weights)
    return Constraint("average bits", "bits", costs, int((target - types[0]) * sum(weights)))


def _allocation(
    sizes: "_Sizes",
    problem: Problem,
    solution: Solution | None,
    choice: Choice,
    profile_sha256: str,
    evidence: Evidence | None = None,
) -> Allocation:
    spec, request = sizes.spec, sizes.request
    bits = sizes.bits(choice)
    types = sizes.types(bits)
    file_bytes = sizes.header_bytes + data_bytes(spec, types)
    return Allocation(
        model_name=spec.name,
        model_sha256=spec.content_sha256,
        profile_sha256=profile_sha256,
        device=request.device.name,
        context_tokens=request.context_tokens,
        kv_type=request.kv_type,
        alpha=None if evidence else request.alpha,
        types=request.types,
        problem=problem,
        players=sizes.kind,
        player_bits=bits,
        objective=evidence.increase if evidence else problem.objective(choice),
        lower_bound=solution.lower_bound if solution else None,
        relaxation_bound=solution.relaxation_bound if solution else None,
        outer_type=sizes.outer_type,
        tensor_types=types,
        header_bytes=sizes.header_bytes,
        budget_bytes=sizes.file_budget_bytes(types),
        predicted_file_bytes=file_bytes,
        average_bits=average_bits(sizes.players, bits),
        bits_per_weight=8 * file_bytes / spec.weights,
        min_generation_tok_per_s=request.min_generation_tok_per_s,
        speeds=predict_speeds(spec, types, request.device, kv_type=request.kv_type),
        evidence=evidence,
    )


def _feasible(
    spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind
) -> "tuple[_Sizes, tuple[Constraint, ...]]":
    _require_sane(request)
    sizes = _Sizes(spec, header_bytes, request, players)
    constraints = tuple(sizes.constraints())
    sizes.require_some_choice(constraints)
    return sizes, constraints


class _Sizes:
    """The bytes of a model's possible files, and what a request leaves for them."""

    def __init__(self, spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind) -> None:
        self.spec = spec
        self.header_bytes = header_bytes
        self.request = request
        self.kind = players
        self.players = players_of(spec, players, outer=request.is_ladder)
        self.outer_type = None if request.is_ladder else request.outer_type
        self._lowest = (0,) * len(self.players)
        limits = (request.file_budget_bytes, request.device.max_file_bytes)
        self._file_limit_bytes = min((limit for limit in limits if limit is not None), default=None)
        self._device_bytes = weight_budget_bytes(
            spec.hyperparameters, request.device, context_tokens=request.context_tokens, kv_type=request.kv_type
        )
        self._gpu_bytes = gpu_weight_budget_bytes(  # None: no layers lie in a memory of the GPU's own
            spec.hyperparameters, request.device, context_tokens=request.context_tokens, kv_type=request.kv_type
        )

        self._token_time = self._promised_time()

    def bits(self, choice: Choice) -> tuple[int, ...]:
        return tuple(self.request.types[kind] for kind in choice)

    def types(self, bits: tuple[int, ...]) -> dict[str, TensorType]:
        return tensor_types(self.spec, [LADDER[b] for b in bits], self.outer_type, self.kind)

    def constraints(self) -> list[Constraint]:
        """Return every budget of the request, less what everything at the lowest type takes."""
        left = self._device_bytes - self._resident_bytes(self._lowest)
        found = [Constraint("device memory", "bytes", self._costs(self._resident), left)]
        if self._gpu_bytes is not None:
            left = self._gpu_bytes - self._gpu_resident(self.spec, self.types(self.bits(self._lowest)))
            found.append(Constraint("GPU memory", "bytes", self._costs(self._gpu_resident), left))
        if self._file_limit_bytes is not None:
            left = self._file_limit_bytes - self._file_bytes(self._lowest)
            found.append(Constraint("file budget", "bytes", self._costs(data_bytes), left))
        if self.request.average_bits is not None:
            found.append(average_bits_constraint(self.players, self.request.types, self.request.average_bits))
        if self._token_time is not None:
            time = self._token_time
            left = time.limit_ns - time.fixed_ns - time.matrices_ns(self.spec, self.types(self.bits(self._lowest)))
            found.append(Constraint(GENERATION_TIME, "ns", self._costs(time.matrices_ns), left))
        return found

    def _promised_time(self) -> TokenTime | None:
        if self.request.min_generation_tok_per_s is None:
            return None
        uniform = [self.types((bits,) * len(self.players)) for bits in self.request.types]
        used = {types[tensor.gguf_name] for types in uniform for tensor in read_tensors(self.spec)}
        return TokenTime(
            self.spec, self.request.device, used, self.request.kv_type, self.request.min_generation_tok_per_s
        )

    def _costs(self, measure: Callable[[ModelSpec, TensorTypes], int]) -> tuple[tuple[int, ...], ...]:
        """Return what each type costs a player beyond its lowest; both measures are sums over tensors."""
        uniform = [self.types((bits,) * len(self.players)) for bits in self.request.types]
        costs = []
        for player in self.players:
            alone = dataclasses.replace(self.spec, tensors=player.tensors)
            sizes = [measure(alone, types) for types in uniform]
            costs.append(tuple(size - sizes[0] for size in sizes))
        return tuple(costs)

    def require_some_choice(self, constraints: tuple[Constraint, ...]) -> None:
        """Refuse budgets that no choice keeps; the last one asked about, --budget, is told the smallest that works."""
        if all(constraint.budget >= 0 for constraint in constraints):
            return  # everything at the lowest type will do
        kept: tuple[Constraint, ...] = ()
        order = (GENERATION_TIME, "file budget")  # after all others
        for constraint in sorted(constraints, key=lambda c: order.index(c.name) + 1 if c.name in order else 0):
            choice = least(constraint, kept)
            if constraint.used(choice) > constraint.budget:
                if constraint.name == GENERATION_TIME:
                    raise AllocationError(self._too_slow(constraint, choice, kept))
                raise AllocationError(self._refusal(constraint, choice))
            kept += (constraint,)

    def _refusal(self, constraint: Constraint, smallest: Choice) -> str:
        """Say that even ``smallest``, the choice that takes the least, is too large."""
        request, name = self.request, self.spec.name
        what = "everything" if request.is_ladder else "every block"
        what += f" at {request.types[0]} bit" if smallest == self._lowest else " at the type that takes the least"
        if constraint.name == "file budget":
            return (
                f"A budget of {self._file_limit_bytes} bytes cannot hold {name} even with {what}; "
                f"the smallest that works is --budget {self._file_bytes(smallest)}."
            )
        if constraint.name == "average bits":
            assert request.average_bits is not None
            enough = math.ceil(1e6 * average_bits(self.players, self.bits(smallest))) / 1e6
            return (
                f"--average-bits {float(request.average_bits):g} is too few for {name} on {request.device.name}, where "
                f"fewer bits can take more memory; ask for {enough:.6f} or more."
            )
        if constraint.name == "GPU memory":
            held = self._gpu_resident(self.spec, self.types(self.bits(smallest)))
            return (
                f"{request.device.name} leaves {max(0, self._gpu_bytes or 0)} bytes of GPU memory for the weights of "
                f"{name} at a context of {request.context_tokens} tokens, but {what} takes {held} there with "
                f"gpu_layers at {request.device.gpu_layers}; lower gpu_layers in a copy of the device's TOML, or use a "
                "shorter --context."
            )
        return (
            f"{request.device.name} leaves {max(0, self._device_bytes)} bytes for the weights of {name} at a "
            f"context of {request.context_tokens} tokens, but {what} takes {self._resident_bytes(smallest)}; "
            "use a shorter --context, --kv-type q8_0, a larger device or a smaller model."
        )

    def _too_slow(self, constraint: Constraint, fastest: Choice, kept: tuple[Constraint, ...]) -> str:
        """Say that ``fastest``, of what the budgets ``kept`` allow, is too slow, and which of them is in the way."""
        device, name, flag = self.request.device.name, self.spec.name, "--min-tokens-per-second"
        asked = f"{flag} {self.request.min_generation_tok_per_s:g}"
        most = f"{self._tok_per_s(fastest):g}"
        if constraint.used(least(constraint, ())) > constraint.budget:
            alone = f"{self._tok_per_s(least(constraint, ())):g}"
            return (
                f"{device} generates at most {alone} tokens/s with {name}, whatever the types; {asked} needs a faster "
                f"device or a smaller model: ask for {most} or less."
            )
        memory = next(other for other in kept if other.name == "device memory")
        if constraint.used(least(constraint, (memory,))) <= constraint.budget:
            assert self.request.average_bits is not None
            bits = f"{float(self.request.average_bits):g}"
            return (
                f"{device} generates at most {most} tokens/s with {name} at --average-bits {bits}, where more bits "
                f"would be faster; raise it, or ask for {flag} {most}."
            )
        missing = memory.used(least(memory, (constraint,))) - memory.budget
        return (
            f"{device} generates at most {most} tokens/s with what of {name} fits its memory; {asked} needs {missing} "
            f"bytes more, as the faster types are larger: use a shorter --context, --kv-type q8_0 or a larger device, "
            f"or ask for {most}."
        )

    def _tok_per_s(self, choice: Choice) -> float:
        assert self._token_time is not None
        return self._token_time.tok_per_s(self.spec, self.types(self.bits(choice)))

    def file_budget_bytes(self, types: dict[str, TensorType]) -> int:
        """Return the largest file the device and --budget allow, given these types' copies and where they lie."""
        data = data_bytes(self.spec, types)
        allowed = [self._device_bytes + data - self._resident(self.spec, types), self._file_limit_bytes]
        if self._gpu_bytes is not None:
            held = self._gpu_resident(self.spec, types)
            allowed.append(self._gpu_bytes + self.header_bytes + data - held)
        return min(limit for limit in allowed if limit is not None)

    def _gpu_resident(self, spec: ModelSpec, types: TensorTypes) -> int:
        return gpu_resident_bytes(spec, types, self.request.device)

    def _resident(self, spec: ModelSpec, types: TensorTypes) -> int:
        return resident_bytes(spec, types, self.request.device)

    def _resident_bytes(self, choice: Choice) -> int:
        return self.header_bytes + self._resident(self.spec, self.types(self.bits(choice)))

    def _file_bytes(self, choice: Choice) -> int:
        return self.header_bytes + data_bytes(self.spec, self.types(self.bits(choice)))


def _require_sane(request: Request) -> None:
    if not are_types(request.types):
        raise AllocationError(
            f"--types {listed(request.types)} is no ladder; give two or more of {listed(tuple(LADDER))}, ascending."
        )
    if not 0 <= request.alpha <= 1:
        raise AllocationError(f"--alpha {request.alpha} is outside 0…1; the paper takes 0.5, and 1 drops interactions.")
    low, high = request.types[0], request.types[-1]
    if request.average_bits is not None and not low <= request.average_bits <= high:
        what = f"--types {listed(request.types)}" if request.is_ladder else "the two versions of a block"
        raise AllocationError(
            f"--average-bits {float(request.average_bits):g} is outside {low}…{high}, the bits of {what}."
        )
    speed = request.min_generation_tok_per_s
    if speed is not None and not 0 < speed < _FASTEST_TOK_PER_S:  # NaN included
        raise AllocationError(f"--min-tokens-per-second {speed} is not a speed; ask for more than 0, such as 5.")
    if request.context_tokens < 1:
        raise AllocationError(f"--context {request.context_tokens} is not a number of tokens; ask for 1 or more.")
