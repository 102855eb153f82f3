"""The metadata is what llama.cpp needs, no more, and of one size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np
import pytest
from checkpoints import ARCHITECTURES
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from vocabularies import Vocabulary, spec_of

import impq_edge
from impq_edge.conversion.card import BaseModel, ModelCard
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.metadata import ORIGIN_BYTES, RECIPE_KEY, Origin, add_metadata, file_type
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.errors import ConversionError
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, tensor_types
from impq_edge.model.spec import ModelSpec, read_model

TOKENIZER = Tokenizer(
    model="gpt2",
    pre="qwen2",
    tokens=("a", "b", "ab", "<eos>"),
    types=(gguf.TokenType.NORMAL,) * 3 + (gguf.TokenType.CONTROL,),
    scores=None,
    merges=(("a", "b"),),
    special_ids={"eos": 3},
    add_bos=False,
    add_eos=False,
    add_space_prefix=False,
    chat_templates={},
)
ONE = {"blk.0.ffn_up.weight": TensorType.Q2_K}


def write(
    path: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    types: TensorTypes,
    recipe: dict[str, Any],
    origin: Origin | None = None,
) -> Path:
    writer = GGUFWriter(path, spec.hyperparameters.architecture)
    add_metadata(writer, spec, tokenizer, types, recipe, origin)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def small(
    path: Path, recipe: dict[str, Any] | None = None, origin: Origin | None = None, **changes: Any
) -> dict[str, Any]:
    """Write a file of four tokens and return its metadata."""
    tokenizer = Tokenizer(**{**vars(TOKENIZER), **changes})
    return fields(write(path, spec_of("qwen3", 4), tokenizer, ONE, recipe or {}, origin))


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def mixed(spec: ModelSpec) -> dict[str, TensorType]:
    kinds = [TensorType.Q2_K] * (spec.n_blocks - 1) + [TensorType.Q4_K]
    return tensor_types(spec, kinds, TensorType.Q6_K)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key(architecture: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints[architecture]
    spec = read_model(directory)
    config = json.loads((directory / "config.json").read_text())
    tokenizer = read_tokenizer(directory, 8192, spec.hyperparameters.architecture)
    found = fields(write(tmp_path / "x.gguf", spec, tokenizer, mixed(spec), {"made by": "a test"}))
    expected = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": f"random-{architecture}",
        "general.file_type": LlamaFileType.MOSTLY_Q2_K,
        "general.quantization_version": 2,
        "vocab_size": 8192,
        "context_length": 2048,
        "embedding_length": 256,
        "block_count": 3,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": pytest.approx(config["rms_norm_eps"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": tokenizer.model,
        "tokenizer.ggml.pre": tokenizer.pre,
        "tokenizer.ggml.tokens": list(tokenizer.tokens),
        "tokenizer.ggml.token_type": list(tokenizer.types),
        "tokenizer.ggml.add_bos_token": architecture != "qwen3",
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "general.quantized_by": f"impq-edge {impq_edge.__version__}",
    }
    if architecture == "gemma2":
        expected |= {"attention.sliding_window": 64, "attn_logit_softcapping": 50, "final_logit_softcapping": 30}
        expected |= {"tokenizer.ggml.scores": list(tokenizer.scores or ())}
        ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "eot": 6}
    else:
        expected |= {"tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer.merges or ()]}
        ids = {"bos": 8184, "eos": 8185, "eot": 8186} if architecture == "llama" else {}
        ids = ids or {"eos": 8189, "padding": 8189, "eot": 8191}
    expected |= {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    general = ("general.", "tokenizer.", "impq_edge.")
    named = {(key if key.startswith(general) else f"{architecture}.{key}"): value for key, value in expected.items()}
    assert found.pop("general.size_label").endswith("M")
    assert found.pop(RECIPE_KEY).rstrip(" ") == '{"made by":"a test"}'
    assert found == named


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_reads_it(architecture: str, checkpoints: dict[str, Path], tiny_ggufs: dict[str, Path]) -> None:
    hyper = read_model(checkpoints[architecture]).hyperparameters
    tokenizer = read_tokenizer(checkpoints[architecture], 8192, hyper.architecture)
    loaded = Vocabulary(tiny_ggufs[architecture], vocab_only=False)
    model = loaded.model
    assert api.llama_vocab_n_tokens(loaded.vocab) == hyper.vocabulary
    assert api.llama_model_n_ctx_train(model) == hyper.context
    assert api.llama_model_n_embd(model) == hyper.hidden
    assert api.llama_model_n_layer(model) == hyper.n_blocks
    assert api.llama_model_n_head(model) == hyper.n_heads
    assert api.llama_model_n_head_kv(model) == hyper.n_kv_heads
    assert api.llama_model_n_swa(model) == (hyper.sliding_window or 0)
    assert api.llama_vocab_get_add_bos(loaded.vocab) == tokenizer.add_bos
    for name, token in tokenizer.special_ids.items():
        if name in ("bos", "eos", "eot", "pad"):
            assert getattr(api, f"llama_vocab_{name}")(loaded.vocab) == token, name


def test_the_recipe_comes_back(tmp_path: Path) -> None:
    recipe = {"device": "Küche “Pi 5”", "budget_bytes": 123456789, "perplexity": 1 / 3, "seed": None, "quote": 'a"\\\n'}
    stored = small(tmp_path / "x.gguf", recipe)[RECIPE_KEY]
    assert json.loads(stored) == recipe


CARD = ModelCard(
    license="other",
    license_name="küche-1.0",
    license_link="https://example.org/licence",
    base_models=(
        BaseModel("Tiny Base", "v2", "Some Org", "https://huggingface.co/some-org/tiny-base-v2"),
        BaseModel("Other"),
    ),
    tags=("text-generation", "tiny"),
    languages=("en", "no"),
)
IMATRIX = Imatrix.dense({"a": np.ones(4), "b": np.ones(8)}, 9, datasets=["prose.txt"], chunk_count=7, chunk_tokens=512)
FULL = Origin(CARD, "somebody", IMATRIX, "measured/imatrix.gguf")


def room(origin: Origin, path: Path) -> int:
    """Bytes that are left for the recipe."""
    return len(small(path, {}, origin)[RECIPE_KEY].encode())


def test_origin(tmp_path: Path) -> None:
    found = small(tmp_path / "x.gguf", {}, FULL)
    keys = {key: value for key, value in found.items() if key.startswith(("general.", "quantize."))}
    assert keys == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": keys["general.name"],
        "general.size_label": keys["general.size_label"],
        "general.file_type": LlamaFileType.MOSTLY_Q2_K,
        "general.quantization_version": 2,
        "general.license": "other",
        "general.license.name": "küche-1.0",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 2,
        "general.base_model.0.name": "Tiny Base",
        "general.base_model.0.version": "v2",
        "general.base_model.0.organization": "Some Org",
        "general.base_model.0.repo_url": "https://huggingface.co/some-org/tiny-base-v2",
        "general.base_model.1.name": "Other",
        "general.tags": ["text-generation", "tiny"],
        "general.languages": ["en", "no"],
        "general.quantized_by": "somebody",
        "quantize.imatrix.file": "measured/imatrix.gguf",
        "quantize.imatrix.dataset": "prose.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 7,
    }


def test_long_names_are_cut_as_llama_quantize_cuts_them(tmp_path: Path) -> None:
    origin = Origin(quantized_by="ü" * 99, imatrix=IMATRIX, imatrix_file="x" * 999)
    found = small(tmp_path / "x.gguf", {}, origin)
    assert (found["general.quantized_by"], found["quantize.imatrix.file"]) == ("ü" * 63, "x" * 127)


def test_the_size_does_not_depend_on_recipe_origin_or_types(tmp_path: Path) -> None:
    full = {"x": "y" * (room(FULL, tmp_path / "full.gguf") - len('{"x":""}'))}
    variants: list[tuple[dict[str, Any], Origin | None, str]] = [
        ({}, None, "q2_k"), (full, FULL, "q4_k"), ({"a": 1.5}, Origin(quantized_by=""), "f16"),
        ({"é": "“"}, FULL, "f32"), ({}, Origin(imatrix=IMATRIX), "q8_0"), ({}, Origin(CARD), "q6_k"),
    ]  # fmt: skip
    sizes = set()
    for number, (recipe, origin, kind) in enumerate(variants):
        types = {"blk.0.ffn_up.weight": TensorType(kind)}
        path = write(tmp_path / f"{number}.gguf", spec_of("llama", 4), TOKENIZER, types, recipe, origin)
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1


@pytest.mark.parametrize(("letter", "letter_bytes"), [("y", 1), ("é", 2)])
def test_a_longer_recipe_is_refused(letter: str, letter_bytes: int, tmp_path: Path) -> None:
    fits = (room(FULL, tmp_path / "x.gguf") - len('{"x":""}')) // letter_bytes
    small(tmp_path / "fits.gguf", {"x": letter * fits}, FULL)
    with pytest.raises(ConversionError, match=f"{ORIGIN_BYTES} are the limit"):
        small(tmp_path / "y.gguf", {"x": letter * (fits + 1)}, FULL)
    assert fits * letter_bytes > 1500


@pytest.mark.parametrize("name", ["Phi-3-mini-llamafied", "my_phi3", "modern-bert"])
def test_a_name_that_changes_tokens_is_refused(name: str) -> None:
    with pytest.raises(ConversionError, match="rename"):
        add_metadata(GGUFWriter(None, "llama"), spec_of("llama", 4, name), TOKENIZER, ONE, {})


def test_the_file_type_is_what_most_weights_are(checkpoints: dict[str, Path]) -> None:
    spec = read_model(checkpoints["llama"])
    two, four = TensorType.Q2_K, TensorType.Q4_K
    for kinds, expected in [([two, two, four], "MOSTLY_Q2_K"), ([four, two, four], "MOSTLY_Q4_K_S")]:
        assert file_type(spec, tensor_types(spec, kinds, TensorType.F16)) == LlamaFileType[expected]
    for kind in TensorType:
        name = file_type(spec, tensor_types(spec, [kind] * 3, two)).name
        assert name.removeprefix("ALL_").removeprefix("MOSTLY_").removesuffix("_S").lower() == kind


def test_chat_templates(tmp_path: Path) -> None:
    templates = {"tool_use": "T", "default": "D", "rag": "R"}
    found = small(tmp_path / "x.gguf", chat_templates=templates)
    assert found["tokenizer.chat_template"] == "D"
    assert found["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert (found["tokenizer.chat_template.rag"], found["tokenizer.chat_template.tool_use"]) == ("R", "T")
    assert not any("chat" in key for key in small(tmp_path / "y.gguf"))


def test_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Also where the order of sets differs from process to process."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import runpy;"
        "test = runpy.run_path(sys.argv[3]);"
        "test['small'](Path(sys.argv[1]), chat_templates={name: name for name in 'abcdefgh'})"
    )
    files = []
    for seed in ("1", "2"):
        files.append(tmp_path / f"{seed}.gguf")
        arguments = [str(files[-1]), str(Path(__file__).parents[1]), __file__]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={"PYTHONHASHSEED": seed})
    assert files[0].read_bytes() == files[1].read_bytes()
