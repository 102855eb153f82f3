import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, make_checkpoint

import impq_edge
from impq_edge import records
from impq_edge.backends import load_backend
from impq_edge.conversion import writer
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions, PlainEncoder
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.layout import Layout, header_bytes, plan_gguf
from impq_edge.conversion.tensors import row_order
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.conversion.writer import write_gguf
from impq_edge.errors import AllocationError, ConversionError, ImpqError, ModelError, RecordError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import Request, allocate_blocks
from impq_edge.impq.allocation import Allocation
from impq_edge.model.load import read_tensor
from impq_edge.model.recipe import tensor_types
from impq_edge.model.spec import ModelSpec, TensorSpec, read_model
from impq_edge.records import sha256_file

TOOLS = Path(__file__).parents[2] / "tools"
RTN = EncodeOptions("rtn")  # ggml's encoder, which takes no calibration: the writer is what is tested here


def tokenizer_of(directory: Path, spec: ModelSpec) -> Tokenizer:
    return read_tokenizer(directory, spec.hyperparameters.vocabulary, spec.hyperparameters.architecture)


def planned(directory: Path, kind: str, shard_bytes: int | None = None) -> Layout:
    spec = read_model(directory)
    outer = TensorType(kind) if kind in ("f32", "f16", "q8_0") else TensorType.Q6_K
    types = tensor_types(spec, [TensorType(kind)] * spec.n_blocks, outer)
    return plan_gguf(spec, tokenizer_of(directory, spec), types, {}, shard_bytes=shard_bytes)


class Weighed(PlainEncoder):
    """Other importances for every tensor."""

    def __init__(self, spec: ModelSpec) -> None:
        rng = np.random.default_rng(1)
        self.columns = {
            tensor.gguf_name: rng.lognormal(sigma=2, size=tensor.shape[-1]).astype(np.float32)
            for tensor in spec.tensors
            if tensor.role == "matrix"
        }

    def importance(self, tensor: TensorSpec, kind: TensorType) -> np.ndarray | None:
        return self.columns.get(tensor.gguf_name)


def mixed(spec: ModelSpec, directory: Path) -> Allocation:
    """An allocation of the random model at 10/3 bits: blocks 0 and 2 at 4 bit."""
    request = Request(impq_edge.load_device("laptop-16gb"), 512, "f16", average_bits=Fraction(10, 3))
    phi = np.array([0.3, 0.1, 0.2])
    return allocate_blocks(
        spec, header_bytes(spec, tokenizer_of(directory, spec)), phi, np.zeros((3, 3)), "0" * 64, request
    )


