"""Loss and divergence from one set of logits: the same whatever is kept, and what transformers would say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.model.calibration import Windows
from impq_edge.model.spec import read_model
from impq_edge.spqe.judge import Judge, probabilities_bytes
from impq_edge.spqe.walk import Hidden, Walk, open_walk

_ROUNDED = 5e-6
"""Nats per token by which two ways to the same divergence may differ: some steps of a float32 near 10, a loss."""

TOKENS = np.random.default_rng(3).integers(10, 8000, size=(5, 40))


@pytest.fixture(params=["llama", "gemma2"])
def walk(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Walk:
    directory = checkpoints[request.param]
    return open_walk(directory, read_model(directory), Windows(TOKENS, ""), torch.device("cpu"), torch.float32)


def passed(walk: Walk) -> Hidden:
    """What leaves the last block."""
    hidden = walk.embedded
    for block in range(walk.spec.n_blocks):
        layer = walk.take(block)
        hidden = [walk.run(layer, block, batch) for batch in hidden]
    return hidden


@torch.inference_mode()
def test_loss_and_divergence_are_those_of_all_logits(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_edge.spqe.walk.LOGITS_PER_CHUNK", 17 * walk.spec.hyperparameters.vocabulary)
    hidden = passed(walk)
    generator = torch.Generator().manual_seed(1)
    changed = [batch + 0.05 * torch.randn(batch.shape, generator=generator) for batch in hidden]
    reference = [walk.entering_head(batch) for batch in hidden]
    kept, anew = Judge(walk, reference), Judge(walk, reference, kept_bytes=probabilities_bytes(walk) - 1)
    losses, divergences = kept.judged(changed)
    for one, other in zip(kept.judged(changed), anew.judged(changed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses == pytest.approx(walk.losses(changed), rel=1e-6)  # float32: 1.2e-7 is one step
    (p, q) = (
        torch.cat([walk.logits(walk.entering_head(batch)).double().log_softmax(dim=1) for batch in text])
        for text in (hidden, changed)
    )
    expected = (p.exp() * (p - q)).sum(dim=1).view(len(TOKENS), -1).mean(dim=1).numpy()
    assert expected.min() > 1e-4
    assert divergences == pytest.approx(expected, abs=_ROUNDED)
    assert divergences == pytest.approx(walk.divergences(reference, changed), abs=_ROUNDED)
    assert kept.judged(hidden)[1] == pytest.approx(np.zeros(len(TOKENS)), abs=_ROUNDED)
