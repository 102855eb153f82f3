"""The stage: a profile's φ and C, a device and its budget in, an allocation out."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from impq_edge.devices.memory import resident_bytes, weight_budget_bytes
from impq_edge.devices.profile import DeviceProfile, KvType
from impq_edge.errors import AllocationError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.allocation import Allocation, average_bits
from impq_edge.impq.problem import Constraint, Problem, published_objective
from impq_edge.impq.solve import Solution, solve
from impq_edge.model.players import Player, PlayerKind, players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Request:
    """What an allocation is asked to meet, all at once."""

    device: DeviceProfile
    context_tokens: int
    kv_type: KvType
    file_budget_bytes: int | None = None  # --budget
    average_bits: Fraction | None = None  # --average-bits, nominal
    alpha: float = 0.5  # 1 drops the interactions; the paper takes 0.5
    outer_type: TensorType = TensorType.Q6_K


def allocate_blocks(
    spec: ModelSpec,
    header_bytes: int,
    phi: NDArray[np.float64],
    covariance: NDArray[np.float64],
    profile_sha256: str,
    request: Request,
    players: PlayerKind = "blocks",
) -> Allocation:
    """Solve IMPQ for one device.

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
    problem, solution, demoted = _solved(phi, covariance, request.alpha, constraints)
    bits = _bits(demoted)
    types = sizes.types(bits)
    file_bytes = header_bytes + data_bytes(spec, types)
    return Allocation(
        model_name=spec.name,
        model_sha256=spec.content_sha256,
        profile_sha256=profile_sha256,
        device=request.device.name,
        context_tokens=request.context_tokens,
        kv_type=request.kv_type,
        alpha=request.alpha,
        problem=problem,
        players=players,
        player_bits=bits,
        objective=problem.objective(demoted),
        lower_bound=solution.lower_bound if solution else None,
        relaxation_bound=solution.relaxation_bound if solution else None,
        outer_type=request.outer_type,
        tensor_types=types,
        header_bytes=header_bytes,
        budget_bytes=sizes.file_budget_bytes(types),
        predicted_file_bytes=file_bytes,
        average_bits=average_bits(sizes.players, bits),
        bits_per_weight=8 * file_bytes / spec.weights,
    )


def bits_at(
    players: Sequence[Player],
    phi: NDArray[np.float64],
    covariance: NDArray[np.float64],
    target: Fraction,
    alpha: float = 0.5,
) -> tuple[int, ...]:
    """Return the bits of the N players in IMPQ's answer to a limit on average bits alone, without a device."""
    *_, demoted = _solved(phi, covariance, alpha, (_average_bits_constraint(players, target),))
    return _bits(demoted)


def _solved(
    phi: NDArray[np.float64], covariance: NDArray[np.float64], alpha: float, constraints: tuple[Constraint, ...]
) -> tuple[Problem, Solution | None, tuple[int, ...]]:
    """Return the program, what proves the answer (None where everything fits at 4 bit), and the answer q."""
    linear, quadratic = published_objective(phi, covariance, alpha)
    problem = Problem(tuple(linear.tolist()), tuple(map(tuple, quadratic.tolist())), constraints)
    nobody = (0,) * len(phi)
    if problem.is_feasible(nobody):
        return problem, None, nobody
    solution = solve(problem)
    return problem, solution, solution.demoted


def _bits(demoted: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 if q else 4 for q in demoted)


def _average_bits_constraint(players: Sequence[Player], target: Fraction) -> Constraint:
    weights = tuple(player.weights for player in players)
    return Constraint("average bits", "weights", weights, int((target - 2) / 2 * sum(weights)))


def require_feasible(spec: ModelSpec, header_bytes: int, request: Request) -> None:
    """Refuse a request that no allocation can meet, before anything expensive is done for it.

    Raises
    ------
    AllocationError
        As :func:`allocate_blocks`.
    """
    _feasible(spec, header_bytes, request, "blocks")


def _feasible(
    spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind
) -> "tuple[_Sizes, tuple[Constraint, ...]]":
    _require_sane(request)
    sizes = _Sizes(spec, header_bytes, request, players)
    constraints = tuple(sizes.constraints())
    sizes.require_all_2_bit_fits(constraints)
    return sizes, constraints


