"""Which type every tensor of a model is stored in, and how many bytes that takes."""

import dataclasses
from collections.abc import Mapping, Sequence

from impq_edge.errors import ModelError
from impq_edge.ggml.types import TensorType, type_for_row
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, TensorSpec

ALIGNMENT_BYTES = 32
"""Every tensor starts at a multiple of this in a GGUF (``GGUF_DEFAULT_ALIGNMENT``)."""

TensorTypes = Mapping[str, TensorType]
"""GGUF name of every tensor → the type it is stored in."""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A matrix whose rows are no whole number of blocks of the wanted type."""

    tensor: TensorSpec
    wanted: TensorType
    stored: TensorType

    @property
    def extra_bytes(self) -> int:
        """What the substitution costs against the wanted type's bits per weight."""
        wanted_bytes = self.tensor.weights * self.wanted.bits_per_weight / 8
        return round(self.stored.tensor_bytes(self.tensor.shape) - wanted_bytes)


def tensor_types(
    spec: ModelSpec, kinds: Sequence[TensorType], outer: TensorType | None, players: PlayerKind = "blocks"
) -> dict[str, TensorType]:
    """Return the type of every tensor, by GGUF name, in the order of ``spec.tensors``.

    Parameters
    ----------
    spec
        The model.
    kinds
        The type asked for the matrices of each of the N players, (N,).
    outer
        The type asked for the embedding and the head; None where they are the last players.
    players
        What a player is.

    Rows that are no whole number of blocks get what llama.cpp would store (:func:`type_for_row`); norms
    and biases stay F32, as llama.cpp keeps them.
    """
    wanted = _wanted(spec, kinds, outer, players)
    return {tensor.gguf_name: type_for_row(kind, tensor.shape[-1]) for tensor, kind in wanted.items()}


def fallbacks(spec: ModelSpec, kind: TensorType, outer: TensorType) -> tuple[Fallback, ...]:
    """Return every matrix that cannot hold the type asked for it, when all blocks are asked for ``kind``."""
    return tuple(
        Fallback(tensor, wanted, type_for_row(wanted, tensor.shape[-1]))
        for tensor, wanted in _wanted(spec, [kind] * spec.n_blocks, outer, "blocks").items()
        if not wanted.fits_rows_of(tensor.shape[-1])
    )


def require_no_fallback(found: Sequence[Fallback]) -> None:
    """Refuse a model with rows that hold no K-quants, saying what would be stored and what it costs.

    Raises
    ------
    ModelError
        When ``found`` is not empty.
    """
    if found:
        raise ModelError(f"{describe_fallbacks(found)} Pass --allow-fallback to build it so.")


def describe_fallbacks(found: Sequence[Fallback]) -> str:
    """Say what is stored instead in rows that hold no K-quants, and what that costs; ``found`` is not empty."""
    kinds = sorted({(f.tensor.shape[-1], f.wanted, f.stored) for f in found})
    told = "; ".join(
        f"{sum(1 for f in found if (f.tensor.shape[-1], f.wanted, f.stored) == kind)} tensors with rows of {kind[0]} "
        f"become {kind[2]} ({kind[2].bits_per_weight:g} bits/weight) instead of {kind[1]} ({kind[1].bits_per_weight:g})"
        for kind in kinds
    )
    extra = sum(f.extra_bytes for f in found)
    return f"Rows not divisible by 256 hold no K-quants: {told}; that costs {extra / 2**20:.1f} MiB more."


def data_bytes(spec: ModelSpec, types: TensorTypes) -> int:
    """Return the bytes of a GGUF's tensor data, each tensor padded to the alignment."""
    return sum(padded(types[tensor.gguf_name].tensor_bytes(tensor.shape)) for tensor in spec.tensors)


def padded(size_bytes: int) -> int:
    """Round up to the alignment of a GGUF."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _wanted(
    spec: ModelSpec, kinds: Sequence[TensorType], outer: TensorType | None, players: PlayerKind
) -> dict[TensorSpec, TensorType]:
    who = players_of(spec, players, outer=outer is None)
    wanted = {tensor: kind for player, kind in zip(who, kinds, strict=True) for tensor in player.tensors}
    for tensor in spec.tensors:
        if tensor.role == "vector":
            wanted[tensor] = TensorType.F32
        elif tensor not in wanted:
            assert outer is not None
            wanted[tensor] = outer
    return {tensor: wanted[tensor] for tensor in spec.tensors}
