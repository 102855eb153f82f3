"""A converted model computes what the checkpoint computes: logits in llama.cpp against transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint

import impq_edge
from impq_edge.data import data_path
from impq_edge.model.calibration import read_windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model
from impq_edge.validation.llama import Engine
from impq_edge.validation.settings import RunSettings


def llama_cpp_logits(gguf: Path, windows: np.ndarray) -> np.ndarray:
    """Logits of every position with an F32 cache, shape (windows, tokens, vocabulary)."""
    length = windows.shape[1]
    settings = RunSettings(
        context_tokens=length, threads=2, batch_tokens=length, ubatch_tokens=length, outputs_tokens=length,
        kv_type="f32", flash_attention=False, use_extra_bufts=False,
    )  # fmt: skip
    rows = []
    with Engine(gguf, settings) as engine:
        for window in windows:
            engine.clear()
            rows.append(engine.decode(window.astype(np.int32), outputs=length))
    return np.stack(rows)


def transformers_logits(directory: Path, windows: np.ndarray) -> np.ndarray:
    model = load_model(directory, read_model(directory), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(windows), use_cache=False).logits.float().numpy()


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean Σ p (log p − log q) over positions, in float64."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_models(trained: Callable[[str], Path], tmp_path: Path, architecture: str) -> None:
    """2,048 tokens in windows of 1,024: twice Gemma's sliding window, and past Llama's original context."""
    directory = trained(architecture)
    windows = read_windows(directory, data_path("demo", "evaluation.txt"), 2048, 1024).tokens
    reference = transformers_logits(directory, windows)
    for kind, limit in (("f32", 2e-6), ("f16", 2e-4)):
        out = tmp_path / f"{kind}.gguf"
        impq_edge.convert(str(directory), type=kind, out=out)
        assert mean_kl(reference, llama_cpp_logits(out, windows)) < limit


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_scaling": None, "head_dim": 32}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"num_key_value_heads": 4}),
        ("gemma2", {"sliding_window": 32, "num_key_value_heads": 1}),
    ],
)
def test_variants_of_the_architectures(tmp_path: Path, architecture: str, changes: dict[str, object]) -> None:
    """Random weights with large norms and biases, where a wrong permutation or a forgotten norm is a large error."""
    directory = make_checkpoint(tmp_path / "model", architecture, **changes)
    windows = np.random.default_rng(0).integers(10, 8000, size=(2, 200))
    out = tmp_path / "f32.gguf"
    impq_edge.convert(str(directory), type="f32", out=out)
    assert mean_kl(transformers_logits(directory, windows), llama_cpp_logits(out, windows)) < 2e-6


def test_the_newer_form_of_the_configuration(tmp_path: Path) -> None:
    """A checkpoint as transformers 5 saves it (``rope_parameters``, ``dtype``) converts to the same model."""
    from transformers import AutoModelForCausalLM

    old = make_checkpoint(tmp_path / "old", "llama")
    new = tmp_path / "new"
    AutoModelForCausalLM.from_pretrained(old, dtype=torch.bfloat16).save_pretrained(new)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (new / file).write_bytes((old / file).read_bytes())
    assert "rope_parameters" in (new / "config.json").read_text()
    assert read_model(new).hyperparameters == read_model(old).hyperparameters
    windows = np.random.default_rng(0).integers(10, 8000, size=(1, 64))
    logits = []
    for directory in (old, new):
        impq_edge.convert(str(directory), type="f32", out=tmp_path / "m.gguf")
        logits.append(llama_cpp_logits(tmp_path / "m.gguf", windows))
    assert np.array_equal(*logits)
