"""ggml's block formats decoded by torch, where the bytes are: on the GPU as on the CPU.

The arithmetic and its order are those of ``gguf.dequantize`` (and of ``dequantize_row_*`` in ggml/src/ggml-quants.c),
one rounding per operation, so that the weights are the same to the bit; ``gguf`` itself is numpy on one core.
"""

import torch

from impq_edge.ggml.types import TensorType

_CHUNK_WEIGHTS = 1 << 22  # blocks are decoded in pieces of about this many weights, which bounds the temporaries


def decode(data: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Decode the bytes of :func:`impq_edge.ggml.encode.encode`.

    Parameters
    ----------
    data
        uint8, shape (rows, bytes per row), contiguous.
    kind
        One of :data:`DECODED`.

    Returns
    -------
    float32, shape (rows, row length), on the device of ``data``.
    """
    blocks = data.view(-1, kind.block_bytes)
    out = torch.empty(len(blocks), kind.block_weights, device=data.device)
    step = _CHUNK_WEIGHTS // kind.block_weights
    for first in range(0, len(blocks), step):
        out[first : first + step] = _DECODERS[kind](blocks[first : first + step])
    return out.view(len(data), -1)


def _f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16).float()


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    # 18 bytes, 32 weights w = d (q − 8):
    #   0  d, float16
    #   2  qs[16]: qs[i] = q[i] | q[i + 16] << 4
    d, qs = blocks.split_with_sizes([2, 16], dim=1)
    return _f16(d) * (_fields(qs, 16, 4).float() - 8)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    # 22 bytes, 32 weights w = d (q − 16):
    #   0  d, float16
    #   2  qh[4]: bit i % 8 of qh[i / 8] is the fifth bit of q[i]
    #   6  qs[16]: the other four bits, as in Q4_0
    d, qh, qs = blocks.split_with_sizes([2, 4, 16], dim=1)
    return _f16(d) * ((_fields(qs, 16, 4) | _fields(qh, 1, 1) << 4).float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    # 24 bytes, 32 weights w = d q + m:
    #   0  d, float16
    #   2  m, float16
    #   4  qh[4], then qs[16]: the fifth and the other four bits, as in Q5_0
    d, m, qh, qs = blocks.split_with_sizes([2, 2, 4, 16], dim=1)
    return _f16(d) * (_fields(qs, 16, 4) | _fields(qh, 1, 1) << 4).float() + _f16(m)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    # 34 bytes, 32 weights w = d q:
    #   0  d, float16
    #   2  q[32], int8
    d, q = blocks.split_with_sizes([2, 32], dim=1)
    return _f16(d) * q.view(torch.int8).float()


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    # 84 bytes, 16 groups of 16 weights w = (d scale) q − (dmin min):
    #   0  scales[16]: scale | min << 4, one byte per group
    #  16  qs[64], two halves of 32 bytes, each byte four weights that are 32 apart:
    #        qs[32 h + i] = q[128 h + i] | q[128 h + i + 32] << 2 | q[128 h + i + 64] << 4 | q[128 h + i + 96] << 6
    #  80  d, float16
    #  82  dmin, float16
    scales, qs, d, dmin = blocks.split_with_sizes([16, 64, 2, 2], dim=1)
    return _affine(_fields(qs, 32, 2), _f16(d) * (scales & 15).float(), _f16(dmin) * (scales >> 4).float())


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    # 110 bytes, 16 groups of 16 weights w = (d (scale − 32)) (q − 4):
    #   0  hmask[32]: bit b of hmask[i] is the third bit of q[32 b + i]
    #  32  qs[64]: the other two bits, as in Q2_K
    #  96  scales[12], 6 bits each of s[0…15]:
    #        scales[i]     = (s[i] & 15)         | (s[i + 8] & 15) << 4, i = 0…7
    #        scales[i + 8] = s[i] >> 4 | (s[i + 4] >> 4) << 2 | (s[i + 8] >> 4) << 4 | (s[i + 12] >> 4) << 6, i = 0…3
    # 108  d, float16
    hmask, qs, low, high, d = blocks.split_with_sizes([32, 64, 8, 4, 2], dim=1)
    scale = (_fields(low, 8, 4) | _fields(high, 4, 2) << 4).float() - 32
    return _symmetric(_fields(qs, 32, 2) | _fields(hmask, 32, 1) << 2, 4, _f16(d) * scale)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    # 144 bytes, 8 groups of 32 weights w = (d scale) q − (dmin min):
    #   0  d, float16
    #   2  dmin, float16
    #   4  scales[12], 6 bits each of scale s[0…7] and min m[0…7], i = 0…3:
    #        scales[i]     = s[i]                | (s[i + 4] >> 4) << 6
    #        scales[i + 4] = m[i]                | (m[i + 4] >> 4) << 6
    #        scales[i + 8] = (s[i + 4] & 15)     | (m[i + 4] & 15) << 4
    #  16  qs[128], four pairs of groups: qs[32 p + i] = q[64 p + i] | q[64 p + i + 32] << 4
    d, dmin, scales, qs = blocks.split_with_sizes([2, 2, 12, 128], dim=1)
    return _affine(_fields(qs, 32, 4), *_scales_and_minima(d, dmin, scales))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    # 176 bytes, 8 groups of 32 weights w = (d scale) q − (dmin min):
    #   0  d, dmin, scales[12], as in Q4_K
    #  16  qh[32]: bit b of qh[i] is the fifth bit of q[32 b + i]
    #  48  qs[128]: the other four bits, as in Q4_K
    d, dmin, scales, qh, qs = blocks.split_with_sizes([2, 2, 12, 32, 128], dim=1)
    return _affine(_fields(qs, 32, 4) | _fields(qh, 32, 1) << 4, *_scales_and_minima(d, dmin, scales))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    # 210 bytes, 16 groups of 16 weights w = (d scale) (q − 32):
    #   0  ql[128], two halves of 64 bytes: ql[64 h + i] = (q[128 h + i] & 15) | (q[128 h + i + 64] & 15) << 4
    # 128  qh[64]: the other two bits, as the codes of Q2_K
    # 192  scales[16], int8
    # 208  d, float16
    ql, qh, scales, d = blocks.split_with_sizes([128, 64, 16, 2], dim=1)
    return _symmetric(_fields(ql, 64, 4) | _fields(qh, 32, 2) << 4, 32, _f16(d) * scales.view(torch.int8).float())


def _scales_and_minima(d: torch.Tensor, dmin: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return d · scale and dmin · min of Q4_K's header, (blocks, 8) each."""
    s, m, rest = scales.split_with_sizes([4, 4, 4], dim=1)
    scale = torch.cat([s & 63, rest & 15 | s >> 6 << 4], dim=1).float()
    minimum = torch.cat([m & 63, rest >> 4 | m >> 6 << 4], dim=1).float()
    return _f16(d) * scale, _f16(dmin) * minimum


def _fields(data: torch.Tensor, together: int, bits: int) -> torch.Tensor:
    """Return the lowest ``bits`` of ``together`` bytes, then the next of the same bytes, and so on, one per byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    fields = data.view(len(data), -1, 1, together) >> shifts.view(-1, 1) & (1 << bits) - 1
    return fields.view(len(data), -1)


def _affine(q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Return scale · q − minimum as (blocks, weights), rounded twice as ggml does; scales are (blocks, groups)."""
    q = q.view(*scale.shape, -1)
    return q.float().mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2)).flatten(1)


def _symmetric(q: torch.Tensor, zero: int, scale: torch.Tensor) -> torch.Tensor:
    """Return scale · (q − zero) as (blocks, weights); scales are (blocks, groups)."""
    return q.view(*scale.shape, -1).float().sub_(zero).mul_(scale.unsqueeze(2)).flatten(1)


_DECODERS = {
    TensorType.F16: _f16,
    TensorType.Q4_0: _q4_0,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
DECODED = tuple(_DECODERS)
"""What a type of the ladder is stored as, whatever the row length (``impq_edge.ggml.types.type_for_row``)."""
