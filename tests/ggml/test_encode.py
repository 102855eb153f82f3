import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType

QUANTISED = [TensorType(name) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q5_0", "q5_1")]
WEIGHING = [kind for kind in QUANTISED if kind is not TensorType.Q8_0]
ROWS, COLUMNS = 67, 512


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)


@pytest.fixture(scope="module")
def importance() -> np.ndarray:
    """Skewed as activations are: a few columns count a thousand times as much as most, some not at all."""
    drawn = np.random.default_rng(2).lognormal(sigma=2, size=COLUMNS)
    drawn[::17] = 0
    return drawn.astype(np.float32)


def decoded(weights: np.ndarray, kind: TensorType, importance: np.ndarray | None = None) -> np.ndarray:
    return gguf.dequantize(encode(weights, kind, importance=importance), kind.ggml)


def reference_bytes(weights: np.ndarray, kind: TensorType, importance: np.ndarray | None) -> np.ndarray:
    """What ggml's encoder of one type, another entry point than the one we call, writes."""
    folder = Path(next(iter(importlib.util.find_spec("llama_cpp").submodule_search_locations)))  # type: ignore
    library = ctypes.CDLL(str(next((folder / "lib").glob("*ggml-base*"))))
    function = getattr(library, f"quantize_{kind}".replace("_k", "_K"))
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    expected = np.empty((ROWS, kind.tensor_bytes((1, COLUMNS))), dtype=np.uint8)
    columns = None if importance is None else importance.ctypes.data
    function(weights.ctypes.data, expected.ctypes.data, ROWS, COLUMNS, columns)
    return expected


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_bytes_are_those_of_ggml(weights: np.ndarray, importance: np.ndarray, kind: TensorType, weighed: bool) -> None:
    columns = importance if weighed else None
    assert np.array_equal(encode(weights, kind, importance=columns), reference_bytes(weights, kind, columns))


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K"])
def test_bytes_are_those_of_llama_quantize_with_an_importance_matrix(
    tiny_ggufs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_ggufs["llama"]).tensors}
    rng = np.random.default_rng(3)
    matrices = {name: t.data.astype(np.float32) for name, t in source.items() if t.tensor_type.name == "F16"}
    columns = {name: rng.lognormal(sigma=2, size=w.shape[1]).astype(np.float32) for name, w in matrices.items()}
    llama_quantize(tiny_ggufs["llama"], tmp_path / "out.gguf", kind, columns)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert len(matrices) == 3 * 7 + 1
    for name, matrix in matrices.items():
        assert written[name].tensor_type.name == kind
        assert np.array_equal(encode(matrix, TensorType(kind.lower()), importance=columns[name]), written[name].data), (
            name
        )


QUANTIZE = """
import ctypes, sys
import llama_cpp as api
import numpy as np

source, out, kind, archive = sys.argv[1:]
columns = dict(np.load(archive))
entries = (api.llama_model_imatrix_data * (len(columns) + 1))()  # the last one, without a name, ends the list
for entry, (name, values) in zip(entries, columns.items()):
    entry.name, entry.size = name.encode(), values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
settings = api.llama_model_quantize_default_params()
settings.ftype = {"Q2_K": api.LLAMA_FTYPE_MOSTLY_Q2_K, "Q4_K": api.LLAMA_FTYPE_MOSTLY_Q4_K_S}[kind]
settings.pure, settings.imatrix = True, entries
sys.exit(api.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)))
"""


def llama_quantize(source: Path, out: Path, kind: str, columns: dict[str, np.ndarray]) -> None:
    """In a process of its own: llama.cpp calls the log function that was set last, even one that is gone."""
    np.savez(out.with_suffix(".npz"), **columns)  # type: ignore[arg-type]
    arguments = [str(source), str(out), kind, str(out.with_suffix(".npz"))]
    subprocess.run([sys.executable, "-c", QUANTIZE, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("kind", QUANTISED)
def test_decoding_is_close_and_better_with_more_bits(weights: np.ndarray, kind: TensorType) -> None:
    error = np.linalg.norm(decoded(weights, kind) - weights) / np.linalg.norm(weights)
    assert error < 1.5 * 2.0 ** (-kind.bits_per_weight + 1)


@pytest.mark.parametrize("kind", WEIGHING)
def test_errors_move_to_where_they_count_less(weights: np.ndarray, importance: np.ndarray, kind: TensorType) -> None:
    def weighted_error(columns: np.ndarray | None) -> float:
        return float((importance * (decoded(weights, kind, columns) - weights) ** 2).sum())

    assert weighted_error(importance) < 0.95 * weighted_error(None)


@pytest.mark.parametrize("kind", ["q2_k", "q4_k", "q4_0", "q5_0"])
def test_blocks_without_importance_become_zeros(weights: np.ndarray, kind: str) -> None:
    """llama.cpp takes zeros at their word, and so do we (and the bytes are its own, see above)."""
    columns = np.ones(COLUMNS, np.float32)
    columns[:256] = 0
    out = decoded(weights, TensorType(kind), columns)
    assert not out[:, :256].any() and out[:, 256:].any(axis=1).all()


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16])
def test_floats_are_rounded_once(weights: np.ndarray, importance: np.ndarray, kind: TensorType) -> None:
    import torch

    rounded = torch.from_numpy(weights).to(
        getattr(torch, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind])
    )
    assert np.array_equal(decoded(weights, kind, importance), rounded.float().numpy())


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_bytes_of_a_row_do_not_depend_on_the_others(
    weights: np.ndarray, importance: np.ndarray, kind: TensorType, weighed: bool
) -> None:
    columns = importance if weighed else None
    pieces = [encode(weights[first : first + 5], kind, importance=columns) for first in range(0, ROWS, 5)]
    assert np.array_equal(encode(weights, kind, importance=columns), np.concatenate(pieces))


@pytest.mark.parametrize("weight", [1e6, -65520.0])
def test_f16_overflow_is_refused(weight: float) -> None:
    weights = np.zeros((2, 32), np.float32)
    weights[1, 7] = weight
    with pytest.raises(ConversionError, match=re.escape(f"A weight of {abs(weight):g} exceeds F16's 65504")):
        encode(weights, TensorType.F16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9])
def test_importances_that_are_none_are_refused(weights: np.ndarray, importance: np.ndarray, bad: float) -> None:
    columns = importance.copy()
    columns[300] = bad
    with pytest.raises(ConversionError, match=rf"column 300 is {bad:g}, not a finite"):
        encode(weights, TensorType.Q2_K, importance=columns)


@pytest.mark.parametrize("shape", [(256,), (1, COLUMNS)])
def test_importances_of_another_matrix_are_refused(weights: np.ndarray, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConversionError, match="rows of 512"):
        encode(weights, TensorType.Q2_K, importance=np.ones(shape, np.float32))