def weights_of(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_file_holds_what_the_game_was_played_with(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Every matrix of the blocks dequantises to the backend's weights, read by an independent reader."""
    import torch

    directory = checkpoints[architecture]
    spec = read_model(directory)
    allocation = mixed(spec, directory)
    assert allocation.player_bits == (4, 2, 4)
    artifact = impq_edge.convert(str(directory), encode=RTN, allocation=allocation, out=tmp_path / "mix.gguf")
    written, backend = weights_of(tmp_path / "mix.gguf"), load_backend("kquant")
    for block, bits in enumerate(allocation.player_bits):
        for tensor in spec.block_matrices(block):
            played = backend.quantise(torch.from_numpy(read_tensor(directory, tensor)), bits).weight.numpy()
            order = row_order(spec, tensor)
            expected = played if order is None else played[order]
            assert np.array_equal(written[tensor.gguf_name], expected), tensor.gguf_name
    assert artifact.tensor_types == allocation.tensor_types
    assert set(written) == set(allocation.tensor_types)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k", "q2_k", "mix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_size_is_predicted_to_the_byte(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    directory, out = checkpoints[architecture], tmp_path / "m.gguf"
    spec = read_model(directory)
    if kind == "mix":
        allocation = mixed(spec, directory)
        predicted = allocation.predicted_file_bytes
        made = impq_edge.convert(str(directory), encode=RTN, allocation=allocation, out=out)
    else:
        predicted = planned(directory, kind).file_bytes
        made = impq_edge.convert(str(directory), encode=RTN, type=kind, out=out)
    assert made.file_bytes == made.predicted_file_bytes == predicted == out.stat().st_size
    assert made.is_intact(tmp_path) and Artifact.load(tmp_path / "m.gguf.json") == made


@pytest.mark.parametrize("weighed", [False, True])
def test_threads_and_pieces_change_no_byte(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighed: bool
) -> None:
    layout = planned(checkpoints["llama"], "q2_k")
    encoder = Weighed(layout.spec) if weighed else PlainEncoder()
    hashes = set()
    for chunk_weights, threads in ((1 << 19, 1), (1 << 30, 3), (5 * 256, 4), (1 << 12, 1)):
        monkeypatch.setattr("impq_edge.conversion.writer._CHUNK_WEIGHTS", chunk_weights)
        out = tmp_path / "m.gguf"
        written = write_gguf(checkpoints["llama"], layout, out, encoder=encoder, threads=threads)
        assert written.sha256 == sha256_file(out)
        hashes.add(written.sha256)
    assert len(hashes) == 1


def test_how_the_checkpoint_is_cut_changes_no_tensor(tmp_path: Path) -> None:
    for shards in (1, 3):
        directory = make_checkpoint(tmp_path / f"{shards}", "llama", shards=shards)
        impq_edge.convert(str(directory), encode=RTN, type="q2_k", out=tmp_path / f"{shards}.gguf")
    first, second = (weights_of(tmp_path / f"{shards}.gguf") for shards in (1, 3))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["q2_k", "q4_k"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_are_those_of_llama_quantize_with_the_same_importance_matrix(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str, kind: str
) -> None:
    """From safetensors and from an F32 GGUF of them: what llama.cpp's own quantiser writes, to the byte."""
    directory, layout = checkpoints[architecture], planned(checkpoints[architecture], kind)
    encoder = Weighed(layout.spec)
    write_gguf(directory, layout, tmp_path / "ours.gguf", encoder=encoder)
    squares = {name: columns.astype(np.float64) for name, columns in encoder.columns.items()}
    matrix = Imatrix.dense(squares, 1, datasets=["random"], chunk_count=1, chunk_tokens=1)
    matrix.write(tmp_path / "imatrix.gguf")
    impq_edge.convert(str(directory), encode=RTN, type="f32", out=tmp_path / "f32.gguf")
    outer = [f"--tensor-type={name}=q6_k" for name in ("token_embd", "^output.weight")]
    subprocess.run(
        [
            sys.executable, TOOLS / "llama_quantize.py", tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "--pure",
            "--type", {"q2_k": "Q2_K", "q4_k": "Q4_K_S"}[kind], "--imatrix", tmp_path / "imatrix.gguf", *outer,
        ],
        check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
    )  # fmt: skip
    ours, theirs = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / f"{who}.gguf").tensors} for who in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys() and {t.tensor_type.name.lower() for t in ours.values()} == {kind, "q6_k", "f32"}
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type and np.array_equal(tensor.data, theirs[name].data), name


class Solving(PlainEncoder):
    """Solves what it is asked to, and remembers in which order it was asked."""

    def __init__(self, directory: Path, wanted: str) -> None:
        self.directory, self.wanted = directory, wanted
        self.asked: list[str] = []
        self.weighed: list[str] = []

    def importance(self, tensor: TensorSpec, kind: TensorType) -> None:
        self.weighed.append(tensor.gguf_name)

    def solved(self, tensor: TensorSpec, kind: TensorType) -> np.ndarray | None:
        self.asked.append(tensor.gguf_name)
        if self.wanted not in tensor.gguf_name:
            return None
        return encode(-read_tensor(self.directory, tensor), kind)


def test_solved_bytes_are_written_as_they_are_in_the_order_of_the_file(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    directory, layout = checkpoints["llama"], planned(checkpoints["llama"], "q4_k")
    encoder = Solving(directory, "attn_q")
    write_gguf(directory, layout, tmp_path / "solved.gguf", encoder=encoder)
    write_gguf(directory, layout, tmp_path / "plain.gguf")
    solved, plain = weights_of(tmp_path / "solved.gguf"), weights_of(tmp_path / "plain.gguf")
    for tensor in layout.spec.tensors:
        name, order = tensor.gguf_name, row_order(layout.spec, tensor)
        if "attn_q" in name:
            negative = encode(-read_tensor(directory, tensor), TensorType.Q4_K)
            assert order is not None
            assert np.array_equal(solved[name], gguf.dequantize(negative, TensorType.Q4_K.ggml)[order])
        else:
            assert np.array_equal(solved[name], plain[name])
    assert encoder.asked == [t.gguf_name for t in layout.spec.tensors if t.role != "vector"]
    assert encoder.weighed == [name for name in encoder.asked if "attn_q" not in name]


def test_progress_counts_every_byte_of_data(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    layout = planned(checkpoints["gemma2"], "q2_k")
    steps: list[int] = []
    write_gguf(checkpoints["gemma2"], layout, tmp_path / "m.gguf", progress=steps.append)
    assert sum(steps) == layout.file_bytes - len(layout.pieces[0].header) and len(steps) > len(layout.spec.tensors)


def test_a_row_that_holds_no_k_quants_needs_permission(tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    directory = make_checkpoint(tmp_path / "m", "llama", **shape)
    with pytest.raises(ModelError, match="--allow-fallback"):
        impq_edge.convert(str(directory), encode=RTN, type="q2_k", out=tmp_path / "m.gguf")
    made = impq_edge.convert(str(directory), encode=RTN, type="q2_k", out=tmp_path / "m.gguf", allow_fallback=True)
    assert made.tensor_types["blk.0.attn_q.weight"] == "q4_0" and made.tensor_types["blk.0.ffn_down.weight"] == "q2_k"
    report = impq_edge.validate(tmp_path / "m.gguf", windows=1, repetitions=1, generated_tokens=4)
    assert report.passed


def test_nan_weights_leave_nothing_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(checkpoints["llama"], tmp_path / "nan"))
    state = load_file(directory / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out" / "m.gguf"
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' has 1 NaN"):
        impq_edge.convert(str(directory), encode=RTN, type="q2_k", out=out)
    assert not out.parent.exists()


def test_a_full_disk_leaves_nothing_behind(
    checkpoints: dict[str, Path], tmp_path: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_disk("size=1m")
    needed = r"is full: 2,\d{3},\d{3} bytes are needed and 1,0\d\d,\d{3} bytes are free; free some space"
    with pytest.raises(RecordError, match=needed):
        impq_edge.convert(str(checkpoints["llama"]), encode=RTN, type="q2_k", out=small / "m.gguf")
    assert not any(small.iterdir())
    monkeypatch.setattr(writer, "require_free", lambda *_: None)  # somebody else takes it meanwhile
    monkeypatch.setattr(records, "require_free", lambda *_: None)
    with pytest.raises(RecordError, match="is full: "):
        impq_edge.convert(str(checkpoints["llama"]), encode=RTN, type="q2_k", out=small / "m.gguf")
    assert not any(small.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(small))  # nor is there a traceback where /tmp is full
    (small / "filled").write_bytes(bytes(1 << 20))
    with pytest.raises(RecordError, match=r"temporary files cannot be written .*TMPDIR"):
        impq_edge.convert(str(checkpoints["llama"]), encode=RTN, type="q2_k", out=tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("arguments", [{}, {"type": "q2_k", "allocation": Path("a.json")}, {"type": "q3"}])
def test_what_to_write_must_be_clear(demo: Path, tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ConversionError):
        impq_edge.convert(str(demo), encode=RTN, out=tmp_path / "m.gguf", **arguments)  # type: ignore[arg-type]


def test_an_allocation_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    allocation = mixed(read_model(checkpoints["llama"]), checkpoints["llama"])
    with pytest.raises(AllocationError, match="not for these weights"):
        impq_edge.convert(str(checkpoints["qwen3"]), encode=RTN, allocation=allocation, out=tmp_path / "m.gguf")


def test_size_is_predicted_whatever_the_directory_is_called(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    allocation = mixed(read_model(checkpoints["llama"]), checkpoints["llama"])
    renamed = shutil.copytree(checkpoints["llama"], tmp_path / "a-checkpoint-under-quite-another-name-than-before")
    made = impq_edge.convert(str(renamed), encode=RTN, allocation=allocation, out=tmp_path / "m.gguf")
    assert made.file_bytes == allocation.predicted_file_bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 58 million weights, half of them in the embedding: seconds of encoding."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16}
    return make_checkpoint(tmp_path_factory.mktemp("large") / "m", "llama", shards=2, vocab_size=28_672, **shape)


CONVERT = """
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
import impq_edge
directory, out, shard_bytes = sys.argv[1:]
rtn = impq_edge.EncodeOptions("rtn")
impq_edge.convert(directory, type="q2_k", out=Path(out), encode=rtn, threads=1, shard_bytes=int(shard_bytes) or None)
"""


@pytest.mark.parametrize("shard_bytes", [0, 25_000_000])
def test_kill_while_writing_leaves_no_file_under_a_final_name(large: Path, tmp_path: Path, shard_bytes: int) -> None:
    """SIGKILL when most of it is on the disk, in the second of two pieces; the next run cleans up and completes."""
    layout = planned(large, "q2_k", shard_bytes or None)
    out = tmp_path / "m.gguf"
    child = subprocess.Popen([sys.executable, "-c", CONVERT, large, out, str(shard_bytes)])
    while sum(path.stat().st_size for path in tmp_path.iterdir()) < 0.8 * layout.file_bytes:
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()
    assert not any(path.exists() for path in (out, *layout.paths(out)))
    assert len(list(tmp_path.glob(".m*.tmp"))) == len(layout.pieces) == (1 if not shard_bytes else 2)
    subprocess.run([sys.executable, "-c", CONVERT, large, out, str(shard_bytes)], check=True)
    made = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in layout.paths(out)} <= made and not any(name.startswith(".") for name in made)
    assert sum(path.stat().st_size for path in layout.paths(out)) == layout.file_bytes


MEMORY = """
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_writer import planned, write_gguf
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.validation.memory import anonymous_bytes, peak_rss_bytes
import numpy as np
layout = planned(Path(sys.argv[1]), "q4_k")
encode(np.zeros((1, 256), np.float32), TensorType.Q4_K)  # loads the library
before = peak_rss_bytes()
write_gguf(Path(sys.argv[1]), layout, Path(sys.argv[2]), threads=2)
print(peak_rss_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is that of the parent process")
def test_memory_does_not_hold_a_tensor_whole(large: Path, tmp_path: Path) -> None:
    arguments = [str(large), str(tmp_path / "m.gguf"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], check=True, capture_output=True, text=True, env=environment
    )
    largest = max(tensor.weights for tensor in read_model(large).tensors)
    assert largest == 28_672 * 1024
    assert int(done.stdout) < largest  # a quarter of it in float32, half in BF16


def test_the_recipe_tells_how_the_file_was_made(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    spec = read_model(checkpoints["llama"])
    allocation = mixed(spec, checkpoints["llama"])
    impq_edge.convert(str(checkpoints["llama"]), encode=RTN, allocation=allocation, out=tmp_path / "m.gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["impq_edge.recipe"]
    recipe = json.loads(bytes(field.parts[field.data[0]]))
    assert recipe["allocation_sha256"] == allocation.identity() and recipe["model_sha256"] == spec.content_sha256
    assert isinstance(recipe["budget_bytes"], int) and issubclass(AllocationError, ImpqError)
