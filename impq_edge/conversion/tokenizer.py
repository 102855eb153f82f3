"""A checkpoint's tokenizer as a GGUF holds it, read from ``tokenizer.json`` so that it agrees with transformers.

llama.cpp re-implements tokenisation: it knows a pre-tokenizer by its name, merges by rules of its own and treats
a token by its type. What is written here makes it return the ids that ``tokenizer.json`` gives; what it cannot
reproduce is refused by name. The rules relied on are those of llama.cpp's ``src/llama-vocab.cpp`` and
``src/unicode.cpp``. Its ``parse_special=True`` is transformers' default, ``parse_special=False`` transformers'
``split_special_tokens=True``.

Differences that remain whatever a GGUF says:

- llama.cpp applies no Unicode normalisation: where ``tokenizer.json`` has NFC (Qwen), text that is not NFC gets
  other ids.
- Text is split differently at letters and digits that Unicode gained after version 15.1 (4,382 code points, 4,395
  with "smollm") and at U+017F after an apostrophe; every other code point agrees.
- A byte-level vocabulary may lack a few control characters and bytes that no assigned character has (SmolLM2's does):
  transformers leaves such a character out of the text before merging, llama.cpp after.
- A U+2581 in the text is a space to llama.cpp, so that one beside a space can join it (SentencePiece-like models).
- llama.cpp makes control tokens of tokens of certain names, whatever their type: ``<end_of_turn>`` is text with
  ``parse_special=False``; ``</s>``, a word of Qwen's vocabulary, is found in text with ``parse_special=True`` and
  ends a generation.

transformers 5 itself departs from ``tokenizer.json`` where its class is ``LlamaTokenizer`` (Llama-2's vocabulary): it
puts no space before a text that begins with one. llama.cpp follows the file.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gguf import TokenType

from impq_edge.conversion.tokenizer_files import (
    AddedToken,
    BpeModel,
    Merge,
    TokenizerFile,
    TokenizerSettings,
    added_around,
    components,
    merge_added_tokens,
    read_chat_templates,
    read_file,
    read_object,
    read_settings,
    refusal,
)
from impq_edge.errors import ModelError, RecordError
from impq_edge.model.config import Architecture
from impq_edge.records import has_half_pair, shown

_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS_AND_WORDS + r"\p{N}{1,3}" + _SYMBOLS_AND_SPACES
_QWEN2 = _CONTRACTIONS_AND_WORDS + r"\p{N}" + _SYMBOLS_AND_SPACES

_FIELDS = {
    "Split": ("pattern", "behavior", "invert"),
    "ByteLevel": ("add_prefix_space", "use_regex"),
    "Digits": ("individual_digits",),
    "Replace": ("pattern", "content"),
    "Prepend": ("prepend",),
}
"""What decides ids in each kind of normaliser or pre-tokenizer that llama.cpp has a counterpart of."""

_BYTE_LEVEL: dict[str, list[list[Any]]] = {
    "llama-bpe": [["Split", {"Regex": _LLAMA3}, "Isolated", False], ["ByteLevel", False, False]],
    "qwen2": [["Split", {"Regex": _QWEN2}, "Isolated", False], ["ByteLevel", False, False]],
    "smollm": [["Digits", True], ["ByteLevel", False, True]],
}
"""``tokenizer.ggml.pre`` of a byte-level BPE → its pre-tokenizer."""

_RARE = frozenset(
    chr(256 + byte) if byte < 0x20 else chr(byte)
    for byte in {*range(0x20), 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {*b"\t\n\v\f\r"}
)
"""Characters of the bytes that a byte-level vocabulary may lack: control characters, and what UTF-8 never uses or only
for planes that Unicode has left unassigned (4 to 11). SmolLM2's vocabulary lacks 21 of them."""

_IGNORE_MERGES = {"llama-bpe"}  # llama.cpp then takes a word that is a token whole, as ``ignore_merges`` does

