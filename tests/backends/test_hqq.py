import pytest
import torch

from impq_edge.backends import load_backend
from impq_edge.errors import BackendError


@pytest.mark.parametrize("bits", [2, 4])
def test_same_weights_as_the_librarys_own_layer(bits: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, bias=False)
    weight = linear.weight.detach().clone()
    layer = HQQLinear(linear, BaseQuantizeConfig(nbits=bits, group_size=64), compute_dtype=torch.float16, device="cpu")
    stored = load_backend("hqq").quantise(weight, bits)
    assert stored.bits_per_weight == bits + 0.5
    # The layer multiplies in float16; ours in float32 with the same stored numbers.
    assert torch.allclose(stored.weight, layer.dequantize().float(), atol=2e-3 * weight.abs().max().item())


def test_more_bits_are_closer() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    error = [(load_backend("hqq").quantise(weight, bits).weight - weight).norm() for bits in (2, 4)]
    assert error[1] < 0.4 * error[0]


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BackendError, match="group size 64 does not divide rows of 100"):
        load_backend("hqq").quantise(torch.randn(64, 100), 2)
