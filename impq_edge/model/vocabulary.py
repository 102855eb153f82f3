"""How large a vocabulary is in a GGUF, where its tokenizer is not read: counted, known, or guessed."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from impq_edge.model.config import HyperParameters
from impq_edge.records import STRICT, from_json, read_text

# A vocabulary that nothing is known of. GPT-2's has 7.1 bytes a token, a merge a token and 8.1 bytes a merge, Llama-3's
# 8.4, 2.2 and 10.6, Qwen's 9.0, 1.0 and 10.0; SentencePiece-like ones 6.6 (Llama-2) and 7.5 (Gemma-2) bytes a token.
_TOKEN_BYTES = 8
_MERGE_BYTES = 10
_MERGES_PER_TOKEN = 1.0

_UNUSED_TOKEN_BYTES = len("[PAD100000]")  # by which free ids are padded

Count = Annotated[int, pydantic.Field(strict=True, ge=0, lt=2**40)]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The strings of a tokenizer, by number and length."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    model: Literal["gpt2", "llama"]  # as in a GGUF: byte-level BPE with merges, SentencePiece-like with scores
    tokens_bytes: Count  # UTF-8, all tokens together
    merges: Count
    merges_bytes: Count  # UTF-8, the space between the two halves included


def guess_vocabulary(hyper: HyperParameters) -> Vocabulary:
    """Return what a vocabulary of that size is likely to take."""
    tokens_bytes = hyper.vocabulary * _TOKEN_BYTES
    if hyper.architecture == "gemma2":
        return Vocabulary("llama", tokens_bytes, 0, 0)
    merges = round(hyper.vocabulary * _MERGES_PER_TOKEN)
    return Vocabulary("gpt2", tokens_bytes, merges, merges * _MERGE_BYTES)


def count_vocabulary(directory: Path, hyper: HyperParameters) -> Vocabulary | None:
    """Count the strings of a checkpoint's ``tokenizer.json``; None where there is none of that form.

    Nothing is checked here: building reads the file with care and refuses what llama.cpp cannot reproduce.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        found = from_json(read_text(path))
        model, added = found["model"], found.get("added_tokens") or []
        tokens = {*model["vocab"], *(token["content"] for token in added)}
        merges = [_joined(merge) for merge in model.get("merges") or []]
        sizes = [len(token.encode()) for token in tokens]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    padding = max(0, hyper.vocabulary - len(tokens)) * _UNUSED_TOKEN_BYTES
    if model.get("byte_fallback"):  # such merges become scores
        return Vocabulary("llama", sum(sizes) + padding, 0, 0)
    return Vocabulary("gpt2", sum(sizes) + padding, len(merges), sum(len(merge.encode()) for merge in merges))


def _joined(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
