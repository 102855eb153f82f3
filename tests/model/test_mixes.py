"""The stock mixes against llama.cpp's own quantiser, asked without quantising anything."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoints import ARCHITECTURES

from impq_edge.conversion.layout import plan_gguf
from impq_edge.conversion.tokenizer import Tokenizer
from impq_edge.errors import ModelError
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters
from impq_edge.model.mixes import STOCK_MIXES, stock_types
from impq_edge.model.shapes import NO_CONTENT, find_shapes, shipped_names
from impq_edge.model.spec import ModelSpec, implied_inventory

# A dry run reads no weight, so that a sparse file of any size will do. llama.cpp counts in static state and aborts on
# what it does not like: a process of its own.
SCRIPT = """
import ctypes, json, sys
from llama_cpp import llama_cpp as api
text = []
callback = api.llama_log_callback(lambda level, piece, data: text.append(piece.decode()))
api.llama_log_set(callback, ctypes.c_void_p(0))
told = {}
for mix in sys.argv[2:]:
    settings = api.llama_model_quantize_default_params()
    settings.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{mix}")
    settings.dry_run = True
    text.clear()
    assert api.llama_model_quantize(sys.argv[1].encode(), b"never-written", ctypes.byref(settings)) == 0, "".join(text)
    told[mix] = "".join(text)
print(json.dumps(told))
"""
LINE = re.compile(r"\] +(\S+) +- \[.*?\], type = +(\w+), (?:warning.*)?size = .*?(?:\((\w+)\))?$", re.MULTILINE)
TOKENIZER = Tokenizer(
    model="gpt2", pre="default", tokens=("a",), types=(gguf.TokenType.NORMAL,), scores=None, merges=(),
    special_ids={}, add_bos=False, add_eos=False, add_space_prefix=False, chat_templates={},
)  # fmt: skip

LLAMA = find_shapes("Llama-3.2-1B").spec.hyperparameters
SMALL = {"hidden": 512, "ffn": 1024, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "vocabulary": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped by 4": {"n_kv_heads": 2, "n_blocks": 17},
    "grouped by 3": {"n_heads": 6, "n_kv_heads": 2, "n_blocks": 7},
    "untied": {"tied_embeddings": False, "n_blocks": 33},
    "rows of 576": {"hidden": 576, "ffn": 1536, "n_heads": 9, "n_kv_heads": 3, "n_blocks": 30},
    "rows of 576, untied": {"hidden": 576, "ffn": 1536, "n_heads": 9, "n_kv_heads": 3, "tied_embeddings": False,
                            "n_blocks": 9},
    "rows of 80": {"hidden": 80, "ffn": 208, "n_heads": 5, "n_kv_heads": 1, "head_dim": 16, "n_blocks": 8},
    "as many blocks as a 70B": {"n_blocks": 80},
}  # fmt: skip


def asked(spec: ModelSpec, folder: Path, *mixes: str) -> dict[str, dict[str, str]]:
    """Return what llama.cpp's quantiser would store every tensor in, by mix and name."""
    types = {t.gguf_name: TensorType.F32 if t.role == "vector" else TensorType.F16 for t in spec.tensors}
    (piece,) = plan_gguf(spec, TOKENIZER, types, {}).pieces
    path = folder / "sparse.gguf"
    with path.open("wb") as file:
        file.write(piece.header)
        file.truncate(piece.file_bytes)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, *mixes], check=True, capture_output=True, text=True, cwd=folder
    )
    path.unlink()
    found = {}
    for mix, text in json.loads(done.stdout).items():
        found[mix] = {name: (new or old).lower() for name, old, new in LINE.findall(text)}
    return found


def check(spec: ModelSpec, folder: Path) -> None:
    for mix, types in asked(spec, folder, *STOCK_MIXES).items():
        assert stock_types(spec, mix) == types, mix


def spec_of(name: str, hyper: HyperParameters) -> ModelSpec:
    return ModelSpec(name, hyper, implied_inventory(hyper), NO_CONTENT)


@pytest.mark.parametrize("name", shipped_names())
def test_the_models_that_ship(name: str, tmp_path: Path) -> None:
    check(find_shapes(name).spec, tmp_path)


@pytest.mark.parametrize("name", SHAPES)
def test_rules_by_heads_blocks_and_rows(name: str, tmp_path: Path) -> None:
    check(spec_of(name, dataclasses.replace(LLAMA, **{**SMALL, **SHAPES[name]})), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trained_models(architecture: str, trained: Any, tmp_path: Path) -> None:
    check(find_shapes(str(trained(architecture))).spec, tmp_path)


def test_an_unknown_mix_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="'Q9_K' is not one of Q2_K, Q2_K_S"):
        stock_types(find_shapes("Qwen3-0.6B").spec, "Q9_K")
