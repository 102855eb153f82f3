import gguf
import numpy as np
import pytest
import torch

from impq_edge.backends.kquant_decode import decode
from impq_edge.backends.kquant_pack import PACKED, pack
from impq_edge.ggml.types import TensorType

ROWS = 37


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("blocks", [1, 3])
def test_what_is_packed_is_what_is_decoded(kind: TensorType, blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    group, (low, high), (least, most) = {
        "q2_k": (16, (0, 3), (0, 15)),
        "q3_k": (16, (-4, 3), (-32, 31)),
        "q4_k": (32, (0, 15), (0, 63)),
        "q5_k": (32, (0, 31), (0, 63)),
        "q6_k": (16, (-32, 31), (-128, 127)),
    }[kind]

    def whole(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (ROWS, count), generator=generator).float()

    q, s = whole(low, high, 256 * blocks), whole(least, most, 256 * blocks // group)
    m = whole(0, most, 256 * blocks // group) * (low == 0)
    d, dmin = (torch.randn(ROWS, blocks, generator=generator).half().float() for _ in range(2))
    scale, minimum = ((x.repeat_interleave(256 // group, dim=1) * y) for x, y in ((d, s), (dmin, m)))
    expected = q * scale.repeat_interleave(group, dim=1) - minimum.repeat_interleave(group, dim=1)
    data = pack(q, s, m, d, dmin, kind)
    assert torch.equal(data, pack(q.T.contiguous().T, s, m, d, dmin, kind))
    assert data.shape == (ROWS, kind.tensor_bytes((1, 256 * blocks)))
    assert torch.equal(decode(data, kind), expected)
    assert np.array_equal(gguf.dequantize(data.numpy(), kind.ggml), expected.numpy())
