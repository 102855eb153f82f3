import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from impq_edge.validation.chat import MESSAGE, render, try_chat
from impq_edge.validation.llama import Engine
from impq_edge.validation.results import ChatTrial
from impq_edge.validation.settings import RunSettings

SETTINGS = RunSettings(context_tokens=256, threads=1)
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture
def with_template(tiny_ggufs: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return the random llama with a chat template and, if given, another end-of-sequence token."""

    def make(template: str, eos: int | None = None) -> Path:
        out = tmp_path / "chat.gguf"
        command = ["-m", "gguf.scripts.gguf_new_metadata", "--force", "--chat-template", template]
        command += ["--special-token-by-id", "eos", str(eos)] if eos is not None else []
        subprocess.run([sys.executable, *command, str(tiny_ggufs["llama"]), str(out)], check=True, capture_output=True)
        return out

    return make


def chat(path: Path, limit_tokens: int = 8) -> ChatTrial:
    with Engine(path, SETTINGS) as engine:
        return try_chat(engine, limit_tokens)


def test_a_file_without_a_template_is_not_asked(tiny_ggufs: dict[str, Path]) -> None:
    trial = chat(tiny_ggufs["llama"])
    assert (trial.text, trial.stopped) == (None, None)
    assert "no chat template" in trial.reason


def test_an_answer_at_the_limit_has_not_stopped(with_template: Callable[..., Path]) -> None:
    trial = chat(with_template(PLAIN))
    assert (trial.stopped, trial.tokens, trial.reason) == (False, 8, "")
    assert trial.text


def test_an_answer_ends_at_an_end_of_generation_token(with_template: Callable[..., Path]) -> None:
    with Engine(with_template(PLAIN), SETTINGS) as engine:
        prompt = engine.tokenize(render(PLAIN, engine), add_special=False, parse_special=True)
        written = engine.generate(prompt, 8).tokens
    trial = chat(with_template(PLAIN, eos=written[-1]))
    assert trial.stopped is True
    assert trial.tokens == written.index(written[-1])


def test_a_template_is_rendered_with_the_message_and_the_special_tokens(with_template: Callable[..., Path]) -> None:
    with Engine(with_template(PLAIN), SETTINGS) as engine:
        text = render(PLAIN, engine)
        tokens = engine.tokenize(text, add_special=False, parse_special=True)
        assert text == f"{engine.special_text(engine.bos)}user: {MESSAGE}\nassistant:"
        assert tokens.tolist().count(engine.bos) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('system message missing') }}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "{{ messages['x'].y.z }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_fails_the_trial_alone(
    with_template: Callable[..., Path], template: str
) -> None:
    trial = chat(with_template(template))
    assert trial.stopped is False
    assert trial.reason.startswith("the chat template cannot be rendered: ")


def test_a_prompt_longer_than_the_context_is_not_asked(with_template: Callable[..., Path]) -> None:
    trial = chat(with_template("{{ 'word ' * 500 }}"))
    assert trial.stopped is None
    assert "no room" in trial.reason
