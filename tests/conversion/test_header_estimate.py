"""The size of a GGUF's header without a tokenizer, against the header itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import ARCHITECTURES, TINY, TOKENIZERS, make_checkpoint

from impq_edge.conversion.layout import estimated_header_bytes, header_bytes
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.model.shapes import find_shapes, shipped_shapes
from impq_edge.model.vocabulary import count_vocabulary, guess_vocabulary

CHAT_TEMPLATE_BYTES = 4096  # what is left out of the estimate


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counted_strings_miss_only_the_chat_template(
    architecture: str, checkpoints: dict[str, Path], trained: Callable[[str], Path]
) -> None:
    for directory in (checkpoints[architecture], trained(architecture)):
        shapes = find_shapes(str(directory))
        hyper = shapes.spec.hyperparameters
        exact = header_bytes(shapes.spec, read_tokenizer(directory, hyper.vocabulary, hyper.architecture))
        estimate = estimated_header_bytes(shapes.spec, shapes.vocabulary)
        assert shapes.vocabulary_known and abs(estimate - exact) < CHAT_TEMPLATE_BYTES
        assert estimate == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_guess_is_of_the_right_size(architecture: str) -> None:
    hyper = find_shapes("demo").spec.hyperparameters
    counted = count_vocabulary(TOKENIZERS / TINY[architecture], hyper)
    assert counted is not None
    guessed = guess_vocabulary(hyper)
    assert guessed.tokens_bytes == pytest.approx(counted.tokens_bytes, rel=0.4)


def test_guesses_of_the_vocabularies_that_ship_cost_less_than_a_percent_of_a_file() -> None:
    for shipped in shipped_shapes():
        spec = find_shapes(shipped.model).spec
        guessed = estimated_header_bytes(spec, guess_vocabulary(spec.hyperparameters))
        known = estimated_header_bytes(spec, shipped.vocabulary)
        assert abs(guessed - known) < 0.01 * spec.weights * 4.5 / 8, shipped.model


def test_free_ids_are_counted_as_padding(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "padded", "llama", vocab_size=8320)
    shapes = find_shapes(str(directory))
    exact = header_bytes(shapes.spec, read_tokenizer(directory, 8320, "llama"))
    assert abs(estimated_header_bytes(shapes.spec, shapes.vocabulary) - exact) < CHAT_TEMPLATE_BYTES


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": 0}, "merges": 7}}']
)
def test_a_tokenizer_of_another_form_is_not_counted(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert count_vocabulary(tmp_path, find_shapes("demo").spec.hyperparameters) is None
