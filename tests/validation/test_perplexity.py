from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from impq_edge.data import data_path
from impq_edge.errors import ValidationError
from impq_edge.validation.llama import Engine
from impq_edge.validation.perplexity import measure_perplexity, nll, window_losses
from impq_edge.validation.settings import RunSettings

SETTINGS = RunSettings(context_tokens=512, threads=1, batch_tokens=512, ubatch_tokens=512, outputs_tokens=512)


@pytest.fixture(scope="module")
def text() -> str:
    return data_path("demo", "evaluation.txt").read_text("utf-8")


@pytest.fixture(params=["llama", "qwen3", "gemma2"])
def engine(request: pytest.FixtureRequest, tiny_ggufs: dict[str, Path]) -> Iterator[Engine]:
    with Engine(tiny_ggufs[request.param], SETTINGS) as made:
        yield made


def test_perplexity_is_that_of_the_full_logits(engine: Engine, text: str) -> None:
    result = measure_perplexity(engine, text, windows=2)
    tokens = engine.tokenize(text[:20_000], add_special=True)[:1024].reshape(2, 512)
    losses = []
    for window in tokens:
        inputs = window.copy()
        if engine.adds_bos:
            inputs[0] = engine.bos
        engine.clear()
        logits = engine.decode(inputs, outputs=512).astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        losses.append([-np.log(probabilities[at, window[at + 1]]) for at in range(256, 511)])
    expected = np.exp(np.mean(losses))
    assert result.scored_tokens == 2 * 255
    assert result.perplexity == pytest.approx(expected, rel=1e-3)
    assert result.window_nlls == pytest.approx(np.mean(losses, axis=1), rel=1e-3)
    # The standard error of a mean, carried to its exponential.
    assert result.stderr == pytest.approx(expected * np.std(losses, ddof=1) / np.sqrt(510), rel=1e-3)


def test_a_window_s_first_token_only_counts_without_bos(engine: Engine, text: str) -> None:
    window = engine.tokenize(text[:10_000], add_special=False)[:512]
    other = window.copy()
    other[0] = (window[0] + 1000) % 8000
    same = np.array_equal(window_losses(engine, window), window_losses(engine, other))
    assert same == engine.adds_bos


def test_windows_are_scored_independently(engine: Engine, text: str) -> None:
    tokens = engine.tokenize(text[:20_000], add_special=True)
    alone = window_losses(engine, tokens[512:1024])
    after_others = measure_perplexity(engine, text, windows=2).window_nlls[1]
    assert after_others == pytest.approx(alone.mean(), rel=1e-6)


def test_a_text_shorter_than_one_window_is_refused(engine: Engine) -> None:
    with pytest.raises(ValidationError, match=r"The text is \d+ tokens long, shorter than one window of 512"):
        measure_perplexity(engine, "Once upon a time", windows=1)


def test_a_text_of_fewer_windows_than_asked_for_is_scored_whole(engine: Engine, text: str) -> None:
    assert (
        len(measure_perplexity(engine, text[:6_000], windows=99).window_nlls)
        == len(engine.tokenize(text[:6_000], add_special=True)) // 512
    )


def test_nll_of_uniform_and_of_huge_logits() -> None:
    uniform = nll(np.full((1, 1000), 7.0, np.float32), np.array([3], np.int32))
    assert uniform == pytest.approx([np.log(1000)])
    huge = np.array([[3e38, 0.0], [0.0, 200.0]], np.float32)
    assert nll(huge, np.array([0, 0], np.int32)) == pytest.approx([0.0, 200.0])


def test_a_loss_that_is_not_finite_gives_no_perplexity(tiny_ggufs: dict[str, Path], tmp_path: Path, text: str) -> None:
    from impq_edge.validation.file import read_facts

    norm = next(t for t in read_facts(tiny_ggufs["llama"]).tensors if t.name == "output_norm.weight")
    broken = bytearray(tiny_ggufs["llama"].read_bytes())
    broken[norm.offset_bytes : norm.offset_bytes + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "broken.gguf").write_bytes(broken)
    with Engine(tmp_path / "broken.gguf", SETTINGS) as engine:
        result = measure_perplexity(engine, text, windows=2)
    assert (result.perplexity, result.stderr, result.window_nlls) == (None, None, ())


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "expected"), [("llama", 60.68), ("qwen3", 47.32), ("gemma2", 48.78)])
def test_the_trained_models_score_what_llama_perplexity_says(
    trained: Callable[[str], Path], tmp_path: Path, text: str, architecture: str, expected: float
) -> None:
    import impq_edge

    path = tmp_path / "f16.gguf"
    impq_edge.convert(str(trained(architecture)), type="f16", out=path)
    with Engine(path, SETTINGS) as engine:
        assert measure_perplexity(engine, text, windows=24).perplexity == pytest.approx(expected, abs=0.03)
