"""What the tokenizer files of a checkpoint say, merged as transformers merges them."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from impq_edge.errors import ModelError
from impq_edge.records import from_json, has_half_pair, parse, read_text, shown, shown_text

Merge = tuple[str, str]

_LOOSE = pydantic.ConfigDict(extra="ignore")  # these files are transformers', and grow fields that decide no id


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the model sees it."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    content: str
    id: pydantic.StrictInt = -1  # tokenizer_config.json has it as the key instead
    special: bool = False
    normalized: bool = True  # found after the normaliser, so in a text whose spaces may be visible
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class BpeModel:
    """The model of ``tokenizer.json``."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    vocab: dict[str, pydantic.StrictInt]
    merges: list[Merge | str]
    unk_token: str | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """The parts of ``tokenizer.json`` that decide ids."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    model: BpeModel
    added_tokens: list[AddedToken] = dataclasses.field(default_factory=list)
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _NamedTemplate:
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    name: str
    template: str


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The parts of ``tokenizer_config.json`` that decide ids, and the chat templates."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    named: dict[str, str]  # "bos", "eos", … → the token's text
    extra_special_tokens: list[str]
    added_tokens_decoder: dict[int, AddedToken] = dataclasses.field(default_factory=dict)
    chat_template: str | list[_NamedTemplate] | None = None


@dataclasses.dataclass(frozen=True)
class _TokenIds:
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    ids: list[pydantic.StrictInt]


@dataclasses.dataclass(frozen=True)
class _Template:
    """A TemplateProcessing of ``tokenizer.json``."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = _LOOSE

    single: list[dict[Literal["SpecialToken", "Sequence"], dict[str, Any]]]
    special_tokens: dict[str, _TokenIds] = dataclasses.field(default_factory=dict)


def read_file(path: Path) -> TokenizerFile:
    """Read ``tokenizer.json``; anything but a BPE is refused."""
    if not path.exists():
        found = "only tokenizer.model" if path.with_name("tokenizer.model").exists() else "no tokenizer"
        raise ModelError(
            f"{path.parent} has {found}, and tokenizer.json is needed; write one there with transformers' "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
        )
    data = read_object(path)
    model = data.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE":
        raise refusal(path, f"its model is {shown(kind)}, and only 'BPE' can be converted")
    return parse(TokenizerFile, data, path)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        value = from_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({shown_text(str(error))}); download the checkpoint again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object; download the checkpoint again.")
    return value


def read_settings(directory: Path) -> TokenizerSettings:
    """Read ``tokenizer_config.json`` and, where it is of the older form, ``special_tokens_map.json``."""
    path = directory / "tokenizer_config.json"
    config = read_object(path)
    if "added_tokens_decoder" not in config:
        config |= read_object(directory / "special_tokens_map.json")
    named = {key.removesuffix("_token"): _text(value) for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = list(extra.values()) if isinstance(extra, dict) else extra
    config["named"] = {name: text for name, text in named.items() if text is not None}
    config["extra_special_tokens"] = [_text(value) for value in listed] if isinstance(listed, list) else listed
    return parse(TokenizerSettings, config, path)


def _text(token: object) -> object:
    """Return the text of a token written as such or as an object; None for a setting that names no token."""
    if isinstance(token, bool):  # add_bos_token
        return None
    return token.get("content") if isinstance(token, dict) else token


def read_chat_templates(directory: Path, settings: TokenizerSettings) -> dict[str, str]:
    """Return the chat templates by name; files of their own count before ``tokenizer_config.json``."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    found = {name: read_text(path) for name, path in files.items() if path.exists()}
    if found:
        return found
    given = settings.chat_template or []
    named = {"default": given} if isinstance(given, str) else {choice.name: choice.template for choice in given}
    for name, template in named.items():
        if has_half_pair(name + template):
            raise ModelError(
                f"{directory / 'tokenizer_config.json'}: chat template {shown(name)} is no Unicode; remove it."
            )
    return named


def merge_added_tokens(file: TokenizerFile, settings: TokenizerSettings, path: Path) -> dict[int, AddedToken]:
    """Return the tokens that are found in the text itself, by id.

    ``tokenizer_config.json`` counts before ``tokenizer.json``, and a token that it names is special.
    """
    added = {token.id: token for token in file.added_tokens}
    added |= {i: dataclasses.replace(token, id=i) for i, token in settings.added_tokens_decoder.items()}
    ids = file.model.vocab | {token.content: token.id for token in added.values()}
    for text in [*settings.named.values(), *settings.extra_special_tokens]:
        if text not in ids:
            raise ModelError(
                f"tokenizer_config.json names the token {shown(text)}, which {path} does not hold; remove or add it."
            )
        known = added.get(ids[text], AddedToken(text, ids[text], normalized=False))
        added[known.id] = dataclasses.replace(known, special=True)
    return added


def added_around(post_processor: dict[str, Any] | None, path: Path) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in components(post_processor, "processors"):
        kind = step.get("type")
        if kind == "ByteLevel":  # changes offsets, no ids
            continue
        if kind != "TemplateProcessing":
            raise refusal(path, f"its post_processor is {shown(kind)}")
        template = parse(_Template, step, path)
        if sum("Sequence" in piece for piece in template.single) != 1:
            raise refusal(path, "its post_processor does not hold the text once")
        place = before
        for piece in template.single:
            if "SpecialToken" in piece:
                token = template.special_tokens.get(str(piece["SpecialToken"].get("id")))
                place.extend(token.ids if token else [])
            else:
                place = after
    return before, after


def components(component: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the parts of a normaliser, pre-tokenizer or post-processor in order, sequences taken apart."""
    parts: list[dict[str, Any]] = []
    waiting: list[Any] = [component] if component is not None else []
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            parts.append({})
        elif part.get("type") == "Sequence" and isinstance(part.get(inner), list):
            waiting.extend(reversed(part[inner]))
        else:
            parts.append(part)
    return parts


def refusal(path: Path, reason: str) -> ModelError:
    """Return the error for a tokenizer that llama.cpp would not follow."""
    return ModelError(f"llama.cpp cannot reproduce {path}: {reason}; this tokenizer cannot be converted.")
