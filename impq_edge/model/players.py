"""The players of the game: which matrices are stored at the same bits."""

import dataclasses
from functools import cache
from typing import Literal, get_args

from impq_edge.model.spec import ModelSpec, TensorSpec

PlayerKind = Literal["blocks", "sublayers", "tensors"]
"""Whole Transformer blocks (the paper), attention and feed-forward apart, or every matrix for itself."""

PLAYER_KINDS: tuple[PlayerKind, ...] = get_args(PlayerKind)


@dataclasses.dataclass(frozen=True)
class Player:
    """Matrices that are always stored at the same bits."""

    name: str  # such as "blk.3", "blk.3.attn", "blk.3.attn_q"; "token_embd" and "output" outside the blocks
    block: int | None  # None outside the blocks
    tensors: tuple[TensorSpec, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(tensor.weights for tensor in self.tensors)


@cache
def players_of(spec: ModelSpec, kind: PlayerKind, *, outer: bool = False) -> tuple[Player, ...]:
    """Return the N players of a model in the order of its blocks, attention before feed-forward.

    N is L for blocks, 2 L for sublayers, and the number of matrices for tensors. With ``outer`` the embedding and,
    where it has weights of its own, the head follow, a player each.
    """
    found: dict[str, list[TensorSpec]] = {}
    for block in range(spec.n_blocks):
        for tensor in sorted(spec.block_matrices(block), key=lambda t: t.gguf_name):
            found.setdefault(_player_name(tensor, kind), []).append(tensor)
    inside = tuple(Player(name, tensors[0].block, tuple(tensors)) for name, tensors in found.items())
    if not outer:
        return inside
    outside = [tensor for role in ("embedding", "head") for tensor in spec.tensors if tensor.role == role]
    return inside + tuple(Player(tensor.gguf_name.removesuffix(".weight"), None, (tensor,)) for tensor in outside)


def _player_name(tensor: TensorSpec, kind: PlayerKind) -> str:
    name = tensor.gguf_name.removesuffix(".weight")  # blk.3.attn_output
    if kind == "tensors":
        return name
    if kind == "sublayers":
        return name.split("_")[0]
    return f"blk.{tensor.block}"
