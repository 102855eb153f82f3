from itertools import pairwise
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from impq_edge.backends import kquant_gptq
from impq_edge.backends.kquant_decode import decode
from impq_edge.backends.kquant_gptq import SOLVED, encode_gptq
from impq_edge.backends.kquant_pack import pack
from impq_edge.errors import BackendError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType

COLUMNS = 512


def random_weight(rows: int, seed: int = 1) -> torch.Tensor:
    return 0.02 * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def moment(seed: int = 0, tokens: int = 4096) -> torch.Tensor:
    """Inputs as a model's are: correlated, and of very different sizes; of rank ``tokens`` at most."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(COLUMNS, COLUMNS // 4, generator=generator)
    mixing = torch.eye(COLUMNS) + 0.05 * down @ torch.randn(COLUMNS // 4, COLUMNS, generator=generator)
    inputs = torch.randn(tokens, COLUMNS, generator=generator) @ mixing
    inputs *= torch.exp(0.5 * torch.randn(COLUMNS, generator=generator))
    return inputs.T @ inputs / tokens


def error(weight: torch.Tensor, data: torch.Tensor, second_moment: torch.Tensor, kind: TensorType) -> float:
    left = (weight - decode(data, kind)).double()
    return float(((left @ second_moment.double()) * left).sum())


def by_ggml(weight: torch.Tensor, kind: TensorType, importance: torch.Tensor | None = None) -> torch.Tensor:
    return torch.from_numpy(encode(weight.numpy(), kind, importance=None if importance is None else importance.numpy()))


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_change_less_than_with_an_importance_matrix(kind: TensorType, seed: int) -> None:
    weight, second = random_weight(32, seed), moment(seed)
    solved = error(weight, encode_gptq(weight, second, kind), second, kind)
    weighed = error(weight, by_ggml(weight, kind, second.diagonal().contiguous()), second, kind)
    assert solved < 0.2 * min(weighed, error(weight, by_ggml(weight, kind), second, kind))


@pytest.mark.parametrize("kind", SOLVED)
def test_other_text_of_the_same_kind_gains_as_well(kind: TensorType) -> None:
    generator = torch.Generator().manual_seed(5)
    true = moment(0)
    seen = torch.randn(2048, COLUMNS, generator=generator) @ torch.linalg.cholesky(true + 1e-4 * torch.eye(COLUMNS)).T
    weight = random_weight(32)
    solved = encode_gptq(weight, seen.T @ seen / len(seen), kind)
    assert error(weight, solved, true, kind) < 0.5 * error(weight, by_ggml(weight, kind), true, kind)


@pytest.mark.parametrize("kind", SOLVED)
def test_independent_inputs_of_one_size_are_rounded_as_well_as_ggml_rounds(kind: TensorType) -> None:
    weight, second = random_weight(32), torch.eye(COLUMNS)
    solved = error(weight, encode_gptq(weight, second, kind), second, kind)
    assert solved < error(weight, by_ggml(weight, kind), second, kind)
    assert solved < error(weight, by_ggml(weight, kind, torch.ones(COLUMNS)), second, kind)


@pytest.mark.parametrize("kind", SOLVED)
def test_bytes_decode_to_the_weights_that_were_weighed(monkeypatch: pytest.MonkeyPatch, kind: TensorType) -> None:
    intended: list[torch.Tensor] = []

    def watched(q: Any, s: Any, m: Any, d: Any, dmin: Any, kind: TensorType) -> torch.Tensor:
        scale, minimum = d.repeat_interleave(s.shape[1] // 2, 1) * s, dmin.repeat_interleave(s.shape[1] // 2, 1) * m
        group = COLUMNS // s.shape[1]
        intended.append(q * scale.repeat_interleave(group, dim=1) - minimum.repeat_interleave(group, dim=1))
        return pack(q, s, m, d, dmin, kind)

    monkeypatch.setattr(kquant_gptq, "pack", watched)
    data = encode_gptq(random_weight(40), moment(), kind)
    assert data.shape == (40, kind.tensor_bytes((1, COLUMNS))) and data.dtype == torch.uint8
    assert np.array_equal(gguf.dequantize(data.numpy(), kind.ggml), intended[0].numpy())
    assert torch.equal(decode(data, kind), intended[0])


@pytest.mark.parametrize("kind", SOLVED)
def test_every_sweep_lowers_the_error(kind: TensorType) -> None:
    weight, second = random_weight(32), moment()
    by_sweeps = [
        error(weight, encode_gptq(weight, second, kind, sweeps=n, damping=1e-6), second, kind) for n in range(4)
    ]
    assert all(later < earlier for earlier, later in pairwise(by_sweeps))


@pytest.mark.parametrize("kind", SOLVED)
def test_a_row_s_bytes_depend_on_that_row_alone(monkeypatch: pytest.MonkeyPatch, kind: TensorType) -> None:
    weight, second = random_weight(67), moment()
    whole = encode_gptq(weight, second, kind)
    assert torch.equal(whole, encode_gptq(weight, second, kind))
    split = [encode_gptq(rows.contiguous(), second, kind) for rows in (weight[:1], weight[1:20], weight[20:])]
    assert torch.equal(whole, torch.cat(split))
    monkeypatch.setattr(kquant_gptq, "_CHUNK_ROWS", 13)  # per thread
    assert torch.equal(whole, encode_gptq(weight, second, kind))


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("tokens", [0, 1, 100])
def test_fewer_tokens_than_inputs(kind: TensorType, tokens: int) -> None:
    weight, second = random_weight(16), moment(tokens=tokens) if tokens else torch.zeros(COLUMNS, COLUMNS)
    data = encode_gptq(weight, second, kind)
    assert torch.isfinite(decode(data, kind)).all()
    judge = second if tokens else torch.eye(COLUMNS)
    assert error(weight, data, judge, kind) < error(weight, by_ggml(weight, kind), judge, kind)


@pytest.mark.parametrize("kind", SOLVED)
def test_inputs_that_are_always_zero(kind: TensorType) -> None:
    weight, second = random_weight(16), moment()
    dead = torch.arange(COLUMNS) % 7 == 3
    dead[:256] |= torch.arange(256) < 64  # whole groups, too
    second[dead] = 0
    second[:, dead] = 0
    data = encode_gptq(weight, second, kind)
    assert error(weight, data, second, kind) < 0.5 * error(weight, by_ggml(weight, kind), second, kind)
    left = (weight - decode(data, kind))[:, dead]
    assert left.square().mean() < 0.5 * weight.square().mean()  # they are rounded all the same


@pytest.mark.parametrize("kind", SOLVED)
def test_weights_that_leave_nothing_to_fit(kind: TensorType) -> None:
    weight = random_weight(4)
    weight[0] = 0
    weight[1] = -0.01
    weight[2] = weight[2].abs()
    weight[3, 16:32] = 1e-9
    out = decode(encode_gptq(weight, moment(), kind), kind)
    assert torch.isfinite(out).all()
    assert not out[0].any()
    assert (out[1] + 0.01).abs().max() < 1e-3  # errors of one sign are made up for, where a grid has no minimum


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("size", [1e-5, 1e5])
def test_small_and_large_weights(kind: TensorType, size: float) -> None:
    weight, second = size * random_weight(16), moment()
    data = encode_gptq(weight, second, kind)
    weighed = by_ggml(weight, kind, second.diagonal().contiguous())
    assert error(weight, data, second, kind) < 0.5 * error(weight, weighed, second, kind)
    assert torch.equal(data, encode_gptq(weight, 2**20 * second, kind))  # powers of two round nothing


@pytest.mark.parametrize("kind", SOLVED)
def test_rows_of_one_block(kind: TensorType) -> None:
    weight, second = random_weight(16)[:, :256].contiguous(), moment()[:256, :256].contiguous()
    weighed = by_ggml(weight, kind, second.diagonal().contiguous())
    assert error(weight, encode_gptq(weight, second, kind), second, kind) < 0.5 * error(weight, weighed, second, kind)


@pytest.mark.parametrize("kind", SOLVED)
def test_weights_that_no_float16_scales(kind: TensorType) -> None:
    for size in (1e-12, 1e12):
        assert torch.isfinite(decode(encode_gptq(size * random_weight(4), moment(), kind), kind)).all()


def test_moments_of_other_inputs_are_refused() -> None:
    with pytest.raises(BackendError, match=r"shape \(256, 256\) was given for rows of 512"):
        encode_gptq(random_weight(2), torch.eye(256), TensorType.Q2_K)
    with pytest.raises(BackendError, match="not finite"):
        encode_gptq(random_weight(2), torch.full((COLUMNS, COLUMNS), torch.nan), TensorType.Q4_K)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SOLVED)
def test_on_cuda_as_well_as_on_the_cpu(kind: TensorType) -> None:
    weight, second = random_weight(64), moment()
    data = encode_gptq(weight.cuda(), second.cuda(), kind)
    assert data.is_cuda
    assert torch.equal(decode(data, kind).cpu(), decode(data.cpu(), kind))
    on_cpu = error(weight, encode_gptq(weight, second, kind), second, kind)
    assert error(weight, data.cpu(), second, kind) == pytest.approx(on_cpu, rel=0.02)
