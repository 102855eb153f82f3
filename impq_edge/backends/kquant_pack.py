"""Codes and scales packed into ggml's Q2_K and Q4_K blocks by torch: the inverse of ``kquant_decode``.

The layouts (``block_q2_K`` and ``block_q4_K`` in ggml/src/ggml-common.h) are written out beside the decoders.
"""

from collections.abc import Callable

import torch

from impq_edge.ggml.types import TensorType


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    d: torch.Tensor,
    dmin: torch.Tensor,
    kind: TensorType,
) -> torch.Tensor:
    """Pack a matrix whose weights are d · scale · code − dmin · minimum.

    Parameters
    ----------
    codes
        Whole numbers below 4 (Q2_K) or 16 (Q4_K), any dtype, shape (rows, columns).
    scales, minima
        Whole numbers below 16 (Q2_K) or 64 (Q4_K), one per group of 16 or 32 columns, shape (rows, groups).
    d, dmin
        Shape (rows, columns / 256), one per block; rounded to float16.
    kind
        Q2_K or Q4_K.

    Returns
    -------
    uint8, shape (rows, bytes per row), where ``codes`` are.
    """
    rows, blocks = d.shape
    halves = [x.to(torch.float16).view(-1, 1).view(torch.uint8) for x in (d, dmin)]
    whole = [x.to(torch.uint8).view(rows * blocks, -1) for x in (codes, scales, minima)]
    return _PACKERS[kind](*whole, *halves).view(rows, -1)


def _pack_q2_k(
    q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    quarters = q.view(-1, 2, 4, 32)
    qs = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return torch.cat([scale | minimum << 4, qs.flatten(1), d, dmin], dim=1)


def _pack_q4_k(
    q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    (s, s_late), (m, m_late) = scale.chunk(2, dim=1), minimum.chunk(2, dim=1)
    scales = [s | s_late >> 4 << 6, m | m_late >> 4 << 6, s_late & 15 | (m_late & 15) << 4]
    pairs = q.view(-1, 4, 2, 32)
    qs = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat([d, dmin, *scales, qs.flatten(1)], dim=1)


_PACKERS: dict[TensorType, Callable[..., torch.Tensor]] = {
    TensorType.Q2_K: _pack_q2_k,
    TensorType.Q4_K: _pack_q4_k,
}
PACKED = tuple(_PACKERS)
"""The types that can be packed."""
