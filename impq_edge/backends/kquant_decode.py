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
    return _f16(d) * (_nibbles(qs, 16).float() - 8)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    # 22 bytes, 32 weights w = d (q − 16):
    #   0  d, float16
    #   2  qh[4]: bit i % 8 of qh[i / 8] is the fifth bit of q[i]
    #   6  qs[16]: the other four bits, as in Q4_0
    d, qh, qs = blocks.split_with_sizes([2, 4, 16], dim=1)
    high = (qh.unsqueeze(2) >> _shifts(8, 1, qh) & 1).view(-1, 32)
    return _f16(d) * ((_nibbles(qs, 16) | high << 4).float() - 16)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    # 84 bytes, 16 groups of 16 weights w = (d scale) q − (dmin min):
    #   0  scales[16]: scale | min << 4, one byte per group
    #  16  qs[64], two halves of 32 bytes, each byte four weights that are 32 apart:
    #        qs[32 h + i] = q[128 h + i] | q[128 h + i + 32] << 2 | q[128 h + i + 64] << 4 | q[128 h + i + 96] << 6
    #  80  d, float16
    #  82  dmin, float16
    scales, qs, d, dmin = blocks.split_with_sizes([16, 64, 2, 2], dim=1)
    q = qs.view(-1, 2, 1, 32) >> _shifts(4, 2, qs).view(4, 1) & 3
    return _affine(q.view(-1, 16, 16), _f16(d) * (scales & 15).float(), _f16(dmin) * (scales >> 4).float())


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
    s, m, rest = scales.split_with_sizes([4, 4, 4], dim=1)
    scale = torch.cat([s & 63, rest & 15 | s >> 6 << 4], dim=1).float()
    minimum = torch.cat([m & 63, rest >> 4 | m >> 6 << 4], dim=1).float()
    return _affine(_nibbles(qs, 32).view(-1, 8, 32), _f16(d) * scale, _f16(dmin) * minimum)


def _nibbles(qs: torch.Tensor, together: int) -> torch.Tensor:
    """Return the low halves of ``together`` bytes, then their high halves, and so on: (blocks, 2 × bytes)."""
    q = qs.view(len(qs), -1, 1, together) >> _shifts(2, 4, qs).view(2, 1) & 15
    return q.view(len(qs), -1)


def _shifts(count: int, bits: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, count * bits, bits, dtype=torch.uint8, device=like.device)


def _affine(q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Return scale · q − minimum as (blocks, weights), rounded twice as ggml does; scales are (blocks, groups)."""
    return q.float().mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2)).flatten(1)


_DECODERS = {
    TensorType.F16: _f16,
    TensorType.Q4_0: _q4_0,
    TensorType.Q5_0: _q5_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q4_K: _q4_k,
}
DECODED = tuple(_DECODERS)
"""What a K-quant of 2 or 4 bit is stored as, whatever the row length (``impq_edge.ggml.types.type_for_row``)."""
