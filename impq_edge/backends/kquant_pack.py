"""Codes and scales packed into ggml's K-quant blocks by torch: the inverse of ``kquant_decode``.

The layouts (``block_q2_K`` to ``block_q6_K`` in ggml/src/ggml-common.h) are written out beside the decoders.
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
        Whole numbers, any dtype, shape (rows, columns): 0…3 (Q2_K), −4…3 (Q3_K), 0…15 (Q4_K), 0…31 (Q5_K) or
        −32…31 (Q6_K).
    scales
        Whole numbers, one per group of 16 columns, in Q4_K and Q5_K of 32, shape (rows, groups): 0…15 (Q2_K),
        −32…31 (Q3_K), 0…63 (Q4_K, Q5_K) or −128…127 (Q6_K).
    minima
        As the scales; Q3_K and Q6_K have none and do not read these.
    d, dmin
        Shape (rows, columns / 256), one per block; rounded to float16. Q3_K and Q6_K do not read ``dmin``.
    kind
        One of :data:`PACKED`.

    Returns
    -------
    uint8, shape (rows, bytes per row), where ``codes`` are.
    """
    rows, blocks = d.shape
    halves = [x.to(torch.float16).flatten().view(torch.uint8).view(-1, 2) for x in (d, dmin)]
    # A negative float has no uint8; int16 holds all that occurs, and what is kept of it is its low byte.
    whole = [x.to(torch.int16).reshape(rows * blocks, -1) for x in (codes, scales, minima)]
    (q, scale, minimum), (d_bytes, dmin_bytes) = whole, halves
    if kind in _SYMMETRIC:
        return _SYMMETRIC[kind](q, scale, d_bytes).view(rows, -1)
    return _AFFINE[kind](q, scale, minimum, d_bytes, dmin_bytes).view(rows, -1)


def _pack_q2_k(
    q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    return torch.cat([_bytes(scale | minimum << 4), _joined(q, 32, 2), d, dmin], dim=1)


def _pack_q3_k(q: torch.Tensor, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    q, scale = q + 4, scale + 32
    scales = [_joined(scale & 15, 8, 4), _joined(scale >> 4, 4, 2)]
    return torch.cat([_joined(q >> 2, 32, 1), _joined(q & 3, 32, 2), *scales, d], dim=1)


def _pack_q4_k(
    q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    return torch.cat([d, dmin, _scales_and_minima(scale, minimum), _joined(q, 32, 4)], dim=1)


def _pack_q5_k(
    q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> torch.Tensor:
    scales = _scales_and_minima(scale, minimum)
    return torch.cat([d, dmin, scales, _joined(q >> 4, 32, 1), _joined(q & 15, 32, 4)], dim=1)


def _pack_q6_k(q: torch.Tensor, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    q = q + 32
    return torch.cat([_joined(q & 15, 64, 4), _joined(q >> 4, 32, 2), _bytes(scale), d], dim=1)


def _scales_and_minima(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    (s, s_late), (m, m_late) = scale.chunk(2, dim=1), minimum.chunk(2, dim=1)
    return _bytes(torch.cat([s | s_late >> 4 << 6, m | m_late >> 4 << 6, s_late & 15 | (m_late & 15) << 4], dim=1))


def _joined(fields: torch.Tensor, together: int, bits: int) -> torch.Tensor:
    """Put ``together`` fields into the lowest ``bits`` of as many bytes, the next into the next bits, and so on."""
    count = 8 // bits
    parts = fields.view(len(fields), -1, count, together)
    shifts = torch.arange(0, 8, bits, dtype=fields.dtype, device=fields.device).view(-1, 1)
    return _bytes((parts << shifts).sum(dim=2, dtype=fields.dtype).flatten(1))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return (x & 255).to(torch.uint8)


_AFFINE: dict[TensorType, Callable[..., torch.Tensor]] = {
    TensorType.Q2_K: _pack_q2_k,
    TensorType.Q4_K: _pack_q4_k,
    TensorType.Q5_K: _pack_q5_k,
}
_SYMMETRIC: dict[TensorType, Callable[..., torch.Tensor]] = {TensorType.Q3_K: _pack_q3_k, TensorType.Q6_K: _pack_q6_k}
PACKED = (*_AFFINE, *_SYMMETRIC)
"""The types that can be packed."""
