import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation.file import read_facts


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small GGUF with a key of every kind that matters."""
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 77)
    writer.add_float32("llama.scale", 0.5)
    writer.add_bool("llama.flag", True)
    writer.add_array("tokenizer.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.scores", [1.0, 2.0])
    writer.add_tensor("a.weight", np.ones((2, 32), np.float32))
    writer.add_tensor("b.weight", np.ones((3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return path

    return write_file


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_facts_are_those_of_the_reference_reader(tiny_ggufs: dict[str, Path], architecture: str) -> None:
    path = tiny_ggufs[architecture]
    facts, reader = read_facts(path), gguf.GGUFReader(path)
    assert facts.architecture == architecture
    assert [(t.name, t.type, t.shape, t.offset_bytes, t.size_bytes) for t in facts.tensors] == [
        (t.name, t.tensor_type.name.lower(), tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    assert facts.weights == sum(int(t.n_elements) for t in reader.tensors)
    assert facts.bits_per_weight == 8 * path.stat().st_size / facts.weights
    for key, value in facts.keys.items():
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == value


def test_keys_and_tensors_of_a_known_file(sound: bytes, write: Callable[[bytes], Path]) -> None:
    facts = read_facts(write(sound))
    assert facts.trained_context_tokens == 77
    assert facts.keys["llama.scale"] == 0.5
    assert facts.keys["llama.flag"] is True
    assert [(t.type, t.shape) for t in facts.tensors] == [("f32", (2, 32)), ("q8_0", (3, 32)), ("f32", (3,))]


def test_a_cut_file_says_how_many_bytes_are_missing(
    tiny_ggufs: dict[str, Path], write: Callable[[bytes], Path]
) -> None:
    data = tiny_ggufs["llama"].read_bytes()
    end = max(t.offset_bytes + t.size_bytes for t in read_facts(tiny_ggufs["llama"]).tensors)
    for missing in (1, 1000, len(data) // 2):
        with pytest.raises(ValidationError, match=f"cut short by {missing} of {end} bytes"):
            read_facts(write(data[: end - missing]))


def test_every_cut_of_a_header_is_refused(sound: bytes, write: Callable[[bytes], Path]) -> None:
    end = max(t.offset_bytes + t.size_bytes for t in read_facts(write(sound)).tensors)
    for length in range(end):
        with pytest.raises(ValidationError):
            read_facts(write(sound[:length]))


def test_no_mutated_header_raises_anything_else_or_takes_memory(sound: bytes, write: Callable[[bytes], Path]) -> None:
    header_bytes = read_facts(write(sound)).tensors[0].offset_bytes
    tracemalloc.start()
    refused = 0
    for position in range(header_bytes):
        for value in (0x00, 0x7F, 0xFF, sound[position] ^ 0x01):
            mutated = bytearray(sound)
            mutated[position] = value
            try:
                read_facts(write(bytes(mutated)))
            except ValidationError as error:
                refused += 1
                assert "\n" not in str(error)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > header_bytes  # most bytes of a header matter
    assert peak_bytes < 4 << 20


def _patched(data: bytes, offset: int, code: str, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into("<" + code, out, offset, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("where", "code", "value", "said"),
    [
        (4, "I", 1, "version 1"),
        (4, "I", 3 << 24, "other byte order"),
        (8, "Q", 1 << 62, "tensors"),
        (16, "Q", (1 << 64) - 1, "keys"),
        (24, "Q", 1 << 40, "bytes of text"),
        (b"tokenizer.tokens", "Q", 1 << 50, "items"),
        (b"b.weight", "Q", (1 << 64) - 32, "impossible shape"),
    ],
)
def test_hostile_counts_are_named(
    sound: bytes, write: Callable[[bytes], Path], where: int | bytes, code: str, value: int, said: str
) -> None:
    # A key is followed by its type and its items' type, a tensor's name by its rank: 8 and 4 bytes.
    after = {b"tokenizer.tokens": 8, b"b.weight": 4}
    offset = where if isinstance(where, int) else sound.index(where) + len(where) + after[where]
    with pytest.raises(ValidationError, match=said):
        read_facts(write(_patched(sound, offset, code, value)))


def test_overlapping_tensors_are_refused(sound: bytes, write: Callable[[bytes], Path]) -> None:
    offset = sound.index(b"b.weight") + 8 + 4 + 2 * 8 + 4
    with pytest.raises(ValidationError, match="said to start at 0"):
        read_facts(write(_patched(sound, offset, "Q", 0)))


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("Once upon a time")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, said in {
        "": "is a directory",
        "missing.gguf": "does not exist",
        "empty.gguf": "is empty",
        "text.gguf": "not a GGUF: it begins with b'Once'",
        "pipe.gguf": "no regular file",
    }.items():
        with pytest.raises(ValidationError, match=said):
            read_facts(tmp_path / name)


@pytest.mark.parametrize("count", [-1, 1 << 16, "three", True, 2.0])
def test_hostile_split_counts_are_named(tmp_path: Path, count: object) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = {int: gguf.GGUFValueType.INT64, str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL}.get(
        type(count)
    )
    writer.add_key_value("split.count", count, kind or gguf.GGUFValueType.FLOAT32)
    writer.add_tensor("a.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValidationError, match=f"split.count is {count!r}, not a number from 0 to 65535"):
        read_facts(path)
