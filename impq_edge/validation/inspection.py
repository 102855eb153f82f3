"""What a GGUF says of itself, without loading it: any model's, from anywhere, on a machine that could not run it."""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pydantic
from gguf import Keys, LlamaFileType

from impq_edge.conversion.metadata import RECIPE_KEY
from impq_edge.errors import ValidationError
from impq_edge.ggml.header import Scalar, TensorFact, read_header
from impq_edge.ggml.split import SPLIT_COUNT, SPLIT_NO
from impq_edge.records import STRICT, Record
from impq_edge.validation.file import read_facts

_MAX_SHOWN_CHARACTERS = 200
_MAX_RECIPE_CHARACTERS = 1 << 16
_MAX_BASE_MODELS = 64
_TENSOR = re.compile(r"(?:blk\.\d+\.)?(?P<part>.+?)(?:\.weight)?")
_NORMS = "norms"
_ORDER = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
          "output")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The tensors that have the same part in every block, or outside the blocks."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    types: dict[str, int]  # type → number of tensors, the commonest first
    weights: int
    size_bytes: int  # of the data, without padding

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(self.types.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the data per weight."""
        return 8 * self.size_bytes / self.weights


@dataclasses.dataclass(frozen=True)
class Inspection(Record):
    """A GGUF's header for people; texts are the file's own, cut and without control characters."""

    SCHEMA: ClassVar[str] = "impq-edge.inspection/1"

    file: str  # its name
    file_bytes: int  # of all pieces that are there
    gguf_version: int
    name: str | None
    architecture: str | None
    license: str | None
    base_models: tuple[str, ...]
    file_type: str | None  # as llama.cpp calls what most tensors are
    quantized_by: str | None
    recipe: dict[str, str | int | float | bool | None] | None  # of impq-edge's files: how it was made
    context_tokens: int | None  # that the model was trained for
    chat_template: str | None  # its first line
    piece: int  # which of the pieces this file is, from 1
    pieces: int  # of a split GGUF; 1: it is whole
    note: str | None  # what of a split GGUF is not counted here, and why
    weights: int
    bits_per_weight: float | None  # of the files over all weights; None: there are no weights
    groups: tuple[TensorGroup, ...]


def inspect(path: Path) -> Inspection:
    """Read the header of a GGUF, or of all pieces where the first of them is given and the others are there.

    Raises
    ------
    ValidationError
        When the file is no sound GGUF.
    """
    header = read_header(path, ValidationError)
    keys, tensors, file_bytes, note = header.keys, header.tensors, header.file_bytes, None
    piece, pieces = _number(keys, SPLIT_NO, 0) + 1, max(1, _number(keys, SPLIT_COUNT, 1))
    if pieces > 1:
        try:
            facts = read_facts(path)
        except ValidationError as error:  # a later piece, or the others are not here
            note = f"Only this piece is counted: {error}"
        else:
            tensors, file_bytes = facts.tensors, facts.file_bytes
    weights = sum(tensor.weights for tensor in tensors)
    architecture = _text(keys, Keys.General.ARCHITECTURE)
    return Inspection(
        file=path.name,
        file_bytes=file_bytes,
        gguf_version=header.version,
        name=_text(keys, Keys.General.NAME),
        architecture=architecture,
        license=_joined(keys, Keys.General.LICENSE, Keys.General.LICENSE_NAME, Keys.General.LICENSE_LINK),
        base_models=_base_models(keys),
        file_type=_file_type(keys),
        quantized_by=_text(keys, Keys.General.QUANTIZED_BY),
        recipe=_recipe(keys),
        context_tokens=_number(keys, f"{architecture}.context_length", 0) or None,
        chat_template=_first_line(keys),
        piece=piece,
        pieces=pieces,
        note=note,
        weights=weights,
        bits_per_weight=8 * file_bytes / weights if weights else None,
        groups=group_tensors(tensors),
    )


def group_tensors(tensors: tuple[TensorFact, ...]) -> tuple[TensorGroup, ...]:
    """Group tensors by their part in a block; norms of all kinds are one group, the last."""
    members: dict[str, list[TensorFact]] = {}
    for tensor in tensors:
        members.setdefault(_group(tensor.name), []).append(tensor)
    rank = {name: index for index, name in enumerate(_ORDER)} | {_NORMS: len(_ORDER) + 1}
    return tuple(
        TensorGroup(
            name=name,
            types=dict(Counter(tensor.type for tensor in group).most_common()),
            weights=sum(tensor.weights for tensor in group),
            size_bytes=sum(tensor.size_bytes for tensor in group),
        )
        for name, group in sorted(members.items(), key=lambda item: (rank.get(item[0], len(_ORDER)), item[0]))
    )


def _group(name: str) -> str:
    found = _TENSOR.fullmatch(name)
    part = _shown(found["part"] if found else name)
    return _NORMS if part.endswith("norm") else part


def _shown(text: str) -> str:
    """Return text that a terminal takes for text: a file may hold its control sequences."""
    plain = "".join(character if character.isprintable() else "�" for character in text[:_MAX_SHOWN_CHARACTERS])
    return plain if len(text) <= _MAX_SHOWN_CHARACTERS else plain + "…"


def _text(keys: dict[str, Scalar], key: str) -> str | None:
    value = keys.get(key)
    return _shown(value) if isinstance(value, str) and value else None


def _number(keys: dict[str, Scalar], key: str, default: int) -> int:
    value = keys.get(key)
    return value if type(value) is int and value >= 0 else default


def _joined(keys: dict[str, Scalar], *names: str) -> str | None:
    return ", ".join(text for text in (_text(keys, name) for name in names) if text) or None


def _base_models(keys: dict[str, Scalar]) -> tuple[str, ...]:
    general, found = Keys.General, []
    for index in range(min(_number(keys, general.BASE_MODEL_COUNT, 0), _MAX_BASE_MODELS)):
        names = (general.BASE_MODEL_ORGANIZATION, general.BASE_MODEL_NAME)
        text = _text(keys, general.BASE_MODEL_REPO_URL.format(id=index))
        found.append(text or _joined(keys, *(name.format(id=index) for name in names)) or "unnamed")
    return tuple(found)


def _file_type(keys: dict[str, Scalar]) -> str | None:
    number = keys.get(Keys.General.FILE_TYPE)
    if type(number) is not int:
        return None
    known = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return known.get(number, f"{number}")


def _recipe(keys: dict[str, Scalar]) -> dict[str, str | int | float | bool | None] | None:
    text = keys.get(RECIPE_KEY)
    if not isinstance(text, str) or len(text) > _MAX_RECIPE_CHARACTERS:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    plain = {
        _shown(key): value
        for key, value in found.items()
        if isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    }
    return {key: _shown(value) if isinstance(value, str) else value for key, value in plain.items()}


def _first_line(keys: dict[str, Scalar]) -> str | None:
    template = keys.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if not isinstance(template, str) or not template.strip():
        return None
    return _shown(template.strip().splitlines()[0])