_VISIBLE_SPACES = ["Replace", {"String": " "}, "▁"]
_SPACE_PREFIX: list[tuple[bool, list[list[Any]]]] = [
    (False, [_VISIBLE_SPACES]),
    (True, [["Prepend", "▁"], _VISIBLE_SPACES]),
]
"""Whether llama.cpp puts a space before the text and after special tokens ← the normaliser that does the same."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST = 1000  # characters; the longest token of a real vocabulary is a run of some hundred spaces
_SPECIAL_IDS = ("bos", "eos", "unk", "sep", "pad", "mask")

_TURN_END: dict[Architecture, str] = {"llama": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma2": "<end_of_turn>"}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
# What llama.cpp stops at by the name alone: special_eog_ids in llama_vocab::impl::load.
_KNOWN_ENDS = {
    *_TURN_ENDS, "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<EOT>", "_<EOT>", "[EOT]",
    "[EOS]", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Everything a GGUF says about a tokenizer, as plain data."""

    model: Literal["gpt2", "llama"]  # byte-level BPE, or SentencePiece-like BPE with byte fallback
    pre: str  # llama.cpp's name of the pre-tokenizer, "default" where the model has none
    tokens: tuple[str, ...]  # by id, one for every row of the embedding
    types: tuple[TokenType, ...]  # by id
    scores: tuple[float, ...] | None  # by id, for "llama" alone: the highest is merged first
    merges: tuple[Merge, ...] | None  # in order of rank, for "gpt2" alone
    special_ids: Mapping[str, int]  # of "bos", "eos", "eot", "eom", "unk", "sep", "pad" and "mask" those there are
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: Mapping[str, str]  # by name; the one that is used unasked is "default"


def read_tokenizer(directory: Path, vocabulary: int, architecture: Architecture) -> Tokenizer:
    """Read the tokenizer of a checkpoint.

    Parameters
    ----------
    directory
        Holds ``tokenizer.json`` and, as far as they exist, ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``chat_template.jinja``, ``additional_chat_templates/``, ``config.json`` and ``generation_config.json``.
    vocabulary
        Rows of the embedding; ids that the tokenizer leaves free are padded with unused tokens.
    architecture
        Whose token for the end of a turn comes first where the vocabulary holds those of several families.

    Raises
    ------
    ModelError
        When a file is missing or malformed, when llama.cpp cannot reproduce the tokenizer, or when it does
        not fit the embedding.
    """
    path = directory / "tokenizer.json"
    try:
        file, settings = read_file(path), read_settings(directory)
        before, after = added_around(file.post_processor, path)
        templates = read_chat_templates(directory, settings)
    except RecordError as error:
        raise ModelError(str(error)) from None
    model, sentencepiece = file.model, file.model.byte_fallback
    added = merge_added_tokens(file, settings, path)
    texts = _texts(model, added, vocabulary, path)
    merges = _merges(model, path)
    pre, space_prefix = _sentencepiece(file, path) if sentencepiece else _byte_level(file, merges, path)
    _check_added_tokens(list(added.values()), space_prefix, path)
    if model.ignore_merges != (pre in _IGNORE_MERGES):
        _check_merges_make_words(model, merges, [text for i, text in texts.items() if i not in added], path)
    ids = _special_ids(directory, settings, before, texts, vocabulary, architecture)
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids["eos"]]):
        raise refusal(path, f"its post_processor adds {before} before and {after} after a text, and the bos and eos "
                            f"tokens are {ids.get('bos')} and {ids['eos']}")  # fmt: skip
    tokens, types = _typed_tokens(model, added, texts, vocabulary)
    _check_texts(tokens, path)
    if sentencepiece:
        _check_pairs_have_merges(tokens, types, merges, path)
    return Tokenizer(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if sentencepiece else None,
        merges=None if sentencepiece else merges,
        special_ids=ids,
        add_bos=bool(before),
        add_eos=bool(after),
        add_space_prefix=space_prefix,
        chat_templates=templates,
    )


def _check_added_tokens(added: Sequence[AddedToken], space_prefix: bool, path: Path) -> None:
    for token in added:
        if token.single_word or token.lstrip or token.rstrip:
            raise refusal(path, f"its added token {shown(token.content)} sets single_word, lstrip or rstrip")
        if token.normalized and space_prefix:  # transformers then looks for the token with a space before it
            raise refusal(path, f"its added token {shown(token.content)} is normalized, which puts a space before it")
    # Where one token can begin within another, llama.cpp finds the longer of them and transformers the first;
    # runs of one character are cut alike.
    texts = [token.content for token in added]
    starts: dict[str, set[str]] = {}
    for text in texts:
        for cut in range(1, len(text)):
            starts.setdefault(text[:cut], set()).add(text)
    for text in texts:
        for cut in range(1, len(text)):
            for other in starts.get(text[cut:], set()) - {text}:
                if set(text + other) != {text[0]}:
                    raise refusal(path, f"its added tokens {shown(text)} and {shown(other)} can overlap")


def _texts(model: BpeModel, added: Mapping[int, AddedToken], vocabulary: int, path: Path) -> dict[int, str]:
    """Return the text of every token the tokenizer has, by id."""
    texts: dict[int, str] = {}
    for text, token in [*model.vocab.items(), *((token.content, i) for i, token in added.items())]:
        if not 0 <= token < vocabulary:
            raise ModelError(
                f"{path} gives {shown(text)} the id {shown(token)}, but the embedding has {vocabulary} rows; "
                "the two do not belong together."
            )
        if len(text) > _LONGEST:
            raise refusal(path, f"token {token} has {len(text)} characters, and {_LONGEST} are the limit")
        if texts.setdefault(token, text) != text:
            raise ModelError(
                f"{path} gives both {shown(texts[token])} and {shown(text)} the id {token}; remove one of them."
            )
    return texts


