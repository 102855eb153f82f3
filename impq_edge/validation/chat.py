"""Whether a model answers through its chat template and stops by itself."""

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from impq_edge.validation.llama import Engine
from impq_edge.validation.results import ChatTrial

MESSAGE = "Say hello in one short sentence."

# A template is code nobody has vouched for: the formatter runs it in Jinja's immutable sandbox, and it
# may raise whatever Python operators raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


def try_chat(engine: Engine, limit_tokens: int) -> ChatTrial:
    """Ask for one short sentence, greedily, and see whether the model ends its turn."""
    template = engine.chat_template
    if template is None:
        return ChatTrial(None, None, 0, "the file has no chat template")
    try:
        prompt = render(template, engine)
    except _TEMPLATE_ERRORS as error:
        return ChatTrial(None, False, 0, f"the chat template cannot be rendered: {type(error).__name__}: {error}")
    # Templates write BOS themselves; where one does not, the vocabulary's wish counts.
    bos = engine.special_text(engine.bos)
    tokens = engine.tokenize(prompt, add_special=not (bos and prompt.startswith(bos)), parse_special=True)
    room = engine.settings.context_tokens - limit_tokens
    if len(tokens) > room:
        return ChatTrial(None, None, 0, f"its prompt of {len(tokens)} tokens leaves no room in the context")
    engine.clear()
    answer = engine.generate(tokens, limit_tokens)
    return ChatTrial(engine.text(answer.tokens), answer.stopped, len(answer.tokens), "")


def render(template: str, engine: Engine) -> str:
    """Render one user message with the generation prompt, as transformers would."""
    formatter = Jinja2ChatFormatter(
        template, eos_token=engine.special_text(engine.eos), bos_token=engine.special_text(engine.bos)
    )
    # Reasoning models otherwise think for longer than the trial lasts; other templates ignore the name.
    response = formatter(messages=[{"role": "user", "content": MESSAGE}], enable_thinking=False)
    return str(response.prompt)