class _Sizes:
    """The bytes of a model's possible files, and what a request leaves for them."""

    def __init__(self, spec: ModelSpec, header_bytes: int, request: Request, players: PlayerKind) -> None:
        self.players = players_of(spec, players)
        self._kind: PlayerKind = players
        self._spec = spec
        self._header_bytes = header_bytes
        self._request = request
        self._all_2 = (2,) * len(self.players)
        limits = (request.file_budget_bytes, request.device.max_file_bytes)
        self._file_limit_bytes = min((limit for limit in limits if limit is not None), default=None)
        self._device_bytes = weight_budget_bytes(
            spec.hyperparameters, request.device, context_tokens=request.context_tokens, kv_type=request.kv_type
        )

    def types(self, bits: tuple[int, ...]) -> dict[str, TensorType]:
        return tensor_types(self._spec, [BLOCK_TYPES[b] for b in bits], self._request.outer_type, self._kind)

    def constraints(self) -> list[Constraint]:
        """Return every budget of the request, less what everything at 2 bit takes."""
        memory_costs, file_costs = [], []
        for index in range(len(self.players)):
            promoted = tuple(4 if i == index else 2 for i in range(len(self.players)))
            memory_costs.append(self._resident_bytes(promoted) - self._resident_bytes(self._all_2))
            file_costs.append(self._file_bytes(promoted) - self._file_bytes(self._all_2))
        found = [
            Constraint(
                "device memory", "bytes", tuple(memory_costs), self._device_bytes - self._resident_bytes(self._all_2)
            )
        ]
        if self._file_limit_bytes is not None:
            left = self._file_limit_bytes - self._file_bytes(self._all_2)
            found.append(Constraint("file budget", "bytes", tuple(file_costs), left))
        if self._request.average_bits is not None:
            found.append(_average_bits_constraint(self.players, self._request.average_bits))
        return found

    def require_all_2_bit_fits(self, constraints: tuple[Constraint, ...]) -> None:
        for constraint in constraints:
            if constraint.budget >= 0:
                continue
            device, smallest = self._request.device, self._resident_bytes(self._all_2)
            if constraint.name == "file budget":
                raise AllocationError(
                    f"A budget of {self._file_limit_bytes} bytes cannot hold {self._spec.name} even with every block "
                    f"at 2 bit; the smallest that works is --budget {self._file_bytes(self._all_2)}."
                )
            raise AllocationError(
                f"{device.name} leaves {max(0, self._device_bytes)} bytes for the weights of {self._spec.name} at a "
                f"context of {self._request.context_tokens} tokens, but every block at 2 bit takes {smallest}; "
                "use a shorter --context, --kv-type q8_0, a larger device or a smaller model."
            )

    def file_budget_bytes(self, types: dict[str, TensorType]) -> int:
        """Return the largest file the device and --budget allow, given these types' repacked copies."""
        repacked = resident_bytes(self._spec, types, self._request.device) - data_bytes(self._spec, types)
        allowed = self._device_bytes - repacked
        return allowed if self._file_limit_bytes is None else min(allowed, self._file_limit_bytes)

    def _resident_bytes(self, bits: tuple[int, ...]) -> int:
        return self._header_bytes + resident_bytes(self._spec, self.types(bits), self._request.device)

    def _file_bytes(self, bits: tuple[int, ...]) -> int:
        return self._header_bytes + data_bytes(self._spec, self.types(bits))


def _require_sane(request: Request) -> None:
    if not 0 <= request.alpha <= 1:
        raise AllocationError(f"--alpha {request.alpha} is outside 0…1; the paper takes 0.5, and 1 drops interactions.")
    if request.average_bits is not None and not 2 <= request.average_bits <= 4:
        raise AllocationError(
            f"--average-bits {float(request.average_bits):g} is outside 2…4, the bits of the two versions of a block."
        )
    if request.context_tokens < 1:
        raise AllocationError(f"--context {request.context_tokens} is not a number of tokens; ask for 1 or more.")
