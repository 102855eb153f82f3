import dataclasses
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.conversion.imatrix import Imatrix
from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.model.spec import ModelSpec, read_model

TOOL = Path(__file__).parents[2] / "tools" / "llama_quantize.py"


@pytest.fixture(scope="module")
def spec(checkpoints: dict[str, Path]) -> ModelSpec:
    return read_model(checkpoints["llama"])


def measured(spec: ModelSpec, *, tokens: int = 1000) -> Imatrix:
    rng = np.random.default_rng(7)
    squares = {
        tensor.gguf_name: tokens * rng.lognormal(sigma=2, size=tensor.shape[-1])
        for tensor in spec.tensors
        if tensor.role == "matrix"
    }
    return Imatrix.dense(squares, tokens, datasets=("prose.txt",), chunk_count=2, chunk_tokens=500)


def small(**changes: object) -> Imatrix:
    sums = {"b.weight": np.array([[3.0, 0.0, 6.0]], np.float32), "a.weight": np.ones((2, 4), np.float32)}
    counts = {"b.weight": np.array([3]), "a.weight": np.array([4, 0])}
    return dataclasses.replace(Imatrix(sums, counts, ("one", "zwei ü"), 5, 512), **changes)  # type: ignore[arg-type]


def same(one: Imatrix, other: Imatrix) -> bool:
    return (
        (one.datasets, one.chunk_count, one.chunk_tokens) == (other.datasets, other.chunk_count, other.chunk_tokens)
        and one.sums.keys() == other.sums.keys()
        and all(np.array_equal(one.sums[name], other.sums[name]) for name in one.sums)
        and all(np.array_equal(one.counts[name], other.counts[name]) for name in one.counts)
    )


