from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assembled import assemble, block_linears, load, logits

from impq_edge.backends import load_backend
from impq_edge.errors import BackendError


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The values at the lowest bits of every byte come first."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, reading its weights by ``unpack`` instead of the C++ extension that it would compile."""
    from optimum import quanto
    from optimum.quanto.library.extensions import cpp

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
    return quanto


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.quanto.library.extensions import cpp

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an extension would be compiled")

    monkeypatch.setattr(cpp.ext, "_lib", None)
    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", refuse)


def random_weight(rows: int, columns: int) -> torch.Tensor:
    weight = 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight.to(torch.bfloat16).float()  # as a checkpoint holds it


def as_the_library_stores(library: Any, weight: torch.Tensor, bits: int) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data.copy_(weight)
    library.quantize(model, weights=f"qint{bits}")
    library.freeze(model)
    return model[0].weight


# 576 columns fall to groups of 96, 160 to 32, and 100 and 1000 to the whole row; 33 rows leave a byte half full.
@pytest.mark.parametrize(
    ("shape", "group"),
    [((64, 256), 128), ((33, 576), 96), ((64, 160), 32), ((30, 100), 100), ((8, 1000), 1000), ((64, 128), 128)],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_and_bytes_are_the_librarys(library: Any, shape: tuple[int, int], group: int, bits: int) -> None:
    weight = random_weight(*shape)
    held = as_the_library_stores(library, weight, bits)
    stored = load_backend("quanto").quantise(weight, bits)
    assert torch.equal(stored.weight, held.dequantize())
    held_bytes = sum(tensor.nbytes for tensor in (held._data._data, held._scale, held._shift))
    assert stored.bits_per_weight == 8 * held_bytes / weight.numel()
    assert held._scale.numel() == weight.numel() / group
    if shape[0] % 4 == 0:
        assert stored.bits_per_weight == pytest.approx(bits + 2 * 32 / group)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [256, 576])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_model_of_another_dtype(library: Any, columns: int, bits: int, dtype: str) -> None:
    weight = random_weight(64, columns)
    held = as_the_library_stores(library, weight.to(getattr(torch, dtype)), bits)
    stored = load_backend("quanto", dtype=dtype).quantise(weight, bits)
    assert stored.weight.dtype == torch.float32
    # TinyGemm's layout keeps the middle of the range, 8 steps from the shift, in bfloat16: two roundings to 8 bits.
    tinygemm = type(held).__name__ == "TinyGemmWeightQBitsTensor"
    assert tinygemm == (bits == 4 and columns == 256 and dtype == "bfloat16")
    step = (weight.amax() - weight.amin()).item() / (2**bits - 1)
    difference = (stored.weight - held.dequantize().float()).abs().max()
    assert difference <= (2 * 8 * step / 2**8 if tinygemm else 0)
    assert stored.bits_per_weight == pytest.approx(bits + 2 * 16 / (128 if columns == 256 else 96))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("bits", [2, 4])
def test_logits_are_those_of_the_librarys_model(
    library: Any, checkpoints: dict[str, Path], architecture: str, bits: int
) -> None:
    directory = checkpoints[architecture]
    whole = load(directory, torch.float32)
    library.quantize(whole, weights=f"qint{bits}", exclude="lm_head")
    library.freeze(whole)
    assert len(block_linears(whole)) == 3 * 7 and not isinstance(whole.lm_head, library.QLinear)
    ours = logits(assemble(directory, load_backend("quanto"), bits, torch.float32))
    theirs = logits(whole)
    # The same weights in float32: only the order of a product's sums, 24 bits each, can differ.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    unquantised = logits(load(directory, torch.float32))
    assert (unquantised - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_nothing_is_compiled(no_extension: None) -> None:
    for bits in (2, 4):
        for dtype in ("float32", "bfloat16", "float16"):
            load_backend("quanto", dtype=dtype).quantise(random_weight(64, 256), bits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 4])
def test_on_cuda(no_extension: None, bits: int, dtype: str) -> None:
    """A last bit of a scale may differ, and with it a weight half-way between two steps."""
    weight, backend = random_weight(256, 576), load_backend("quanto", dtype=dtype)
    there, here = backend.quantise(weight.cuda(), bits), backend.quantise(weight, bits)
    assert there.weight.is_cuda and there.bits_per_weight == here.bits_per_weight
    difference = (there.weight.cpu() - here.weight).abs()
    step = (weight.amax() - weight.amin()) / (2**bits - 1)
    assert difference.max() < 1.1 * step and (difference > 0.1 * step).float().mean() < 0.01


def test_constant_groups_survive() -> None:
    weight = torch.zeros(8, 256)
    weight[3] = 0.5
    for bits in (2, 4):
        assert torch.equal(load_backend("quanto").quantise(weight, bits).weight, weight)


def test_smaller_groups_are_closer_and_larger() -> None:
    weight = random_weight(64, 256)
    fine, coarse = (load_backend("quanto", group_size=size).quantise(weight, 2) for size in (32, 128))
    assert fine.bits_per_weight == 2 + 2 and coarse.bits_per_weight == 2 + 0.5
    assert (fine.weight - weight).norm() < 0.9 * (coarse.weight - weight).norm()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BackendError, match="group size 64 does not divide rows of 100; choose a divisor"):
        load_backend("quanto", group_size=64).quantise(random_weight(64, 100), 2)
    with pytest.raises(BackendError, match="group size is 0; choose a positive number"):
        load_backend("quanto", group_size=0)
    with pytest.raises(BackendError, match="dtype is 'int8'; choose one of float32, bfloat16, float16"):
        load_backend("quanto", dtype="int8")
