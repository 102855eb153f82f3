import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

import impq_edge
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.metadata import RECIPE_KEY
from impq_edge.errors import ValidationError
from impq_edge.validation.inspection import Inspection, inspect


def write(path: Path, architecture: str = "llama", **keys: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(*value if isinstance(value, tuple) else (value,))
    writer.add_tensor("a.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_our_own_files(tiny_ggufs: dict[str, Path], architecture: str) -> None:
    path = tiny_ggufs[architecture]
    found, reader = inspect(path), gguf.GGUFReader(path)
    assert (found.architecture, found.name) == (architecture, f"random-{architecture}")
    assert found.weights == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found.bits_per_weight == 8 * path.stat().st_size / found.weights
    assert (found.file_type, found.context_tokens, found.pieces, found.note) == ("F16", 2048, 1, None)
    assert found.recipe is not None and found.recipe["type"] == "f16"
    assert sum(group.size_bytes for group in found.groups) == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    groups = {group.name: group for group in found.groups}
    assert next(iter(groups)) == "token_embd" and list(groups)[-1] == "norms"
    assert groups["ffn_down"].types == {"f16": 3} and groups["ffn_down"].bits_per_weight == 16
    assert groups["ffn_down"].weights == 3 * 256 * 512
    assert ("output" in groups) == (architecture == "qwen3")
    # Each block has two norms, Gemma-2 four and Qwen3 also those of queries and keys; and one follows the blocks.
    assert groups["norms"].tensors == 1 + 3 * {"llama": 2, "qwen3": 4, "gemma2": 4}[architecture]


def test_a_record(demo_gguf: Path, tmp_path: Path) -> None:
    found = inspect(demo_gguf)
    found.save(tmp_path / "i.json")
    assert Inspection.load(tmp_path / "i.json") == found
    assert found.groups[0].types == {"q6_k": 1} and found.groups[1].types == {"q4_k": 16}


def test_the_base_install_suffices(demo_gguf: Path) -> None:
    blocked = ["torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "scipy", "llama_cpp"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); from pathlib import Path;"
        "from impq_edge.validation.inspection import inspect; print(inspect(Path(sys.argv[1])).weights)"
    )
    done = subprocess.run([sys.executable, "-c", code, demo_gguf], check=True, capture_output=True, text=True)
    assert int(done.stdout) == inspect(demo_gguf).weights


def test_what_others_write(tmp_path: Path) -> None:
    found = inspect(
        write(
            tmp_path / "x.gguf", "mamba", name="Some Model", license="other", license_name="own", file_type=15,
            license_link="https://example.org", base_model_count=3, base_model_repo_url=(0, "https://hub/a/b"),
            base_model_name=(1, "C"), base_model_organization=(1, "D"), quantized_by="somebody",
            chat_template="\n{# first #}\n{{ second }}",
        )
    )  # fmt: skip
    assert (found.architecture, found.name, found.quantized_by) == ("mamba", "Some Model", "somebody")
    assert found.license == "other, own, https://example.org"
    assert found.base_models == ("https://hub/a/b", "D, C", "unnamed")
    assert (found.file_type, found.chat_template, found.recipe) == ("Q4_K_M", "{# first #}", None)
    assert found.context_tokens is None
    assert [(group.name, group.types, group.weights) for group in found.groups] == [("a", {"f32": 1}, 64)]


def test_files_that_are_no_models(tmp_path: Path) -> None:
    Imatrix.dense({"a.weight": np.ones(4)}, 9, datasets=["x"], chunk_count=1, chunk_tokens=9).write(tmp_path / "i.gguf")
    found = inspect(tmp_path / "i.gguf")
    assert (found.architecture, found.weights, found.license, found.chat_template) == (None, 5, None, None)
    writer = GGUFWriter(tmp_path / "empty.gguf", "llama")  # a vocabulary, or the first piece of some split models
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    empty = inspect(tmp_path / "empty.gguf")
    assert (empty.weights, empty.bits_per_weight, empty.groups) == (0, None, ())


@pytest.fixture(scope="module")
def pieces(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("split") / "m.gguf"
    impq_edge.convert(str(checkpoints["llama"]), type="q8_0", out=out, shard_bytes=3_000_000)
    return sorted(out.parent.glob("*.gguf"))


def test_a_split_model_is_told_as_a_whole(pieces: list[Path]) -> None:
    found = inspect(pieces[0])
    assert (found.piece, found.pieces, found.note) == (1, len(pieces), None) and len(pieces) > 1
    assert found.file_bytes == sum(path.stat().st_size for path in pieces)
    assert sum(group.tensors for group in found.groups) == 3 * 9 + 3


def test_a_piece_alone_is_told_as_one(pieces: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / pieces[0].name
    alone.write_bytes(pieces[0].read_bytes())
    found = inspect(alone)
    assert found.name == "random-llama" and found.file_bytes == alone.stat().st_size
    assert found.note is not None and found.note.startswith("Only this piece is counted: ") and "missing" in found.note
    last = inspect(pieces[-1])
    assert last.piece == len(pieces) and last.note is not None and last.name is None


HOSTILE = "\x1b[2J\u202eevil\n" * 100


def test_nothing_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    keys = dict.fromkeys(("name", "license", "quantized_by", "chat_template"), HOSTILE)
    recipe = json.dumps({HOSTILE: HOSTILE, "list": [1], "nan": float("nan"), "fine": 2})
    found = inspect(write(tmp_path / "x.gguf", **keys, string=(RECIPE_KEY, recipe)))
    for text in (found.name, found.license, found.quantized_by, found.chat_template, *(found.recipe or {})):
        assert text is not None and text.isprintable() and len(text) <= 201
    assert found.recipe is not None and len(found.recipe) == 2 and found.recipe["fine"] == 2
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("recipe", ["{", "[1]", "7", "[" * 99_999, '{"a":' * 50_000, "9" * 5000, ""])
def test_a_recipe_that_is_none(tmp_path: Path, recipe: str) -> None:
    assert inspect(write(tmp_path / "x.gguf", string=(RECIPE_KEY, recipe))).recipe is None


@pytest.mark.parametrize(
    ("keys", "field", "expected"),
    [
        ({"uint32": ("general.name", 7)}, "name", None),
        ({"file_type": 9999}, "file_type", "9999"),
        ({"string": ("general.file_type", "Q4")}, "file_type", None),
        ({"uint32": ("general.base_model.count", 1 << 31)}, "base_models", ("unnamed",) * 64),
        ({"string": ("general.base_model.count", "x")}, "base_models", ()),
        ({"string": ("split.count", "3")}, "pieces", 1),
        ({"int32": ("llama.context_length", -5)}, "context_tokens", None),
    ],
)
def test_keys_of_other_types(tmp_path: Path, keys: dict[str, Any], field: str, expected: object) -> None:
    assert getattr(inspect(write(tmp_path / "x.gguf", **keys)), field) == expected


def test_what_is_no_gguf_is_refused(tmp_path: Path, demo_gguf: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time")
    (tmp_path / "cut").write_bytes(demo_gguf.read_bytes()[:-9999])
    for name, said in {"text": "not a GGUF", "cut": "cut short by", "none": "does not exist"}.items():
        with pytest.raises(ValidationError, match=said):
            inspect(tmp_path / name)


def test_tensor_types_are_counted(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for block in range(3):
        kind, columns = (GGMLQuantizationType.Q8_0, 34) if block else (GGMLQuantizationType.Q4_0, 18)
        writer.add_tensor(f"blk.{block}.ffn_up.weight", np.ones((2, columns), np.uint8), raw_dtype=kind)
        writer.add_tensor(f"blk.{block}.attn_q.bias", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bias, up = sorted(inspect(tmp_path / "x.gguf").groups, key=lambda group: group.name)
    assert (bias.name, bias.tensors) == ("attn_q.bias", 3)
    assert (up.types, up.weights, up.size_bytes) == ({"q8_0": 2, "q4_0": 1}, 3 * 64, 2 * (34 + 34 + 18))


def test_no_mutated_file_raises_anything_else(tmp_path: Path, write_bytes: Callable[[bytes], Path]) -> None:
    keys = {"name": "n", "base_model_count": 1, "base_model_name": (0, "b"), "string": (RECIPE_KEY, '{"a":1}')}
    sound = write(tmp_path / "s.gguf", **keys).read_bytes()
    for position in range(len(sound) - 256):
        for value in (0, 0x7F, 0xFF, sound[position] ^ 1):
            try:
                inspect(write_bytes(sound[:position] + bytes([value]) + sound[position + 1 :]))
            except ValidationError as error:
                assert "\n" not in str(error)


@pytest.fixture
def write_bytes(tmp_path: Path) -> Callable[[bytes], Path]:
    def written(data: bytes) -> Path:
        (tmp_path / "m.gguf").write_bytes(data)
        return tmp_path / "m.gguf"

    return written