def _merges(model: BpeModel, path: Path) -> tuple[Merge, ...]:
    """Return the merges in order of rank, from either form they are written in."""
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise refusal(path, "its model sets dropout, continuing_subword_prefix or end_of_word_suffix")
    merges: dict[Merge, None] = {}
    for merge in model.merges:
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        if not {left, right, left + right} <= model.vocab.keys() or not left or not right:
            raise ModelError(f"{path}: merge {shown(merge)} does not join two tokens into a third; download it again.")
        merges[left, right] = None
    if len(merges) != len(model.merges):
        raise ModelError(f"{path} holds a merge twice; remove the repetition.")
    return tuple(merges)


def _steps(component: dict[str, Any] | None, inner: str) -> list[list[Any]]:
    """Return the kinds of a normaliser's or pre-tokenizer's parts in order, each with what decides ids in it."""
    parts = components(component, inner)
    return [
        [part.get("type"), *(part.get(field) for field in _FIELDS.get(str(part.get("type")), ()))] for part in parts
    ]


def _told(steps: list[list[Any]]) -> str:
    return " + ".join(" ".join(shown(field, 160) for field in step) for step in steps[:9]) or "none"


def _byte_level(file: TokenizerFile, merges: Sequence[Merge], path: Path) -> tuple[str, bool]:
    """Return llama.cpp's name of the pre-tokenizer, and that no space is put before the text."""
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer = _steps(file.normalizer, "normalizers")
    if normalizer not in ([], [["NFC"]]):
        raise refusal(path, f"its normalizer is {_told(normalizer)}")
    found = _steps(file.pre_tokenizer, "pretokenizers")
    pre = next((name for name, steps in _BYTE_LEVEL.items() if steps == found), None)
    if pre is None:
        raise refusal(path, f"its pre_tokenizer is {_told(found)}, none of {', '.join(_BYTE_LEVEL)}")
    missing = sorted(set(ByteLevel.alphabet()) - _RARE - file.model.vocab.keys())
    if missing:  # what transformers then leaves out of the text, llama.cpp keeps between the tokens it merges
        raise refusal(path, f"its vocabulary lacks {len(missing)} of the 256 bytes, {shown(missing[0])} among them")
    if any(" " in left + right for left, right in merges):
        raise refusal(path, "a merge holds a space, which is none of the 256 bytes' characters")
    return pre, False


def _sentencepiece(file: TokenizerFile, path: Path) -> tuple[str, bool]:
    """Return the name of no pre-tokenizer, and whether a space is put before the text."""
    normalizer = _steps(file.normalizer, "normalizers")
    prefix = next((prefix for prefix, steps in _SPACE_PREFIX if steps == normalizer), None)
    if prefix is None:
        raise refusal(path, f"its normalizer is {_told(normalizer)}")
    found = _steps(file.pre_tokenizer, "pretokenizers")
    if found not in ([], [["Split", {"String": " "}, "MergedWithPrevious", False]]):  # no space is left to split at
        raise refusal(path, f"its pre_tokenizer is {_told(found)}")
    vocab = file.model.vocab
    missing = [
        byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab and not (0 < byte < 128 and chr(byte) in vocab)
    ]
    if missing:
        raise refusal(path, f"its vocabulary lacks {len(missing)} byte tokens, <0x{missing[0]:02X}> among them")
    return "default", prefix


def _check_merges_make_words(model: BpeModel, merges: Sequence[Merge], words: Sequence[str], path: Path) -> None:
    """Refuse a vocabulary for which it matters whether a word that is a token is taken whole."""
    from tokenizers.models import BPE

    bpe = BPE(vocab=model.vocab, merges=list(merges))
    for word in words:
        if len(bpe.tokenize(word)) != 1:
            file, other = ("true", "false") if model.ignore_merges else ("false", "true")
            raise refusal(
                path,
                f"it sets ignore_merges to {file}, llama.cpp takes it for {other}, and no merges make {shown(word)}",
            )


