"""What a checkpoint's model card says of licence, origin and use: the YAML at the head of its README.md.

Nobody has vouched for a card, and no build may fail for one: what is malformed or too long is left out and told.
The conventions of the keys are those of ``gguf.metadata`` (llama.cpp's gguf-py), as in ``convert_hf_to_gguf.py``.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from gguf import Keys
from gguf.metadata import Metadata

Value = str | int | tuple[str, ...]
"""What a key of a GGUF holds here; a whole number is stored as uint32."""

CARD_FILE = "README.md"
CARD_BYTES = 2048
"""The keys of a card take no more in a GGUF: tags are left out first, the licence last."""

_MAX_FRONT_MATTER_BYTES = 1 << 18  # hub cards with long tables of results stay below
_MAX_TEXT_BYTES = 256
_MAX_ITEMS = 256
_SHOWN_CHARACTERS = 120  # of a parser's complaint
_NOTHING = {"", "null", "~"}
_MODEL_ID = re.compile(r"(https?://)?[A-Za-z0-9][\w.-]*(/[\w.-]+)*", re.ASCII)
_DROPPED_FIRST = ("tags", "languages", "base_models", "license_link", "license_name")


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model that the checkpoint derives from."""

    name: str | None = None
    version: str | None = None
    organization: str | None = None
    repo_url: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a GGUF repeats of a card; empty where there is none."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: tuple[BaseModel, ...] = ()
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def keys(self) -> dict[str, Value]:
        """Return the GGUF's keys and values."""
        general = Keys.General
        found: dict[str, Value | None] = {
            general.LICENSE: self.license,
            general.LICENSE_NAME: self.license_name,
            general.LICENSE_LINK: self.license_link,
            general.BASE_MODEL_COUNT: len(self.base_models) or None,
        }
        for index, model in enumerate(self.base_models):
            for key, value in dataclasses.asdict(model).items():
                found[getattr(general, f"BASE_MODEL_{key.upper()}").format(id=index)] = value
        found |= {general.TAGS: self.tags or None, general.LANGUAGES: self.languages or None}
        return {key: value for key, value in found.items() if value is not None}


def key_bytes(key: str, value: Value) -> int:
    """Return the bytes that a key and its value take in a GGUF: name, type, value (ggml/include/gguf.h)."""
    if isinstance(value, int):
        size = 4
    elif isinstance(value, str):
        size = 8 + len(value.encode())
    else:
        size = 4 + 8 + sum(8 + len(item.encode()) for item in value)
    return 8 + len(key.encode()) + 4 + size


def read_card(directory: Path) -> tuple[ModelCard, str]:
    """Read the card of a checkpoint.

    Returns
    -------
    What it says, as far as it can be used, and a sentence on what was left out; empty where that is nothing.
    """
    path = directory / CARD_FILE
    if not path.is_file():
        return ModelCard(), ""
    try:
        text = _front_matter(path)
        data = yaml.load(text, _TextLoader) if text else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return ModelCard(), _ignored(path, " ".join(str(error).split())[:_SHOWN_CHARACTERS])
    if not isinstance(data, dict):
        return ModelCard(), _ignored(path, "its head is no list of keys and values")
    card = _card(data)
    fitted = _fitted(card)
    if fitted == card:
        return card, ""
    return fitted, (
        f"{path} has {_size_bytes(card)} bytes for the GGUF, which takes {CARD_BYTES}; some of its "
        f"{', '.join(name for name in _DROPPED_FIRST if getattr(fitted, name) != getattr(card, name))} are left out."
    )


class _TextLoader(yaml.BaseLoader):  # type: ignore[misc]
    """Every scalar is text: no dates, no numbers of a million digits, and Norway's "no" stays a language.

    Without aliases, which let a short text stand for a huge one.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def _front_matter(path: Path) -> str:
    """Return what stands between the first line and the next of three dashes; empty where there are none."""
    with path.open("rb") as file:
        head = file.read(_MAX_FRONT_MATTER_BYTES + 1)
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not lines or lines[0].rstrip() != b"---":
        return ""
    ends = (index for index, line in enumerate(lines) if index and line.rstrip() == b"---")
    end = next(ends, None)
    if end is None:
        raise ValueError(f"its head has no end within {_MAX_FRONT_MATTER_BYTES} bytes")
    return b"\n".join(lines[1:end]).decode("utf-8").replace("\t", "  ")  # tabs, which YAML forbids, do occur


def _card(data: dict[Any, Any]) -> ModelCard:
    """Let gguf-py interpret what is plain, short text."""
    plain: dict[str, Any] = {
        key: list(_texts(data.get(key)))
        for key in ("base_model", "base_models", "base_model_sources", "tags", "pipeline_tag", "languages", "language")
    }
    for key in ("base_model", "base_models", "base_model_sources"):
        plain[key] = [text for text in plain[key] if _MODEL_ID.fullmatch(text)]  # not a path on somebody's disk
    plain = {key: texts for key, texts in plain.items() if texts}
    for key in ("license", "license_name", "license_link"):
        joined = ",".join(_texts(data.get(key)))
        if joined and len(joined.encode()) <= _MAX_TEXT_BYTES:
            plain[key] = joined
    found = Metadata.apply_metadata_heuristic(Metadata(), plain, None, None, 0)
    return ModelCard(
        license=found.license,
        license_name=found.license_name,
        license_link=found.license_link,
        base_models=tuple(
            BaseModel(**{field.name: model.get(field.name) for field in dataclasses.fields(BaseModel)})
            for model in found.base_models or ()
        ),
        tags=tuple(dict.fromkeys(found.tags or ())),
        languages=tuple(dict.fromkeys(found.languages or ())),
    )


def _texts(value: object) -> tuple[str, ...]:
    """Return the usable texts of a value that may be one or a list of them."""
    items = value if isinstance(value, list) else [value]
    texts = [item.strip() for item in items[:_MAX_ITEMS] if isinstance(item, str)]
    return tuple(
        text for text in texts if text not in _NOTHING and text.isprintable() and len(text.encode()) <= _MAX_TEXT_BYTES
    )


def _fitted(card: ModelCard) -> ModelCard:
    """Leave out what takes more than :data:`CARD_BYTES`, the last of a list first."""
    for name in _DROPPED_FIRST:
        while getattr(card, name) and _size_bytes(card) > CARD_BYTES:
            value: Any = getattr(card, name)
            shorter: Any = value[:-1] if isinstance(value, tuple) else None
            card = dataclasses.replace(card, **{name: shorter})
    return card


def _size_bytes(card: ModelCard) -> int:
    return sum(key_bytes(key, value) for key, value in card.keys().items())


def _ignored(path: Path, why: str) -> str:
    return f"{path} cannot be read ({why}); the GGUF tells neither licence nor origin."
