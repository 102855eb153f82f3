import gguf
import numpy as np
import pytest
import torch

from impq_edge.backends.kquant_decode import decode
from impq_edge.backends.kquant_pack import PACKED, pack
from impq_edge.ggml.types import TensorType

ROWS, BLOCKS = 37, 3


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_is_what_is_decoded(kind: TensorType) -> None:
    generator = torch.Generator().manual_seed(0)
    group, codes, scales = {"q2_k": (16, 4, 16), "q4_k": (32, 16, 64)}[kind]

    def whole(below: int, count: int) -> torch.Tensor:
        return torch.randint(below, (ROWS, count), generator=generator).float()

    q, s, m = whole(codes, 256 * BLOCKS), whole(scales, 256 * BLOCKS // group), whole(scales, 256 * BLOCKS // group)
    d, dmin = (torch.randn(ROWS, BLOCKS, generator=generator).half().float() for _ in range(2))
    scale, minimum = ((x.repeat_interleave(256 // group, dim=1) * y) for x, y in ((d, s), (dmin, m)))
    expected = q * scale.repeat_interleave(group, dim=1) - minimum.repeat_interleave(group, dim=1)
    data = pack(q, s, m, d, dmin, kind)
    assert data.shape == (ROWS, kind.tensor_bytes((1, 256 * BLOCKS)))
    assert torch.equal(decode(data, kind), expected)
    assert np.array_equal(gguf.dequantize(data.numpy(), kind.ggml), expected.numpy())