def _special_ids(
    directory: Path,
    settings: TokenizerSettings,
    before: Sequence[int],
    texts: Mapping[int, str],
    vocabulary: int,
    architecture: Architecture,
) -> dict[str, int]:
    """Return the ids llama.cpp wants named; for those it finds by text among several, the choice is made here."""
    config, generation = read_object(directory / "config.json"), read_object(directory / "generation_config.json")
    ids = {text: i for i, text in texts.items()}
    special = {name: ids[settings.named[name]] for name in _SPECIAL_IDS if name in settings.named}
    for source in (config, generation):
        for name in _SPECIAL_IDS:
            for token in _id_list(source.get(f"{name}_token_id"), vocabulary)[:1]:
                special.setdefault(name, token)
    for token in before:
        special.setdefault("bos", token)
    if "eos" not in special:  # llama.cpp would stop at a fixed id instead
        raise ModelError(f"{directory} names no eos_token; name it in tokenizer_config.json.")
    turn_end = next((text for text in (_TURN_END[architecture], *_TURN_ENDS) if text in ids), None)
    if turn_end is not None:
        special["eot"] = ids[turn_end]
    ends = [token for source in (generation, config) for token in _id_list(source.get("eos_token_id"), vocabulary)]
    for token in ends:
        stops = {special.get(name) for name in ("eos", "eot", "eom")}
        if token not in stops and texts.get(token) not in _KNOWN_ENDS:
            free = next((name for name in ("eot", "eom") if name not in special), None)
            if free is None:
                raise ModelError(
                    f"{directory / 'generation_config.json'} stops at token {token}, and a GGUF has no place left for "
                    "it; remove it from eos_token_id."
                )
            special[free] = token
    return special


def _id_list(value: object, vocabulary: int) -> list[int]:
    """Return the usable ids of a field that holds one, a list of them, or -1 for none."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary]


def _typed_tokens(
    model: BpeModel, added: Mapping[int, AddedToken], texts: Mapping[int, str], vocabulary: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    tokens, types = [], []
    for i in range(vocabulary):
        text, kind = texts.get(i), TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{i}]", TokenType.UNUSED
        elif i in added:
            text, kind = _typed_added_token(added[i], model)
        elif model.byte_fallback and _BYTE_TOKEN.fullmatch(text):
            kind = TokenType.BYTE
        tokens.append(text)
        types.append(kind)
    return tuple(tokens), tuple(types)


def _typed_added_token(token: AddedToken, model: BpeModel) -> tuple[str, TokenType]:
    if token.special:
        unknown = model.byte_fallback and token.content == model.unk_token
        return token.content, TokenType.UNKNOWN if unknown else TokenType.CONTROL
    if model.byte_fallback and "▁" in token.content:
        # llama.cpp looks for it before it turns spaces into ▁, and prints it as it is. Found after normalisation,
        # it stands for spaces; found before, only for ▁ itself, and spaces reach it through its merges.
        if token.normalized:
            return token.content.replace("▁", " "), TokenType.USER_DEFINED
        return token.content, TokenType.NORMAL
    return token.content, TokenType.USER_DEFINED


def _check_texts(tokens: Sequence[str], path: Path) -> None:
    """Refuse what would end llama.cpp's process when it loads the file."""
    seen: set[str] = set()
    for i, text in enumerate(tokens):
        if "\0" in text or has_half_pair(text):
            raise refusal(path, f"token {i} holds a NUL or half of a surrogate pair")
        if text in seen:
            raise refusal(path, f"two tokens have the text {shown(text)}")
        seen.add(text)


def _scores(tokens: Sequence[str], merges: Sequence[Merge]) -> tuple[float, ...]:
    """Return minus the rank of the first merge that makes each token: llama.cpp merges the highest score first."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return tuple(-float(first.get(text, 0)) for text in tokens)


def _check_pairs_have_merges(
    tokens: Sequence[str], types: Sequence[TokenType], merges: Sequence[Merge], path: Path
) -> None:
    """Refuse merges that a score for each token cannot stand for.

    llama.cpp joins any two pieces that make a token, at the rank of the token; ``tokenizer.json`` joins those pairs
    that have a merge, at the rank of the merge. The two agree where every pair has its merge and the merges that
    make a token follow one another. Runs of one character may deviate: there, every order ends in the same pieces.
    """
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    pieces = {*tokens, *"".join(tokens)}  # llama.cpp starts from single characters, tokens or not
    for text, kind in zip(tokens, types, strict=True):
        if kind not in (TokenType.NORMAL, TokenType.UNUSED, TokenType.BYTE):  # those are found in the text before
            continue
        cuts = range(1, len(text))
        pairs = [(text[:cut], text[cut:]) for cut in cuts if text[:cut] in pieces and text[cut:] in pieces]
        lacking = next((pair for pair in pairs if pair not in ranks), None)
        if lacking is not None:
            raise refusal(path, f"the token {shown(text)} has no merge of {shown(lacking[0])} and {shown(lacking[1])}")
        found = sorted(ranks[pair] for pair in pairs)
        if found and found[-1] - found[0] >= len(found) and len(set(text)) > 1:
            raise refusal(path, f"the merges that make {shown(text)} do not follow one another")
