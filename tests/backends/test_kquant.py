import gguf
import numpy as np
import pytest
import torch

from impq_edge.backends import BITS, NAMES, Bits, Inputs, describe, load_backend
from impq_edge.backends.kquant_decode import DECODED, decode
from impq_edge.backends.kquant_gptq import encode_gptq
from impq_edge.errors import BackendError, ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import LADDER, TensorType, type_for_row

ROWS = [(512, 2, "q2_k"), (512, 4, "q4_k"), (576, 2, "q4_0"), (576, 4, "q5_0"), (40, 2, "f16")]

FLOAT16S_AT = {
    "q4_0": (0,),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}


@pytest.fixture
def skewed() -> Inputs:
    """Inputs of which few columns are large, as they are in language models."""
    squares = torch.from_numpy(np.random.default_rng(2).lognormal(sigma=2, size=512).astype(np.float32))
    return Inputs(tokens=100, mean_square=squares, second_moment=None)


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def any_bytes(kind: TensorType, rows: int = 37, blocks: int = 5) -> np.ndarray:
    """Every bit pattern may occur in scales and weights; the float16 scales are finite numbers of any size and sign."""
    rng = np.random.default_rng(4)
    if kind is TensorType.F16:
        return _finite_f16(rng, (rows, blocks)).view(np.uint8)
    data = rng.integers(0, 256, size=(rows, blocks, kind.block_bytes), dtype=np.uint8)
    for at in FLOAT16S_AT[kind]:
        data[:, :, at : at + 2] = _finite_f16(rng, (rows, blocks, 1)).view(np.uint8)
    return data.reshape(rows, -1)


def _finite_f16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    patterns = np.arange(2**16, dtype=np.uint16)
    return rng.choice(patterns[np.isfinite(patterns.view(np.float16))], size=shape).view(np.float16)


@pytest.mark.parametrize("kind", DECODED)
def test_decoding_is_gguf_s_to_the_bit(monkeypatch: pytest.MonkeyPatch, kind: TensorType) -> None:
    data = any_bytes(kind)
    expected = gguf.dequantize(data, kind.ggml).astype(np.float32)
    monkeypatch.setattr("impq_edge.backends.kquant_decode._CHUNK_WEIGHTS", 7 * kind.block_weights)  # several pieces
    out = decode(torch.from_numpy(data), kind).numpy()
    assert out.shape == (37, 5 * kind.block_weights)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DECODED)
def test_decoding_on_cuda_is_that_on_the_cpu(kind: TensorType) -> None:
    data = torch.from_numpy(any_bytes(kind, rows=300))
    out = decode(data.cuda(), kind)
    assert out.is_cuda
    assert torch.equal(out.cpu().view(torch.int32), decode(data, kind).view(torch.int32))


@pytest.mark.gpu
def test_quantising_on_cuda_is_that_on_the_cpu(skewed: Inputs) -> None:
    weight, backend = normal(64, 512), load_backend("kquant", encode="imatrix")
    on_cuda = Inputs(skewed.tokens, skewed.mean_square.cuda(), None)
    for bits in BITS:
        stored = backend.quantise(weight.cuda(), bits, on_cuda)
        assert stored.weight.is_cuda
        assert torch.equal(stored.weight.cpu(), backend.quantise(weight, bits, skewed).weight)


def test_every_type_a_row_may_fall_back_to_is_decoded() -> None:
    assert {type_for_row(wanted, row) for wanted in LADDER.values() for row in range(1, 513)} == set(DECODED)


@pytest.mark.parametrize(("columns", "bits", "kind"), ROWS)
def test_weights_are_those_of_the_file(columns: int, bits: int, kind: str) -> None:
    weight = normal(32, columns)
    stored = load_backend("kquant").quantise(weight, bits)
    written = encode(weight.numpy(), TensorType(kind))
    assert np.array_equal(stored.weight.numpy(), gguf.dequantize(written, TensorType(kind).ggml).astype(np.float32))
    assert stored.bits_per_weight == TensorType(kind).bits_per_weight


def test_only_what_is_used_of_the_inputs_is_asked_for() -> None:
    assert load_backend("kquant", encode="rtn").statistics == "none"
    assert load_backend("kquant").statistics == load_backend("kquant", encode="gptq").statistics == "hessian"
    assert load_backend("kquant", encode="imatrix").statistics == "squares"


@pytest.mark.parametrize("bits", BITS)
def test_importance_lowers_the_error_of_the_layers_output(skewed: Inputs, bits: int) -> None:
    weight = normal(64, 512)
    error = [
        (
            skewed.mean_square
            * (load_backend("kquant", encode=encoder).quantise(weight, bits, skewed).weight - weight) ** 2
        )
        for encoder in ("rtn", "imatrix")
    ]
    assert error[1].sum() < 0.9 * error[0].sum()


@pytest.mark.parametrize(("columns", "bits", "kind"), ROWS)
def test_gptq_takes_the_k_quants_and_ggml_the_rest(columns: int, bits: Bits, kind: str) -> None:
    inputs = torch.randn(1000, columns, generator=torch.Generator().manual_seed(3)).cumsum(dim=1)
    second = inputs.T @ inputs / 1000
    weight, given = normal(8, columns), Inputs(1000, second.diagonal().clone(), second)
    stored = load_backend("kquant", encode="gptq").quantise(weight, bits, given)
    chosen = TensorType(kind)
    if columns % 256 == 0:
        expected = decode(encode_gptq(weight, second, chosen), chosen)
    else:
        expected = load_backend("kquant", encode="imatrix").quantise(weight, bits, given).weight
    assert torch.equal(stored.weight, expected)
    assert stored.bits_per_weight == chosen.bits_per_weight


def test_inputs_of_another_matrix_are_refused(skewed: Inputs) -> None:
    with pytest.raises(ConversionError, match="rows of 256"):
        load_backend("kquant", encode="imatrix").quantise(normal(4, 256), 2, skewed)
    with pytest.raises(BackendError, match="rows of 256"):
        other = Inputs(100, skewed.mean_square, skewed.mean_square.diag())
        load_backend("kquant", encode="gptq").quantise(normal(4, 256), 2, other)


def test_unknown_backend_and_setting() -> None:
    with pytest.raises(BackendError, match="'awq' is unknown; choose one of kquant, hqq"):
        load_backend("awq")
    with pytest.raises(BackendError, match="'kquant' has no setting 'group-size'; it takes encode"):
        load_backend("kquant", group_size=64)
    with pytest.raises(BackendError, match="encoder 'awq' of K-quants is unknown; choose one of rtn, imatrix, gptq"):
        load_backend("kquant", encode="awq")


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_can_tell_what_quantised(name: str) -> None:
    told = describe(name, load_backend(name))
    assert told["name"] == name and str(told["library"]).split()[1][0].isdigit()
