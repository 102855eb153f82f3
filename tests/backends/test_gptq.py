import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from impq_edge.backends import Bits, Inputs, Stored, load_backend, undisturbed
from impq_edge.errors import BackendError

if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed: install impq-edge[workstation]", allow_module_level=True)

SETTINGS: list[dict[str, Any]] = [{}, {"group_size": 64, "sym": False, "desc_act": True}, {"damp_percent": 0.01}]


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs as a model's are: correlated, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    return torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 0.05 * mixing)


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def inputs_of(*batches: torch.Tensor) -> Inputs:
    """Statistics summed over batches in float32, as they are gathered."""
    tokens = sum(len(batch) for batch in batches)
    second = sum((batch.T @ batch for batch in batches), torch.zeros(())) / tokens
    return Inputs(tokens, second.diagonal().clone(), second)


def by_the_library(weight: torch.Tensor, batches: list[torch.Tensor], bits: Bits, settings: dict[str, Any]) -> Any:
    """Let gptqmodel watch the batches, quantise and pack; return its layer."""
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.clone()
    with undisturbed():
        config = QuantizeConfig(bits=bits, offload_to_disk=False, **settings)
        solver = GPTQ(NamedModule(linear, "q_proj", "model.q_proj", 0), config)
        solver.quantizer.configure(perchannel=True)
        for batch in batches:
            solver.add_batch(batch[None], linear(batch)[None])
        linear.weight.data, scale, zero, groups, *_ = solver.quantize()
        shape = {"in_features": columns, "out_features": rows, "bias": False}
        kept = {"group_size": config.group_size, "sym": config.sym, "desc_act": config.desc_act}
        packed = TorchLinear(bits=bits, pack_dtype=torch.int32, register_buffers=True, **shape, **kept)
        packed.pack_original(linear, scale, zero, groups)
        packed.qzero_format(2)  # zeros were packed as they are; files of the older format hold one less
    return packed