def test_it_survives_the_disk_and_is_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    small().write(tmp_path / "a.gguf")
    assert same(Imatrix.read(tmp_path / "a.gguf"), small())
    backwards = {name: small().sums[name] for name in reversed(list(small().sums))}
    small(sums=backwards).write(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_file_is_laid_out_as_llama_imatrix_does(tmp_path: Path) -> None:
    small().write(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["one", "zwei ü"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 512,
    }
    assert [(t.name, t.tensor_type.name, [int(n) for n in t.shape]) for t in reader.tensors] == [
        ("a.weight.in_sum2", "F32", [4, 2]),
        ("a.weight.counts", "F32", [1, 2]),
        ("b.weight.in_sum2", "F32", [3]),
        ("b.weight.counts", "F32", [1]),
    ]


def test_importance_is_the_mean_square_and_ones_where_nothing_was_seen() -> None:
    assert np.array_equal(small().importance("b.weight"), np.array([1, 0, 2], np.float32))
    assert np.array_equal(small().importance("a.weight"), np.array([0.25] * 4 + [1] * 4, np.float32))
    assert small().importance("c.weight") is None


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    facts = {"type": "imatrix", "datasets": ["x"], "chunk_count": 1, "chunk_size": 512} | keys
    writer.add_type(str(facts["type"]))
    for key in ("datasets", "chunk_count", "chunk_size"):
        if isinstance(facts[key], list):
            writer.add_array(f"imatrix.{key}", facts[key])  # type: ignore[arg-type]
        elif facts[key] is not None:
            writer.add_key_value(f"imatrix.{key}", facts[key], gguf.GGUFValueType.get_type(facts[key]))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(sums: object, counts: object, name: str = "a") -> dict[str, np.ndarray]:
    return {f"{name}.in_sum2": np.asarray(sums, np.float32), f"{name}.counts": np.asarray(counts, np.float32)}


def test_counts_are_rounded_as_llama_quantize_does(tmp_path: Path) -> None:
    tensors = pair([6.0, 3.0], [2.5]) | pair([6.0, 3.0], [0.49], "b")
    found = Imatrix.read(write_gguf(tmp_path / "a.gguf", tensors))
    assert np.array_equal(found.importance("a"), np.array([2, 1], np.float32))
    assert np.array_equal(found.importance("b"), np.ones(2, np.float32))  # no token seen


@pytest.mark.parametrize(
    ("tensors", "keys", "said"),
    [
        (pair([1, 2], [1]), {"type": "model"}, "is a GGUF of type 'model', not 'imatrix'"),
        (pair([1, 2], [1]), {"datasets": None}, "has no imatrix.datasets"),
        (pair([1, 2], [1]), {"datasets": "x"}, "has no imatrix.datasets"),
        (pair([1, 2], [1]), {"chunk_count": None}, "imatrix.chunk_count is None"),
        (pair([1, 2], [1]), {"chunk_size": "512"}, "imatrix.chunk_size is '512'"),
        (pair([1, 2], [1]), {"chunk_size": -1}, "imatrix.chunk_size is -1"),
        (pair([1, np.nan], [1]), {}, "column 1 of a sums to nan"),
        (pair([1, np.inf], [1]), {}, "column 1 of a sums to inf"),
        (pair([-1e-9, 1], [1]), {}, "column 0 of a sums to -1e-09"),
        (pair([1, 2], [np.nan]), {}, "a was counted nan times"),
        (pair([1, 2], [1e30]), {}, "a was counted 1e.30 times"),
        (pair([1, 2], [-1]), {}, "a was counted -1 times"),
        (pair([1, 2, 3], [1, 1]), {}, "the 3 sums of a cannot be shared among 2 counts"),
        ({"a.in_sum2": np.ones(2, np.float32)}, {}, "'a.counts' has no counterpart"),
        ({"a.counts": np.ones(2, np.float32)}, {}, "'a.counts' has no counterpart"),
        (pair([1, 2], [1]) | {"a.else": np.ones(2, np.float32)}, {}, "'a.else' has no counterpart"),
        ({}, {}, "it holds no tensors"),
        (pair([1, 2], [1]) | {"a.counts": np.ones(1, np.float16)}, {}, "a.counts is f16, not f32"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, tensors: dict[str, np.ndarray], keys: dict[str, object], said: str
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", tensors, **keys)
    with pytest.raises(ConversionError, match=said) as caught:
        Imatrix.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_damaged_file_raises_anything_else_or_takes_memory(tmp_path: Path) -> None:
    small().write(tmp_path / "a.gguf")
    sound, path = (tmp_path / "a.gguf").read_bytes(), tmp_path / "x.gguf"
    refused = 0

    def read(data: bytes) -> None:
        nonlocal refused
        path.write_bytes(data)
        try:
            Imatrix.read(path)
        except ConversionError as error:
            refused += 1
            assert "\n" not in str(error)

    tracemalloc.start()
    for position in range(len(sound)):
        for value in (0x00, 0x7F, 0xFF, sound[position] ^ 0x01):
            read(sound[:position] + bytes([value]) + sound[position + 1 :])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > len(sound)
    assert peak_bytes < 4 << 20
    refused = 0
    end = len(sound) - 28  # the last tensor is one number, padded to 32 bytes
    for length in range(end):
        read(sound[:length])
    assert refused == end


def test_the_older_format_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes((1).to_bytes(4, "little") + (8).to_bytes(4, "little") + b"a.weight" + bytes(8))
    for name, said in {"old.dat": "not a GGUF", "none": "does not exist", ".": "is a directory"}.items():
        with pytest.raises(ConversionError, match=said):
            Imatrix.read(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sums": {}, "counts": {}}, "holds no tensors"),
        ({"counts": {"b.weight": np.array([3])}}, "not of the same tensors"),
        ({"sums": {"b.weight": np.ones(3, np.float32)}, "counts": {"b.weight": np.array([3])}}, r"shape \(3,\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        small(**change)


def test_what_a_gguf_cannot_hold_is_not_written(tmp_path: Path) -> None:
    long = "x" * 60
    with pytest.raises(ConversionError, match="too long a name"):
        small(sums={long: np.ones((1, 3), np.float32)}, counts={long: np.array([1])}).write(tmp_path / "a.gguf")
    with pytest.raises(ConversionError, match="names no data set"):
        small(datasets=()).write(tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_it_must_be_of_the_model(spec: ModelSpec) -> None:
    found = measured(spec)
    found.require_for(spec)
    head = {"output.weight": np.ones((1, 7), np.float32)}
    lacking = {name: values for name, values in found.sums.items() if "ffn_down" not in name}
    lacking["blk.0.attn_q.weight"] = np.ones((1, 255), np.float32)
    counts = {name: np.array([1]) for name in lacking}
    with pytest.raises(ConversionError, match=r"lacks 3 of its tensors \(blk.0.ffn_down.weight first\) and has another "
                       r"number of columns in 1 \(blk.0.attn_q.weight, 255 for 256 first\)"):  # fmt: skip
        dataclasses.replace(found, sums=lacking, counts=counts).require_for(spec)
    embedding = {**found.sums, "token_embd.weight": np.ones((1, 9), np.float32)}
    with pytest.raises(ConversionError, match=r"token_embd\.weight, 9 for 256"):
        dataclasses.replace(found, sums=embedding, counts=dict.fromkeys(embedding, np.array([1]))).require_for(spec)
    tied = {**found.sums, **head}  # this model has no head: what llama-quantize does not look up does not matter
    dataclasses.replace(found, sums=tied, counts=dict.fromkeys(tied, np.array([1]))).require_for(spec)


def quantise(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(TOOL.parents[1])},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_S"])
def test_llama_cpp_s_quantiser_takes_our_numbers(
    spec: ModelSpec, tiny_ggufs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    found = measured(spec)
    found.write(tmp_path / "imatrix.gguf")
    out = tmp_path / "out.gguf"
    done = quantise(tiny_ggufs["llama"], out, "--type", kind, "--imatrix", tmp_path / "imatrix.gguf", "--pure")
    assert done.returncode == 0, done.stderr
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_ggufs["llama"]).tensors}
    written = gguf.GGUFReader(out)
    checked = 0
    for tensor in written.tensors:
        importance = found.importance(tensor.name)
        if importance is not None:
            weights = source[tensor.name].data.astype(np.float32)
            kept = TensorType(tensor.tensor_type.name.lower())
            assert np.array_equal(encode(weights, kept, importance=importance), tensor.data), tensor.name
            assert not np.array_equal(encode(weights, kept), tensor.data)
            checked += 1
    assert checked == len(found.sums) == 21
    keys = {name.removeprefix("quantize.imatrix."): field.contents() for name, field in written.fields.items()}
    assert (keys["dataset"], keys["entries_count"], keys["chunks_count"]) == ("prose.txt", 21, 2)


def test_the_quantiser_obeys_its_options_and_says_why_it_fails(
    tiny_ggufs: dict[str, Path], tmp_path: Path, spec: ModelSpec, write_once: Callable[[Imatrix], Path]
) -> None:
    source, out = tiny_ggufs["llama"], tmp_path / "out.gguf"
    assert quantise(source, out, "--type", "q4_k_s", "--tensor-type", "attn_v=q8_0", "--threads", 1).returncode == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert {types[f"blk.{block}.attn_v.weight"] for block in range(3)} == {"Q8_0"}
    wrong = {name: np.ones((1, 32), np.float32) for name in measured(spec).sums}
    other = dataclasses.replace(measured(spec), sums=wrong)
    for arguments, said in {
        ("--type", "q9"): "no file type of llama.cpp",
        ("--type", "q2_k", "--tensor-type", "attn_v"): "is not REGEX=TYPE",
        ("--type", "q2_k", "--tensor-type", "(=q8_0"): "regular expression",
        ("--type", "q2_k_s"): "requires an imatrix",
        ("--type", "q2_k", "--imatrix", str(source)): "not 'imatrix'",
        ("--type", "q2_k", "--imatrix", str(write_once(other))): "imatrix size 32 is different",
    }.items():
        failed = quantise(source, tmp_path / "none.gguf", *arguments)
        assert failed.returncode == 1
        assert said in failed.stderr
        assert not (tmp_path / "none.gguf").exists()


@pytest.fixture
def write_once(tmp_path: Path) -> Callable[[Imatrix], Path]:
    def write(found: Imatrix) -> Path:
        found.write(tmp_path / "other.gguf")
        return tmp_path / "other.gguf"

    return write
