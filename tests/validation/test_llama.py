from pathlib import Path

import gguf
import numpy as np
import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation.llama import Engine, log_lines
from impq_edge.validation.settings import RunSettings

SETTINGS = RunSettings(context_tokens=256, threads=1, outputs_tokens=64, kv_type="f32", flash_attention=False)
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(params=["llama", "qwen3", "gemma2"])
def engine(request: pytest.FixtureRequest, tiny_ggufs: dict[str, Path]) -> Engine:
    made = Engine(tiny_ggufs[request.param], SETTINGS)
    request.addfinalizer(made.close)
    return made


def test_text_survives_the_tokenizer(engine: Engine) -> None:
    tokens = engine.tokenize(TEXT, add_special=False)
    assert engine.text(tokens.tolist()).strip() == TEXT


def test_bos_is_added_where_the_vocabulary_wants_it(engine: Engine) -> None:
    bare, special = engine.tokenize(TEXT, add_special=False), engine.tokenize(TEXT, add_special=True)
    assert special.tolist() == ([engine.bos] if engine.adds_bos else []) + bare.tolist()


def test_special_tokens_in_text_are_text_unless_asked_for(engine: Engine) -> None:
    end = engine.special_text(engine.eos)
    assert engine.eos not in engine.tokenize(f"a{end}b", add_special=False)
    assert engine.eos in engine.tokenize(f"a{end}b", add_special=False, parse_special=True)


def test_logits_do_not_depend_on_how_the_tokens_arrive(engine: Engine) -> None:
    tokens = engine.tokenize(TEXT, add_special=True)
    at_once = engine.decode(tokens, outputs=len(tokens))
    engine.clear()
    one_by_one = np.concatenate([engine.decode([token]) for token in tokens])
    engine.clear()
    engine.decode(tokens[:5], outputs=0)
    in_two = engine.decode(tokens[5:], outputs=3)
    assert at_once.shape == (len(tokens), engine.vocabulary)
    scale = np.abs(at_once).max()
    np.testing.assert_allclose(one_by_one / scale, at_once / scale, atol=2e-3)
    np.testing.assert_allclose(in_two / scale, at_once[-3:] / scale, atol=2e-3)


def test_batches_are_cut_to_the_setting(tiny_ggufs: dict[str, Path]) -> None:
    settings = RunSettings(context_tokens=256, threads=1, batch_tokens=8, ubatch_tokens=8, outputs_tokens=8)
    with Engine(tiny_ggufs["llama"], settings) as small, Engine(tiny_ggufs["llama"], SETTINGS) as large:
        tokens = small.tokenize(TEXT, add_special=True)
        one, other = small.decode(tokens, outputs=8), large.decode(tokens, outputs=8)
    assert len(tokens) > 8
    np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(other).max())


def test_generation_is_greedy(engine: Engine) -> None:
    tokens = engine.tokenize(TEXT, add_special=True)
    written = engine.generate(tokens, 4).tokens
    engine.clear()
    again: list[int] = []
    for _ in range(4):
        engine.clear()
        again.append(int(engine.decode([*tokens, *again])[-1].argmax()))
    assert list(written) == again


def test_more_tokens_than_the_context_are_refused(engine: Engine) -> None:
    engine.decode(np.zeros(200, np.int32))
    with pytest.raises(ValidationError, match="260 tokens do not fit the context of 256"):
        engine.decode(np.zeros(60, np.int32))


def test_the_log_is_kept_rather_than_printed(tiny_ggufs: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    Engine(tiny_ggufs["llama"], SETTINGS).close()
    assert capfd.readouterr() == ("", "")
    assert any("KV buffer size" in line for line in log_lines())


def test_a_quantised_cache_needs_flash_attention(tiny_ggufs: dict[str, Path]) -> None:
    settings = RunSettings(context_tokens=256, threads=1, kv_type="q8_0", flash_attention=False)
    with pytest.raises(ValidationError, match=r"q8_0 cache: .*choose"):
        Engine(tiny_ggufs["llama"], settings)


def test_a_sound_header_without_a_model_is_told_in_llama_cpp_s_words(tmp_path: Path) -> None:
    path = tmp_path / "hollow.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValidationError, match=r"cannot load .*llama.context_length"):
        Engine(path, SETTINGS)
