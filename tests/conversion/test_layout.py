"""Split files: llama.cpp's convention, sizes told beforehand, and the same model as in one file."""

import ctypes
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, make_checkpoint
from llama_cpp import llama_cpp as api

import impq_edge
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.errors import ConversionError, ValidationError
from impq_edge.ggml.split import split_paths, unsplit_path
from impq_edge.records import sha256_file, sha256_files
from impq_edge.validation.file import read_facts
from impq_edge.validation.llama import Engine
from impq_edge.validation.settings import RunSettings

RTN = EncodeOptions("rtn")

SHARD_BYTES = 2_500_000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Enough blocks for several pieces that are each larger than the embedding."""
    root = tmp_path_factory.mktemp("deep")
    return {name: make_checkpoint(root / name, name, num_hidden_layers=14) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Artifact]]:
    root = tmp_path_factory.mktemp("whole")
    return {
        name: (root / f"{name}.gguf", impq_edge.convert(str(path), encode=RTN, type="q4_k", out=root / f"{name}.gguf"))
        for name, path in checkpoints.items()
    }


@pytest.fixture(scope="module")
def split(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Artifact]]:
    root = tmp_path_factory.mktemp("split")
    return {name: _split(path, root / f"{name}.gguf") for name, path in checkpoints.items()}


def _split(directory: Path, out: Path) -> tuple[Path, Artifact]:
    made = impq_edge.convert(str(directory), encode=RTN, type="q4_k", out=out, shard_bytes=SHARD_BYTES)
    return out.with_name(made.artifact), made


def paths_of(first: Path, made: Artifact) -> list[Path]:
    return [first, *(first.with_name(name) for name in made.more_files)]


@pytest.mark.parametrize("count", [2, 17, 65535])
def test_files_are_named_as_llama_cpp_names_them(tmp_path: Path, count: int) -> None:
    buffer = ctypes.create_string_buffer(4096)
    for number, path in enumerate(split_paths(tmp_path / "a.b.gguf", count)[:20]):
        api.llama_split_path(buffer, 4096, str(tmp_path / "a.b").encode(), number, count)
        assert str(path) == buffer.value.decode()
        assert unsplit_path(path) == tmp_path / "a.b.gguf"
    assert split_paths(tmp_path / "m.gguf", 1) == [tmp_path / "m.gguf"] and unsplit_path(tmp_path / "m.gguf") is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_hold_what_the_whole_holds(
    whole: dict[str, tuple[Path, Artifact]], split: dict[str, tuple[Path, Artifact]], architecture: str
) -> None:
    """Tensors in order and to the byte; all keys in the first piece, in the others nothing but their place."""
    (one, _), (first, made) = whole[architecture], split[architecture]
    readers = [gguf.GGUFReader(path) for path in paths_of(first, made)]
    joined = [tensor for reader in readers for tensor in reader.tensors]
    reader = gguf.GGUFReader(one)
    assert [tensor.name for tensor in joined] == [tensor.name for tensor in reader.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(joined, reader.tensors, strict=True))
    own = {f"split.{name}" for name in ("no", "count", "tensors.count")}
    counts = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert set(readers[0].fields) == set(reader.fields) | own
    for number, piece in enumerate(readers):
        if number:
            assert set(piece.fields) == own | counts
        found = [piece.get_field(f"split.{name}").contents() for name in ("no", "count", "tensors.count")]  # type: ignore
        assert found == [number, len(readers), len(joined)]
        types = [piece.get_field(f"split.{name}").types[0] for name in ("no", "count", "tensors.count")]  # type: ignore
        assert types == [gguf.GGUFValueType.UINT16, gguf.GGUFValueType.UINT16, gguf.GGUFValueType.INT32]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_and_hash_are_those_predicted_and_recorded(
    whole: dict[str, tuple[Path, Artifact]], split: dict[str, tuple[Path, Artifact]], architecture: str
) -> None:
    first, made = split[architecture]
    paths = paths_of(first, made)
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) >= 3 and max(sizes) <= SHARD_BYTES
    assert sum(sizes) == made.file_bytes == made.predicted_file_bytes > whole[architecture][1].file_bytes
    assert made.sha256 == sha256_files(paths) and made.is_intact(first.parent)
    assert sorted(first.parent.glob(f"{architecture}*.gguf")) == paths
    one, single = whole[architecture]
    assert single.more_files == () and single.sha256 == sha256_file(one)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_the_same_logits(
    whole: dict[str, tuple[Path, Artifact]], split: dict[str, tuple[Path, Artifact]], architecture: str
) -> None:
    settings = RunSettings(context_tokens=64, threads=1, outputs_tokens=64)
    logits = []
    for path in (whole[architecture][0], split[architecture][0]):
        with Engine(path, settings) as engine:
            logits.append(engine.decode(np.arange(10, 60, dtype=np.int32), outputs=50))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_facts_are_those_of_the_whole(
    whole: dict[str, tuple[Path, Artifact]], split: dict[str, tuple[Path, Artifact]], architecture: str
) -> None:
    (one, _), (first, made) = whole[architecture], split[architecture]
    facts, expected = read_facts(first), read_facts(one)
    assert list(facts.files) == paths_of(first, made) and expected.files == (one,)
    assert facts.file_bytes == made.file_bytes and facts.weights == expected.weights
    assert [(t.name, t.type, t.shape) for t in facts.tensors] == [(t.name, t.type, t.shape) for t in expected.tensors]
    assert facts.architecture == architecture and facts.trained_context_tokens == expected.trained_context_tokens


def test_a_split_file_validates_under_the_hash_of_its_record(split: dict[str, tuple[Path, Artifact]]) -> None:
    first, made = split["llama"]
    report = impq_edge.validate(first, windows=1, repetitions=1, generated_tokens=4, threads=1)
    assert report.passed and report.sha256 == made.sha256 and report.file_bytes == made.file_bytes


@pytest.fixture
def copies(split: dict[str, tuple[Path, Artifact]], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(path, tmp_path)) for path in paths_of(*split["llama"])]


def test_a_missing_piece_is_named(copies: list[Path]) -> None:
    copies[1].unlink()
    with pytest.raises(ValidationError, match=rf"{copies[1].name}, piece 2 of {len(copies)} .* is missing"):
        read_facts(copies[0])


def test_a_later_piece_names_the_first(copies: list[Path]) -> None:
    with pytest.raises(ValidationError, match=rf"piece 2 of {len(copies)} of a split GGUF; pass {copies[0].name}"):
        read_facts(copies[1])


def test_a_renamed_piece_is_refused_as_llama_cpp_would(copies: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="is not named NAME-00001-of-0000"):
        read_facts(copies[0].rename(tmp_path / "m.gguf"))


def test_a_piece_in_the_place_of_another_is_refused(copies: list[Path]) -> None:
    shutil.copy(copies[2], copies[1])
    with pytest.raises(ValidationError, match=rf"it says split.no 2 of {len(copies)}, not 1"):
        read_facts(copies[0])


def test_pieces_that_do_not_make_a_whole_are_refused(copies: list[Path]) -> None:
    first, second = copies[0].read_bytes(), copies[1].read_bytes()
    key = b"split.tensors.count" + (5).to_bytes(4, "little")
    at = first.index(key) + len(key)
    copies[0].write_bytes(first[:at] + b"\x07\0\0\0" + first[at + 4 :])
    with pytest.raises(ValidationError, match=r"split.tensors.count is 7, but its pieces hold"):
        read_facts(copies[0])
    copies[0].write_bytes(first)
    names, others = ([tensor.name for tensor in gguf.GGUFReader(path).tensors] for path in copies[:2])
    twice, other = next((a, b) for a in names for b in others if len(a) == len(b))
    copies[1].write_bytes(second.replace(other.encode(), twice.encode(), 1))
    with pytest.raises(ValidationError, match="two tensors in its pieces have the same name"):
        read_facts(copies[0])


def test_a_damaged_or_missing_piece_is_not_intact(copies: list[Path], split: dict[str, tuple[Path, Artifact]]) -> None:
    made = split["llama"][1]
    assert made.is_intact(copies[0].parent)
    data = bytearray(copies[-1].read_bytes())
    data[-40] ^= 1
    copies[-1].write_bytes(data)
    assert not made.is_intact(copies[0].parent)
    copies[-1].unlink()
    assert not made.is_intact(copies[0].parent)


def test_a_shard_size_that_no_tensor_fits_says_the_least_that_does(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"no tensor is split; ask for --shard-size \d+ or more") as said:
        impq_edge.convert(str(checkpoints["llama"]), encode=RTN, type="q4_k", out=tmp_path / "m.gguf", shard_bytes=1000)
    least = int(str(said.value).split("--shard-size ")[1].split()[0])
    made = impq_edge.convert(
        str(checkpoints["llama"]), encode=RTN, type="q4_k", out=tmp_path / "m.gguf", shard_bytes=least
    )
    assert all((tmp_path / name).stat().st_size <= least for name in (made.artifact, *made.more_files))
    assert least - made.file_bytes < 0  # it is split


def test_a_file_that_fits_is_not_split(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = impq_edge.convert(
        str(checkpoints["llama"]), encode=RTN, type="q2_k", out=tmp_path / "m.gguf", shard_bytes=10**9
    )
    assert made.artifact == "m.gguf" and not made.more_files and read_facts(tmp_path / "m.gguf").files
