import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import decode, encode
from impq_edge.ggml.types import TensorType

QUANTISED = [TensorType(name) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q5_0", "q5_1")]


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(67, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", QUANTISED)
def test_bytes_are_those_of_llama_cpp(weights: np.ndarray, kind: TensorType) -> None:
    """ggml's per-type reference encoder, another entry point than the one we call, writes the same bytes."""
    folder = Path(next(iter(importlib.util.find_spec("llama_cpp").submodule_search_locations)))  # type: ignore
    library = ctypes.CDLL(str(next((folder / "lib").glob("*ggml-base*"))))
    function = getattr(library, f"quantize_{kind}".replace("_k", "_K"))
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    expected = np.empty((67, kind.tensor_bytes((1, 512))), dtype=np.uint8)
    function(weights.ctypes.data, expected.ctypes.data, 67, 512, None)
    assert np.array_equal(encode(weights, kind), expected)


@pytest.mark.parametrize("kind", QUANTISED)
def test_decoding_is_close_and_better_with_more_bits(weights: np.ndarray, kind: TensorType) -> None:
    error = np.linalg.norm(decode(encode(weights, kind), kind) - weights) / np.linalg.norm(weights)
    assert error < 1.5 * 2.0 ** (-kind.bits_per_weight + 1)


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16])
def test_floats_are_rounded_once(weights: np.ndarray, kind: TensorType) -> None:
    import torch

    rounded = torch.from_numpy(weights).to(
        getattr(torch, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind])
    )
    assert np.array_equal(decode(encode(weights, kind), kind), rounded.float().numpy())


def test_bytes_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch, weights: np.ndarray) -> None:
    whole = encode(weights, TensorType.Q2_K, threads=1)
    monkeypatch.setattr("impq_edge.ggml.encode._CHUNK_WEIGHTS", 5 * 512)
    assert np.array_equal(encode(weights, TensorType.Q2_K, threads=4), whole)


def test_f16_overflow_is_refused() -> None:
    with pytest.raises(ConversionError, match="65504"):
        encode(np.full((1, 32), 1e6, dtype=np.float32), TensorType.F16)
