from pathlib import Path
from typing import Any

import pytest
import torch
from assembled import assemble, block_linears, load, logits

from impq_edge.backends import load_backend
from impq_edge.errors import BackendError


def library_layer(linear: torch.nn.Linear, bits: int, **settings: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(linear, BaseQuantizeConfig(nbits=bits, **settings), device=str(linear.weight.device))


@pytest.mark.parametrize("shape", [(128, 256), (24, 576)])
@pytest.mark.parametrize("settings", [{}, {"axis": 0}, {"group_size": 32, "axis": 1}])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_and_bytes_are_the_librarys(bits: int, settings: dict[str, int], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    weight = linear.weight.detach().clone()
    layer = library_layer(linear, bits, **settings)
    stored = load_backend("hqq", **settings).quantise(weight, bits)
    assert stored.weight.dtype == torch.float32
    assert torch.equal(stored.weight, layer.dequantize().float())
    held_bytes = sum(tensor.nbytes for tensor in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
    assert stored.bits_per_weight == 8 * held_bytes / weight.numel()
    assert stored.bits_per_weight == bits + 2 * 16 / settings.get("group_size", 64)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_on_cuda(bits: int, axis: int) -> None:
    linear = torch.nn.Linear(576, 256, bias=False)
    weight, backend = linear.weight.detach().clone(), load_backend("hqq", axis=axis)
    there, here = backend.quantise(weight.cuda(), bits), backend.quantise(weight, bits)
    assert torch.equal(there.weight, library_layer(linear.cuda(), bits, group_size=64, axis=axis).dequantize().float())
    assert there.bits_per_weight == here.bits_per_weight
    # There the zeros are searched for in float16: another rounding, an equally good one.
    errors = [(stored.weight.cpu() - weight).norm().item() for stored in (there, here)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("bits", [2, 4])
def test_logits_are_those_of_the_librarys_model(checkpoints: dict[str, Path], architecture: str, bits: int) -> None:
    directory = checkpoints[architecture]
    whole = load(directory, torch.float16)  # what HQQLinear multiplies in unless told otherwise
    for name, linear in block_linears(whole).items():
        whole.set_submodule(name, library_layer(linear, bits))
    assert not block_linears(whole)  # every one of them replaced
    ours = logits(assemble(directory, load_backend("hqq"), bits, torch.float16))
    theirs = logits(whole)
    # The same weights in float16: only the order of a product's sums can differ, by a rounding to 11 bits now and then.
    assert (ours - theirs).abs().max() <= 4 / 2**11 * theirs.abs().max()
    unquantised = logits(load(directory, torch.float32))
    assert (unquantised - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_nothing_else_changes(capsys: pytest.CaptureFixture[str]) -> None:
    backend, weight = load_backend("hqq"), torch.randn(64, 256)
    before, state = weight.clone(), torch.get_rng_state()
    backend.quantise(weight, 2)
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_more_bits_are_closer() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    error = [(load_backend("hqq").quantise(weight, bits).weight - weight).norm() for bits in (2, 4)]
    assert error[1] < 0.4 * error[0]


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((64, 100), {}, "group size 64 does not divide rows of 100; choose another"),
        ((9, 100), {"axis": 0}, "cannot pack 9 × 100 weights of 2 bit in groups of 64 along axis 0"),
        ((3, 64), {}, "cannot pack 3 × 64 weights of 2 bit in groups of 64 along axis 1"),
    ],
)
def test_groups_that_do_not_fit_are_refused(shape: tuple[int, int], settings: dict[str, int], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load_backend("hqq", **settings).quantise(torch.randn(shape), 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BackendError, match="axis is 2; choose 0 or 1"):
        load_backend("hqq", axis=2)
    for size in (0, -64, 12):
        with pytest.raises(BackendError, match=f"group size is {size}; choose a positive multiple of 8"):
            load_backend("hqq", group_size=size)
