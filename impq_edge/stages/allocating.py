"""The stage that decides: a profile or a ladder, a device and its budget in, an allocation out."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from impq_edge.conversion.layout import header_bytes
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import AllocationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import (
    DEFAULT_ALPHA,
    Request,
    allocate_blocks,
    allocate_chosen,
    allocate_ladder,
    require_feasible,
)
from impq_edge.impq.allocation import PUBLISHED_TYPES, Allocation, listed
from impq_edge.model.players import PlayerKind
from impq_edge.model.source import Source
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.choice import choose
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import METHODS, Method
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.stages.measuring import load_profile, measured_types
from impq_edge.stages.opening import tokenizer_of

OUTER_TYPES = (TensorType.Q6_K, TensorType.Q8_0, TensorType.Q4_K, TensorType.F16)


def allocate(
    profile: SensitivityProfile | LadderProfile | Path | str,
    *,
    device: DeviceProfile | str,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    budget_bytes: int | None = None,
    average_bits: float | Fraction | None = None,
    min_generation_tok_per_s: float | None = None,
    method: Method | None = None,
    alpha: float | None = None,
    outer_type: TensorType | str = TensorType.Q6_K,
    types: Sequence[int] | None = None,
    out: Path | None = None,
) -> Allocation:
    """Choose how many bits each player gets within a device's memory.

    Parameters
    ----------
    profile
        A sensitivity profile or a ladder, or the file or shipped name of one.
    device
        A shipped name, a TOML file, or a loaded profile.
    context_tokens, kv_type
        What the KV cache must hold and how; the device's own defaults when None.
    budget_bytes, average_bits
        Further limits, on the file and on the blocks' nominal bits.
    min_generation_tok_per_s
        Slowest generation, as predicted for tg128 from the device's measured speeds.
    method
        ``"impq"`` solves the paper's program; ``"rounds"``, for a profile in which rounds were played, takes the best
        that was measured or what a model of all measured losses thinks better. By default as the profile was made.
    alpha
        Damping of interactions in a program, 0.5 by default; 1 drops them.
    outer_type
        Type of embedding and head, where they are no players.
    types
        Bits to choose from; what was measured by default.

    Raises
    ------
    AllocationError
        When the model does not fit even at the fewest bits, or what fits is too slow.
    """
    found = load_profile(profile) if isinstance(profile, Path | str) else profile
    is_chosen = chooses(found, method)
    if is_chosen:
        require_no_program(alpha, types)
    request = allocation_request(
        device, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes, average_bits=average_bits,
        min_generation_tok_per_s=min_generation_tok_per_s, alpha=alpha, outer_type=outer_type,
        types=types or measured_types(found),
    )  # fmt: skip
    if isinstance(found, LadderProfile):
        covariance = None if found.covariance is None else np.array(found.covariance)
        losses = found.divergences(request.types)
        if not request.is_ladder:  # at 2 and 4 bit alone, embedding and head are no players
            losses = losses[[player.block is not None for player in found.who]]
        allocation = allocate_ladder(
            found.model, found.header_bytes, losses, covariance, found.identity(), request, found.settings.players,
        )  # fmt: skip
    elif is_chosen:
        allocation = allocate_chosen(
            found.model, found.header_bytes, lambda budget: choose(found, budget), found.identity(), request,
            found.settings.players,
        )  # fmt: skip
    else:
        estimate = found.estimate()
        allocation = allocate_blocks(
            found.model, found.header_bytes, estimate.phi, estimate.covariance, found.identity(), request,
            found.settings.players,
        )  # fmt: skip
    allocation.check(found.model)
    if out is not None:
        allocation.save(out)
    return allocation


def chooses(found: SensitivityProfile | LadderProfile, method: Method | None) -> bool:
    """Whether an allocation is chosen by what was measured, and not the optimum of a program.

    Raises
    ------
    AllocationError
        When nothing was measured that it could be chosen by.
    """
    if method is not None and method not in METHODS:
        raise AllocationError(f"--method {method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if isinstance(found, LadderProfile):
        if method == "rounds":
            raise AllocationError(
                f"--method rounds chooses from a game of 2 and 4 bit, and this is a ladder of {listed(found.types)}; "
                "leave it out, or give such a profile."
            )
        return False
    if found.design.rounds is not None:
        return method != "impq"
    if method == "rounds":  # simulated, a model of the game then chose worse than the program, which averages
        raise AllocationError(
            f"--method rounds chooses from what rounds measured, and this profile holds {found.design.estimator} "
            "alone; play them with profile --method rounds, which goes on from it, or leave --method out."
        )
    return False


def require_no_program(alpha: float | None, types: Sequence[int] | None = None) -> None:
    """Refuse what only a program takes."""
    if alpha is not None:
        raise AllocationError(f"--alpha {alpha:g} is for --method impq; leave it out, or choose that method.")
    if types is not None and tuple(types) != PUBLISHED_TYPES:
        raise AllocationError(
            f"--method rounds chooses between 2 and 4 bit; leave --types {listed(types)} out, or measure that ladder."
        )


def allocation_request(
    device: DeviceProfile | str,
    *,
    context_tokens: int | None,
    kv_type: KvType | None,
    budget_bytes: int | None,
    average_bits: float | Fraction | None,
    outer_type: TensorType | str,
    alpha: float | None = None,
    types: Sequence[int] = PUBLISHED_TYPES,
    min_generation_tok_per_s: float | None = None,
) -> Request:
    """Fill in the device's defaults; arguments as for :func:`allocate`."""
    target = load_device(device) if isinstance(device, str) else device
    if outer_type not in OUTER_TYPES:
        raise AllocationError(f"--head-type {outer_type!r} is not one of {', '.join(OUTER_TYPES)}.")
    if average_bits is not None and not 0 < average_bits < 100:  # NaN included
        raise AllocationError(
            f"--average-bits {average_bits} is outside {types[0]}…{types[-1]}, the bits to choose from."
        )
    return Request(
        device=target,
        context_tokens=target.context_tokens if context_tokens is None else context_tokens,
        kv_type=kv_type or target.kv_type,
        file_budget_bytes=budget_bytes,
        average_bits=None if average_bits is None else Fraction(average_bits).limit_denominator(10**6),
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        outer_type=TensorType(outer_type),
        types=tuple(types),
        min_generation_tok_per_s=min_generation_tok_per_s,
    )


def require_allocatable(source: Source, spec: ModelSpec, request: Request, players: PlayerKind) -> None:
    """Refuse what no allocation can meet, before a game is played for it; ``source`` has been fetched."""
    assert source.directory is not None
    require_feasible(spec, header_bytes(spec, tokenizer_of(source.directory, spec)), request, players)