def error(weight: torch.Tensor, stored: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - stored) @ x.T).norm())


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round to nearest on the same symmetric grid."""
    grouped = weight.reshape(len(weight), -1, group)
    scale = 2 * grouped.abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = torch.clamp(torch.round(grouped / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).view_as(weight)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (64, 576)])
def test_same_weights_and_size_as_the_librarys_own_layer(
    rows: int, columns: int, settings: dict[str, Any], bits: Bits
) -> None:
    weight = random_weight(rows, columns)
    # The library scales its sum by 2/n, we a mean by 2: the same bits where n is a power of two.
    batches = list(correlated(1024, columns).split(256))
    stored = load_backend("gptq", **settings).quantise(weight, bits, inputs_of(*batches))
    packed = by_the_library(weight, batches, bits, settings)
    # The library multiplies codes and scales in float16, we in float32: three significant bits need no rounding.
    assert torch.allclose(stored.weight, packed.dequantize_weight().T.float(), rtol=0 if bits == 2 else 2**-11, atol=0)
    assert stored.weight.dtype == torch.float32
    kept = packed.state_dict().values()
    assert stored.bits_per_weight * weight.numel() == 8 * sum(v.numel() * v.element_size() for v in kept)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_cut_into_batches_hardly_matters(bits: Bits) -> None:
    """Sums in another order differ in the last bit, which can tip a weight onto the next code, not the error."""
    weight, x = random_weight(96, 256), correlated(1000, 256)
    stored = load_backend("gptq").quantise(weight, bits, inputs_of(x))
    packed = by_the_library(weight, list(x.split(130)), bits, {})
    theirs = packed.dequantize_weight().T.float()
    assert error(weight, stored.weight, x) == pytest.approx(error(weight, theirs, x), rel=0.01)
    same = torch.isclose(stored.weight, theirs, rtol=2**-10, atol=0)
    assert same.float().mean() > 0.98


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1024, 64])
def test_closer_than_rounding_where_inputs_are_correlated(tokens: int, bits: Bits) -> None:
    weight, x = random_weight(96, 256), correlated(tokens, 256)  # 64 tokens do not span 256 columns
    stored = load_backend("gptq").quantise(weight, bits, inputs_of(x))
    assert error(weight, stored.weight, x) < 0.75 * error(weight, rounded(weight, bits, 128), x)


def test_an_input_that_is_always_zero_costs_nothing() -> None:
    weight, x = random_weight(96, 256), correlated(1024, 256)
    x[:, 3] = 0
    stored = load_backend("gptq").quantise(weight, 4, inputs_of(x))
    assert (stored.weight[:, 3] == 0).all() and stored.weight.isfinite().all()
    assert error(weight, stored.weight, x) < error(weight, rounded(weight, 4, 128), x)


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"), [(256, 128, 2), (576, 128, 5), (256, 64, 4), (256, 512, 1), (100, 64, 2)]
)
def test_bits_per_weight(columns: int, group_size: int, groups: int) -> None:
    rows = 64
    backend = load_backend("gptq", group_size=group_size)
    for bits in (2, 4):
        stored = backend.quantise(random_weight(rows, columns), bits, inputs_of(correlated(512, columns)))
        words = -(-columns * bits // 32) * rows + groups * rows * bits // 32 + columns
        assert stored.bits_per_weight == (32 * words + 16 * groups * rows) / (rows * columns)


def test_the_same_again_and_nothing_given_is_changed() -> None:
    weight, inputs = random_weight(96, 256), inputs_of(correlated(1000, 256))
    assert inputs.second_moment is not None
    before = weight.clone(), inputs.second_moment.clone()
    backend = load_backend("gptq")
    first, second = (backend.quantise(weight, 2, inputs) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(weight, before[0]) and torch.equal(inputs.second_moment, before[1])


def test_works_on_what_inference_leaves() -> None:
    with torch.inference_mode():
        weight, inputs = random_weight(64, 128), inputs_of(correlated(256, 128))
        inside = load_backend("gptq").quantise(weight, 2, inputs)
    outside = load_backend("gptq").quantise(weight, 2, inputs)
    assert isinstance(outside, Stored) and torch.equal(inside.weight, outside.weight)
    assert not outside.weight.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gpu_does_as_well_as_the_cpu(bits: Bits) -> None:
    """Sums in another order tip a few weights onto the next code; the error is the same."""
    weight, x = random_weight(256, 640), correlated(2048, 640)
    inputs = inputs_of(x)
    assert inputs.second_moment is not None
    there = Inputs(inputs.tokens, inputs.mean_square.cuda(), inputs.second_moment.cuda())
    on_gpu = load_backend("gptq").quantise(weight.cuda(), bits, there)
    on_cpu = load_backend("gptq").quantise(weight, bits, inputs)
    assert on_gpu.weight.is_cuda and on_gpu.bits_per_weight == on_cpu.bits_per_weight
    assert error(weight, on_gpu.weight.cpu(), x) == pytest.approx(error(weight, on_cpu.weight, x), rel=0.02)


def test_settings() -> None:
    from gptqmodel.quantization import QuantizeConfig

    backend = load_backend("gptq")
    settings = dataclasses.asdict(backend)  # type: ignore[call-overload]
    with undisturbed():
        library = QuantizeConfig(offload_to_disk=False)
    assert settings == {name: getattr(library, name) for name in settings}
    assert backend.statistics == "hessian"
    with pytest.raises(BackendError, match="group size 48 is not one of 16, 32"):
        load_backend("gptq", group_size=48)
    with pytest.raises(BackendError, match="damp-percent 0 is not between 0 and 1"):
        load_backend("gptq", damp_percent=0)


def test_a_hessian_that_cannot_be_factored_is_refused() -> None:
    inputs = Inputs(512, torch.ones(128), torch.full((128, 128), torch.nan))
    with pytest.raises(BackendError, match=r"cannot factor the Hessian of a \(32, 128\) matrix at any damping"):
        load_backend("gptq").quantise(random_weight(32, 128), 4, inputs)


ALONE = """
import os, sys, threading
import torch
from impq_edge.backends import Inputs, load_backend
environment = dict(os.environ)
backend = load_backend("gptq")
threads = set(threading.enumerate())
for bits in (2, 4):
    backend.quantise(torch.randn(32, 128), bits, Inputs(256, torch.ones(128), torch.eye(128)))
assert set(threading.enumerate()) == threads, threading.enumerate()
assert not [thread for thread in threads if not (thread.daemon or thread is threading.main_thread())]
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert torch.get_num_threads() == int(sys.argv[1])
"""


def test_the_library_keeps_to_itself() -> None:
    command = [sys.executable, "-c", ALONE, str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
