"""Blocks that are loaded one at a time, against the whole model as transformers loads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model
from impq_edge.spqe.walk import open_walk

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(10, 8000, size=(3, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("qwen3", {"shards": 2}),
        ("gemma2", {"hidden_size": 512}),  # its square root, by which embeddings are scaled, is not exact in bfloat16
    ],
)
def test_a_walk_is_the_whole_model(tmp_path: Path, architecture: str, changes: dict, dtype: torch.dtype) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture, **changes)
    spec = read_model(directory)
    whole = load_model(directory, spec, CPU, dtype)
    with torch.inference_mode():
        expected = whole.model(input_ids=torch.from_numpy(TOKENS), use_cache=False).last_hidden_state[:, :-1]
    walk = open_walk(directory, spec, Windows(TOKENS, ""), CPU, dtype)
    assert all(parameter.is_meta for parameter in walk.outside.model.layers.parameters())
    hidden = walk.embedded
    with torch.inference_mode():
        for block in range(spec.n_blocks):
            layer = walk.take(block)
            hidden = [walk.run(layer, block, batch) for batch in hidden]
        assert torch.equal(walk.entering_head(hidden[0]), expected.flatten(0, 1))
        assert all(torch.equal(*pair) for pair in zip(walk.embed(), walk.embedded, strict=True))
