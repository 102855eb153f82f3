"""A GGUF's tokenizer returns what transformers and tokenizers return, or is refused."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from checkpoints import TOKENIZERS
from gguf import TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from vocabularies import HARD, ROWS, TINY, Vocabulary, added_token, converted, copy_of, edit, read

from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.errors import ModelError

TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PATTERNS = {"llama-bpe": HEAD + r"\p{N}{1,3}" + TAIL, "qwen2": HEAD + r"\p{N}" + TAIL}
PRE_TOKENIZERS = {
    name: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    for name, pattern in PATTERNS.items()
} | {"smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])}
ALPHABET = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
CHAT = TOKENIZERS / "chat_template.jinja"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Vocabulary, Any, Any, Tokenizer]]:
    """Name of a tiny model → its tokenizer by llama.cpp, by tokenizers, by transformers, and as it was read."""
    loaded = {}

    def load(name: str) -> tuple[Vocabulary, Any, Any, Tokenizer]:
        if name not in loaded:
            directory = copy_of(name, tmp_path_factory.mktemp("tiny") / name)
            tokenizer, vocabulary = converted(directory, ROWS, TINY[name])
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            loaded[name] = vocabulary, backend, transformers.AutoTokenizer.from_pretrained(directory), tokenizer
        return loaded[name]

    return load


def normal(name: str, text: str) -> str:
    """The text as the tokenizer's own normaliser would leave it; llama.cpp has none."""
    return unicodedata.normalize("NFC", text) if name == "tiny-qwen3" else text


def backend_of(directory: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def assert_agrees(directory: Path, vocabulary: Vocabulary, texts: list[str]) -> None:
    backend = backend_of(directory)
    for text in texts:
        assert vocabulary.ids(text) == backend.encode(text, add_special_tokens=False).ids, repr(text)


def change_model(directory: Path, **changes: Any) -> Path:
    edit(directory / "tokenizer.json", model=read(directory, "model") | changes)
    return directory


# ------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("add_special", [False, True])
def test_ids_are_those_of_tokenizers_and_transformers(name: str, add_special: bool, tiny: Any) -> None:
    vocabulary, backend, auto, _ = tiny(name)
    for hard in HARD:
        text = normal(name, hard)
        ids = vocabulary.ids(text, add_special=add_special)
        assert ids == backend.encode(text, add_special_tokens=add_special).ids, repr(text)
        assert ids == auto.encode(text, add_special_tokens=add_special), repr(text)


@pytest.mark.parametrize("name", TINY)
def test_special_tokens_can_be_read_as_text(name: str, tiny: Any) -> None:
    vocabulary, _, auto, _ = tiny(name)
    for hard in HARD:
        text = normal(name, hard.replace("<end_of_turn>", ""))  # see test_llama_cpp_makes_control_tokens_by_name
        expected = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert vocabulary.ids(text, parse_special=False) == expected, repr(text)


SNIPPETS = [
    "<|eot_id|>",
    "<|im_start|>",
    "<start_of_turn>",
    "<eos>",
    "\n\n",
    "  ",
    "\t",
    "'s",
    "'LL",
    " the",
    "12",
    "é",
    "🦙",
    "中",
]
TEXT = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cn"])) | st.sampled_from(SNIPPETS), max_size=8
)


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=TEXT)
def test_any_text_agrees(name: str, tiny: Any, parts: list[str]) -> None:
    vocabulary, backend, _, _ = tiny(name)
    text = normal(name, "".join(parts)).replace("'ſ", "").replace("▁", "")
    assert vocabulary.ids(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TINY)
def test_every_token_prints_as_in_transformers(name: str, tiny: Any) -> None:
    vocabulary, backend, _, _ = tiny(name)
    compared = 0
    for token in range(ROWS):
        text = backend.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:  # a part of a character
            assert vocabulary.piece(token) == text.encode(), token
            compared += 1
    assert compared > 0.95 * ROWS


@pytest.mark.parametrize("name", TINY)
def test_the_old_form_of_merges_means_the_same(name: str, tmp_path: Path, tiny: Any) -> None:
    directory = copy_of(name, tmp_path / name)
    model = read(directory, "model")
    assert all(isinstance(merge, list) for merge in model["merges"])
    edit(directory / "tokenizer.json", model=model | {"merges": [" ".join(merge) for merge in model["merges"]]})
    assert read_tokenizer(directory, ROWS, TINY[name]) == tiny(name)[3]


# ------------------------------------------------------------------------- what llama.cpp cannot do


@pytest.mark.parametrize("text", ["nai\u0308ve", "A\u030a", "\u1100\u1161\u11a8", "\u212b"], ids=ascii)
def test_text_that_is_not_nfc_differs_on_qwen(text: str, tiny: Any) -> None:
    vocabulary, backend, _, _ = tiny("tiny-qwen3")
    assert unicodedata.normalize("NFC", text) != text
    assert vocabulary.ids(text) != backend.encode(text, add_special_tokens=False).ids
    assert vocabulary.ids(normal("tiny-qwen3", text)) == backend.encode(text, add_special_tokens=False).ids


def anchored(directory: Path, pre: str) -> Path:
    """Write a vocabulary of all pairs of a byte and one of a few signs: its ids show where a text was split."""
    signs = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str("ax1! \n'")[0][0]
    pairs = list(dict.fromkeys(p for sign in signs for char in ALPHABET for p in ((sign, char), (char, sign))))
    vocab = ALPHABET | {left + right: len(ALPHABET) + i for i, (left, right) in enumerate(pairs)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.add_special_tokens(["<eos>"])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    edit(directory / "tokenizer_config.json", eos_token="<eos>")
    return directory


CONTEXTS = ["a{}a", "!{}!", "1{}1", "x'{}x", " {} ", "\n{}\na"]


def disagreements(pre: str, directory: Path, points: range, contexts: list[str]) -> set[int]:
    """Code points that change how llama.cpp splits a text, but not how tokenizers does, or the other way round."""
    path = anchored(directory, pre)
    _, vocabulary = converted(path, 4000)
    backend = backend_of(path)
    found = set()
    for context in contexts:
        for point in points:
            text = context.format(chr(point))
            if not 0xD800 <= point < 0xE000 and vocabulary.ids(text) != backend.encode(text).ids:
                found.add(point)
    return found


# The first of every range of Unicode 16 letters and digits.
NEW_IN_UNICODE_16 = {0x1C89, 0xA7CB, 0xA7DA, 0x105C0, 0x10D40, 0x10EC2, 0x11380, 0x116D0, 0x11BC0, 0x13460, 0x16100,
                     0x16D40, 0x1CCF0, 0x1E5D0}  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_split_alike(pre: str, tmp_path: Path) -> None:
    found = disagreements(pre, tmp_path / "dense", range(0x3100), CONTEXTS)
    assert found == {0x1C89, 0x1C8A} | ({0x17F} if pre in PATTERNS else set())
    assert not disagreements(pre, tmp_path / "thin", range(0x3100, 0xA700, 97), CONTEXTS)
    if pre in PATTERNS:
        for point in NEW_IN_UNICODE_16:
            assert disagreements(pre, tmp_path / hex(point), range(point, point + 1), CONTEXTS) == {point}


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_character_splits_alike(pre: str, tmp_path: Path) -> None:
    found = disagreements(pre, tmp_path / "all", range(0x110000), ["a{}a", "x'{}x", " {} "])
    assert found >= NEW_IN_UNICODE_16
    assert len(found) == (4382 + 1 if pre in PATTERNS else 4382 + 13)


def test_a_visible_space_in_the_text_joins_a_space(tiny: Any) -> None:
    vocabulary, backend, _, _ = tiny("tiny-gemma2")
    assert vocabulary.ids("a ▁b") == vocabulary.ids("a  b") == backend.encode("a ▁b", add_special_tokens=False).ids


def test_llama_cpp_makes_control_tokens_by_name(tmp_path: Path, tiny: Any) -> None:
    vocabulary, _, auto, _ = tiny("tiny-gemma2")
    turn = auto.convert_tokens_to_ids("<end_of_turn>")
    assert auto.encode("<end_of_turn>", add_special_tokens=False, split_special_tokens=True) == [turn]
    assert len(vocabulary.ids("<end_of_turn>", parse_special=False)) > 1
    # A word of Qwen's vocabulary that none of its merges makes.
    directory = trained(tmp_path / "x", "qwen2", HARD, 400)
    change_model(directory, vocab=read(directory, "model")["vocab"] | {"</s>": 400})
    _, vocabulary = converted(directory, 401, "qwen3")
    assert vocabulary.is_end(400)
    assert vocabulary.ids("</s>") == [400]
    expected = backend_of(directory).encode("</s>").ids
    assert vocabulary.ids("</s>", parse_special=False) == expected != [400]


# ------------------------------------------------------------------------------ other vocabularies


def trained(directory: Path, pre: str, texts: list[str], size: int, **special: str) -> Path:
    """Train a byte-level BPE with one of llama.cpp's pre-tokenizers."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    end = special.get("eos_token", "<|endoftext|>")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end], initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    edit(directory / "tokenizer_config.json", eos_token=end, tokenizer_class="PreTrainedTokenizerFast", **special)
    return directory


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_retrained_vocabulary_is_recognised_by_its_pattern(pre: str, tmp_path: Path) -> None:
    directory = trained(tmp_path / pre, pre, HARD, 900)
    tokenizer, vocabulary = converted(directory, 900)
    assert (tokenizer.model, tokenizer.pre, tokenizer.add_bos) == ("gpt2", pre, False)
    assert_agrees(directory, vocabulary, HARD)


def test_a_word_that_no_merge_makes_needs_ignore_merges_on_both_sides(tmp_path: Path) -> None:
    directory = trained(tmp_path / "x", "llama-bpe", HARD, 400)
    model = read(directory, "model")
    assert "Ġquixotic" not in model["vocab"]
    vocab = model["vocab"] | {"Ġquixotic": 400}
    edit(directory / "tokenizer.json", model=model | {"vocab": vocab, "ignore_merges": True})
    _, vocabulary = converted(directory, 401)
    assert vocabulary.ids("a quixotic word")[1] == 400
    assert_agrees(directory, vocabulary, [*HARD, "a quixotic word", " quixotically"])
    edit(directory / "tokenizer.json", model=model | {"vocab": vocab})
    with pytest.raises(ModelError, match="no merges make 'Ġquixotic'"):
        read_tokenizer(directory, 401, "llama")
    pre = json.loads(PRE_TOKENIZERS["qwen2"].__getstate__())
    edit(directory / "tokenizer.json", pre_tokenizer=pre)  # where llama.cpp merges, and so does the file
    _, vocabulary = converted(directory, 401)
    assert_agrees(directory, vocabulary, [*HARD, "a quixotic word"])


def test_features_of_llama_3(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    model, added = read(directory, "model"), read(directory, "added_tokens")
    added += [added_token(8192 + i, f"<|reserved_special_token_{i + 3}|>", special=True) for i in range(20)]
    added += [added_token(8212, "<|eom_id|>", special=True), added_token(8213, "<|python_tag|>", special=True)]
    edit(directory / "tokenizer.json", added_tokens=added, model=model | {"ignore_merges": True})
    edit(directory / "tokenizer_config.json", eos_token="<|eot_id|>", chat_template=CHAT.read_text("utf-8"))
    edit(directory / "config.json", bos_token_id=8184, eos_token_id=[8185, 8212, 8186])
    edit(directory / "generation_config.json", eos_token_id=[8185, 8212, 8186])
    tokenizer, vocabulary = converted(directory, 8256)
    assert tokenizer.special_ids == {"bos": 8184, "eos": 8186, "eot": 8186}
    assert [token for token in range(8256) if vocabulary.is_end(token)] == [8185, 8186, 8212]
    assert tokenizer.chat_templates == {"default": CHAT.read_text("utf-8")}
    assert_agrees(directory, vocabulary, [*HARD, "a<|reserved_special_token_22|><|python_tag|>b<|eom_id|>"])


def test_features_of_qwen3(tmp_path: Path) -> None:
    directory = copy_of("tiny-qwen3", tmp_path / "x")
    names = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>", "<|file_sep|>"]
    extra = [added_token(8192 + i, text) for i, text in enumerate(names)]
    edit(directory / "tokenizer.json", added_tokens=read(directory, "added_tokens") + extra)
    edit(directory / "tokenizer_config.json", eos_token="<|im_end|>", bos_token=None, add_bos_token=False)
    edit(directory / "config.json", bos_token_id=8189, eos_token_id=8191)
    edit(directory / "generation_config.json", eos_token_id=[8191, 8189])
    tokenizer, vocabulary = converted(directory, 8320, "qwen3")
    assert tokenizer.special_ids == {"bos": 8189, "eos": 8191, "eot": 8191, "pad": 8189}
    assert tokenizer.types[8192:8198] == (TokenType.USER_DEFINED,) * 6
    assert set(tokenizer.types[8198:]) == {TokenType.UNUSED} and tokenizer.tokens[8319] == "[PAD8319]"
    text = "<think>\nhm\n</think><tool_call>{}</tool_call>"
    assert vocabulary.ids(text, parse_special=False) == vocabulary.ids(text)
    texts = [unicodedata.normalize("NFC", hard) for hard in HARD]
    assert_agrees(directory, vocabulary, [*texts, text, "<|fim_prefix|>x<|file_sep|>"])
    assert not vocabulary.is_control(8192) and vocabulary.is_end(8189) and vocabulary.is_end(8191)


def gemma_like(directory: Path) -> tuple[Path, int]:
    """Give the tiny Gemma what the released vocabularies have: runs, tags, unused tokens, and a tab for its byte."""
    copy_of("tiny-gemma2", directory)
    model, added = read(directory, "model"), read(directory, "added_tokens")
    vocab = {("\t" if text == "<0x09>" else text): i for text, i in model["vocab"].items()}
    runs = [char * n for char in "\n▁\t" for n in range(2, 32) if char * n not in vocab]
    tags = ["<table>", "</table>", "<h1>", "</s>", "[toxicity=0]", "[@BOS@]", "<2mass>"]
    for text in [*runs, *tags, *(f"<unused{i}>" for i in range(9))]:
        vocab[text] = len(vocab)
    known = {token["content"] for token in added}
    added += [added_token(vocab[text], text, special=text.startswith("<unused"))
              for text in vocab if (len(set(text)) == 1 and len(text) > 1 and text[0] in "\n▁\t") or text in tags
              or text.startswith("<unused") if text not in known]  # fmt: skip
    # The released merges begin with the runs', all of one score, the longest left part first.
    pairs = [(c * i, c * (n - i)) for c in "\n▁\t" for n in range(2, 32) for i in range(1, n)]
    pairs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    merges = [*pairs, *(pair for pair in map(tuple, model["merges"]) if pair not in set(pairs))]
    edit(directory / "tokenizer.json", added_tokens=added, model=model | {"vocab": vocab, "merges": merges})
    return directory, len(vocab)


def test_features_of_gemma_2(tmp_path: Path) -> None:
    directory, size = gemma_like(tmp_path / "x")
    edit(directory / "generation_config.json", eos_token_id=[1, 6])
    tokenizer, vocabulary = converted(directory, size, "gemma2")
    kinds = dict(zip(tokenizer.tokens, tokenizer.types, strict=True))
    assert [kinds[text] for text in ("<0x0A>", "\t", "\n\n\n", "▁▁", "<table>", "<unused3>", "<unk>", "<bos>")] == [
        TokenType.BYTE, TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.USER_DEFINED,
        TokenType.CONTROL, TokenType.UNKNOWN, TokenType.CONTROL]  # fmt: skip
    runs = [
        before + char * n + after
        for char in " \n\t"
        for n in range(1, 90)
        for before in ("", "x")
        for after in ("", "y")
    ]
    assert_agrees(directory, vocabulary, [*HARD, *runs, "<table><h1>x</h1></table> <unused3>[toxicity=0][@BOS@]"])
    assert vocabulary.piece(tokenizer.tokens.index("▁▁▁")) == b"   "
    assert vocabulary.is_end(1) and vocabulary.is_end(6)


def test_a_normalised_token_of_visible_spaces_stands_for_spaces(tmp_path: Path) -> None:
    directory = copy_of("tiny-gemma2", tmp_path / "x")
    added = [*read(directory, "added_tokens"), added_token(8192, "▁>>▁", normalized=True)]
    edit(directory / "tokenizer.json", added_tokens=added)
    _, vocabulary = converted(directory, 8193, "gemma2")
    assert vocabulary.ids("a >> b")[1] == 8192
    assert vocabulary.piece(8192) == b" >> "
    assert_agrees(directory, vocabulary, [*HARD, "a >> b", "a>>b", "a  >>  b"])


def test_a_space_before_the_text_and_after_special_tokens(tmp_path: Path) -> None:
    prepend = {"type": "Prepend", "prepend": "▁"}
    directory = copy_of("tiny-gemma2", tmp_path / "x")
    added = [token for token in read(directory, "added_tokens") if token["special"]]
    normalizer = {"type": "Sequence", "normalizers": [prepend, read(directory, "normalizer")]}
    edit(directory / "tokenizer.json", normalizer=normalizer, pre_tokenizer=None, added_tokens=added)
    tokenizer, vocabulary = converted(directory)
    assert tokenizer.add_space_prefix
    assert_agrees(directory, vocabulary, [text.replace("<end_of_turn>", "<eos>") for text in HARD])
    edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    assert auto.encode("x  y") == vocabulary.ids("x  y", add_special=True)
    if transformers.__version__ >= "5":  # its class puts no space before one, whatever the file says
        assert auto.encode(" x") != vocabulary.ids(" x", add_special=True)


# -------------------------------------------------------------------------------- special tokens


NAMED = {"__type": "AddedToken", "content": "<bos_like>", "lstrip": False, "rstrip": False, "single_word": False}


def test_a_named_token_is_special(tmp_path: Path) -> None:
    directory = copy_of("tiny-qwen3", tmp_path / "x")
    extra = [added_token(8192, "<bos_like>"), added_token(8193, "<listed>"), added_token(8194, "<plain>")]
    edit(directory / "tokenizer.json", added_tokens=read(directory, "added_tokens") + extra)
    listed = {"extra_special_tokens": ["<listed>"], "tokenizer_class": "Qwen2Tokenizer"}
    edit(directory / "tokenizer_config.json", bos_token=NAMED, **listed)
    tokenizer, _ = converted(directory, 8195, "qwen3")
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    special = {i: token.special for i, token in auto.added_tokens_decoder.items()}
    assert special == {i: kind is TokenType.CONTROL for i, kind in enumerate(tokenizer.types) if i in special}
    assert [special[i] for i in (8192, 8193, 8194)] == [True, True, False]
    assert tokenizer.special_ids["bos"] == 8192


def test_settings_of_added_tokens_count_before_the_file(tmp_path: Path) -> None:
    directory = copy_of("tiny-gemma2", tmp_path / "x")
    flagged = added_token(5, "<start_of_turn>", special=True)
    del flagged["id"]
    edit(directory / "tokenizer_config.json", added_tokens_decoder={"5": flagged})
    tokenizer, vocabulary = converted(directory, ROWS, "gemma2")
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    assert auto.added_tokens_decoder[5].special and tokenizer.types[5] is TokenType.CONTROL
    text = "<start_of_turn>x"
    expected = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert vocabulary.ids(text, parse_special=False) == expected != vocabulary.ids(text)


def test_the_older_file_of_special_tokens(tmp_path: Path) -> None:
    directory = copy_of("tiny-qwen3", tmp_path / "x")
    edit(directory / "special_tokens_map.json", eos_token={"content": "<|im_end|>"}, pad_token="<|im_start|>")
    tokenizer, _ = converted(directory, ROWS, "qwen3")
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    assert (auto.eos_token_id, auto.pad_token_id) == (tokenizer.special_ids["eos"], tokenizer.special_ids["pad"])
    assert tokenizer.tokens[tokenizer.special_ids["eos"]] == "<|im_end|>"


@pytest.mark.parametrize("claim", [True, False])
def test_the_post_processor_decides_about_bos(claim: bool, tmp_path: Path) -> None:
    """As in transformers, which ignores add_bos_token beside a ``tokenizer.json``."""
    for name in TINY:
        directory = copy_of(name, tmp_path / name)
        edit(directory / "tokenizer_config.json", add_bos_token=claim, add_eos_token=claim)
        tokenizer, vocabulary = converted(directory, ROWS, TINY[name])
        auto = transformers.AutoTokenizer.from_pretrained(directory)
        assert vocabulary.ids("x", add_special=True) == auto.encode("x")
        assert (tokenizer.add_bos, tokenizer.add_eos) == (name != "tiny-qwen3", False)


def test_a_post_processor_may_add_eos(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    backend = backend_of(directory)
    ids = [("<|begin_of_text|>", 8184), ("<|end_of_text|>", 8185)]
    backend.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A <|end_of_text|>", special_tokens=ids)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer, vocabulary = converted(directory)
    assert tokenizer.add_bos and tokenizer.add_eos
    assert vocabulary.ids("Hello", add_special=True) == backend.encode("Hello").ids


def test_every_token_that_generation_stops_at_ends_it(tmp_path: Path) -> None:
    directory = copy_of("tiny-qwen3", tmp_path / "x")
    names = [f"<stop{i}>" for i in range(3)]
    extra = [added_token(8192 + i, text) for i, text in enumerate(names)]
    edit(directory / "tokenizer.json", added_tokens=read(directory, "added_tokens") + extra)
    edit(directory / "generation_config.json", eos_token_id=[8189, 8192])
    _, vocabulary = converted(directory, 8195, "qwen3")
    assert [token for token in range(8195) if vocabulary.is_end(token)] == [8189, 8191, 8192]
    edit(directory / "generation_config.json", eos_token_id=[8189, 8192, 8194])
    with pytest.raises(ModelError, match="stops at token 8194"):
        read_tokenizer(directory, 8195, "qwen3")


# --------------------------------------------------------------------------------- chat templates

TALK = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": " What is “naïve”? <b>&</b> "},
    {"role": "assistant", "content": "Un-\nworldly."},
    {"role": "user", "content": "Thanks 🦙"},
]


@pytest.mark.parametrize("place", ["file", "settings", "named"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_chat_renders_as_in_transformers(place: str, generation_prompt: bool, tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    template = CHAT.read_text("utf-8")
    if place == "file":
        shutil.copy(CHAT, directory / "chat_template.jinja")
        edit(directory / "tokenizer_config.json", chat_template="the file counts")
    elif place == "settings":
        edit(directory / "tokenizer_config.json", chat_template=template)
    else:
        named = [{"name": "rag", "template": "other"}, {"name": "default", "template": template}]
        edit(directory / "tokenizer_config.json", chat_template=named)
    tokenizer, vocabulary = converted(directory)
    assert tokenizer.chat_templates["default"] == template
    assert tokenizer.chat_templates.get("rag") == ("other" if place == "named" else None)
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    formatter = Jinja2ChatFormatter(
        tokenizer.chat_templates["default"],
        eos_token=tokenizer.tokens[tokenizer.special_ids["eos"]],
        bos_token=tokenizer.tokens[tokenizer.special_ids["bos"]],
        add_generation_prompt=generation_prompt,
    )
    rendered = formatter(messages=TALK).prompt  # type: ignore[arg-type]
    assert rendered == auto.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generation_prompt)
    assert rendered.startswith("<|begin_of_text|>") and "naïve" in rendered
    expected = auto.apply_chat_template(TALK, add_generation_prompt=generation_prompt, return_dict=False)
    assert vocabulary.ids(rendered) == expected


def test_additional_templates(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    shutil.copy(CHAT, directory / "chat_template.jinja")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools", "utf-8")
    tokenizer, _ = converted(directory)
    assert tokenizer.chat_templates == {"default": CHAT.read_text("utf-8"), "tool_use": "tools"}
    assert transformers.AutoTokenizer.from_pretrained(directory).chat_template == tokenizer.chat_templates


# --------------------------------------------------------------------------------------- refusals


def refused(directory: Path, rows: int = ROWS) -> str:
    """The one sentence that a tokenizer is refused with."""
    with pytest.raises(ModelError) as caught:
        read_tokenizer(directory, rows, "llama")
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and str(directory) in message
    assert len(message) < 600 + len(str(directory))
    return message


NFKC = {"type": "NFKC"}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DEEP: dict[str, Any] = {"type": "Sequence", "normalizers": []}
for _ in range(200):
    DEEP = {"type": "Sequence", "normalizers": [DEEP, NFKC]}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tiny-llama3", {"normalizer": NFKC}, "normalizer is 'NFKC'"),
        ("tiny-llama3", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
         "normalizer is 'NFC' + 'Lowercase'"),
        ("tiny-llama3", {"normalizer": DEEP}, "normalizer is 'NFKC'"),
        ("tiny-llama3", {"normalizer": {"type": [1], "normalizers": 3}}, "normalizer is"),
        ("tiny-llama3", {"normalizer": "NFC"}, "normalizer"),
        ("tiny-llama3", {"pre_tokenizer": None}, "pre_tokenizer is none"),
        ("tiny-llama3", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is 'Whitespace'"),
        ("tiny-llama3", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, r"p{N}{1,2}"),
        ("tiny-llama3", {"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "'ByteLevel' True"),
        ("tiny-llama3", {"post_processor": {"type": "BertProcessing", "sep": ["x", 1]}}, "BertProcessing"),
        ("tiny-llama3", {"post_processor": {"type": "TemplateProcessing", "single": "x"}}, "single"),
        ("tiny-llama3", {"post_processor": {"type": "TemplateProcessing", "single": []}}, "the text once"),
        ("tiny-llama3", {"post_processor": {"type": "Sequence", "processors": 5}}, "post_processor is 'Sequence'"),
        ("tiny-llama3", {"post_processor": {"type": "Sequence", "processors": ["x"]}}, "post_processor is None"),
        ("tiny-llama3", {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "model is 'Unigram'"),
        ("tiny-llama3", {"model": {"type": "WordPiece", "vocab": {}}}, "model is 'WordPiece'"),
        ("tiny-llama3", {"model": None}, "model is None"),
        ("tiny-llama3", {"model": {"type": "B\n" * 9999}}, "model is 'B\\n"),
        ("tiny-llama3", {"model": {"type": "BPE", "vocab": [["a", 0.0]], "merges": []}}, "vocab"),
        ("tiny-llama3", {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, "vocab"),
        ("tiny-llama3", {"added_tokens": 7}, "added_tokens"),
        ("tiny-gemma2", {"normalizer": None}, "normalizer is none"),
        ("tiny-gemma2", {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}, "Metaspace"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_reproduce_is_refused(
    name: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refused(copy_of(name, tmp_path / "x", **change))


@pytest.mark.parametrize("field", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_models_that_change_pieces_are_refused(field: str, tmp_path: Path) -> None:
    value = 0.1 if field == "dropout" else "##"
    assert field in refused(change_model(copy_of("tiny-llama3", tmp_path / "x"), **{field: value}))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_around_are_refused(flag: str, tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    tokens = [*read(directory, "added_tokens"), added_token(8192, "<mask>", **{flag: True})]
    edit(directory / "tokenizer.json", added_tokens=tokens)
    assert "'<mask>' sets single_word, lstrip or rstrip" in refused(directory, 8193)


def with_added(directory: Path, *texts: str) -> Path:
    extra = [added_token(8192 + i, text) for i, text in enumerate(texts)]
    edit(directory / "tokenizer.json", added_tokens=read(directory, "added_tokens") + extra)
    return directory


def test_added_tokens_that_can_overlap_are_refused(tmp_path: Path) -> None:
    directory = with_added(copy_of("tiny-llama3", tmp_path / "x"), "|one|", "|three|")
    assert "'|one|' and '|three|' can overlap" in refused(directory, 8194)
    directory = with_added(copy_of("tiny-llama3", tmp_path / "y"), "\n\n", "\n\n\n", "\n:")
    assert "can overlap" in refused(directory, 8195)
    directory = with_added(copy_of("tiny-llama3", tmp_path / "z"), "\n\n", "\n\n\n", "aa")
    assert_agrees(directory, converted(directory, 8195)[1], [*HARD, "\n" * 8, "aaaaa"])


def test_the_embedding_must_have_a_row_for_every_token(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    assert "the id 8191, but the embedding has 8191 rows" in refused(directory, 8191)
    tokenizer, _ = converted(directory, 8193)
    assert (tokenizer.tokens[-1], tokenizer.types[-1]) == ("[PAD8192]", TokenType.UNUSED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a\0b", "NUL"), ("\ud800", "surrogate"), ("x" * 1001, "1001 characters"),
     ("[PAD8193]", "two tokens have the text"), ("Ġthe", "two tokens have the text")],
    ids=ascii,
)  # fmt: skip
def test_tokens_that_would_end_the_process_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refused(with_added(copy_of("tiny-llama3", tmp_path / "x"), text), 8200)


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    change_model(directory, vocab=read(directory, "model")["vocab"] | {"qqqq": 17})
    assert "the id 17" in refused(directory)


@pytest.mark.parametrize("merge", ["Ġt", "a b c", ["Ġt", "qqqq"], ["", "a"], "Ġ t"])
def test_merges_that_make_no_token_are_refused(merge: Any, tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    change_model(directory, merges=[*read(directory, "model")["merges"], merge])
    assert "merge" in refused(directory)


@pytest.mark.parametrize(("name", "byte"), [("tiny-llama3", "ð"), ("tiny-gemma2", "<0xE9>")])
def test_a_vocabulary_without_all_bytes_is_refused(name: str, byte: str, tmp_path: Path) -> None:
    directory = copy_of(name, tmp_path / "x")
    model = read(directory, "model")
    del model["vocab"][byte]
    edit(directory / "tokenizer.json", model=model)
    message = refused(directory)
    assert "lacks 1 of the 256 bytes" in message or "lacks 1 byte tokens" in message


def test_a_vocabulary_may_lack_bytes_that_no_text_has(tmp_path: Path) -> None:
    """SmolLM2's lacks some control characters, and bytes that UTF-8 never uses."""
    directory = copy_of("tiny-llama3", tmp_path / "x")
    model = read(directory, "model")
    for missing in ("À", "Á", "ÿ", "Ā"):
        del model["vocab"][missing]
    edit(directory / "tokenizer.json", model=model)
    _, vocabulary = converted(directory)
    assert_agrees(directory, vocabulary, ["Plain text.", "naïve ångström, \t tabs\n", "日本語 🙂 Ünïcödé"])


def test_merges_that_scores_cannot_stand_for_are_refused(tmp_path: Path) -> None:
    directory = copy_of("tiny-gemma2", tmp_path / "x")
    merges = read(directory, "model")["merges"]
    made = ["".join(merge) for merge in merges]
    twice = next(text for text in made if made.count(text) > 1 and len(set(text)) > 1)
    first = made.index(twice)
    change_model(directory, merges=[*merges[:first], *merges[first + 1 :]])
    assert f"the token {twice!r} has no merge of" in refused(directory)
    change_model(directory, merges=[*merges[:first], *merges[first + 1 :], merges[first]])
    assert f"the merges that make {twice!r} do not follow one another" in refused(directory)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    (directory / "tokenizer_config.json").unlink()
    assert "names no eos_token" in refused(directory)
    edit(directory / "config.json", eos_token_id=8185)
    assert read_tokenizer(directory, ROWS, "llama").special_ids == {"bos": 8184, "eos": 8185, "eot": 8186}


def test_a_named_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    edit(directory / "tokenizer_config.json", pad_token="[PAD]")
    assert "names the token '[PAD]'" in refused(directory)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    directory = copy_of("tiny-gemma2", tmp_path / "x")
    path = directory / "tokenizer.json"
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(directory)
    for content in ("{", "[" * 100_000, "1" * 5000, "[]"):
        path.write_text(content)
        assert refused(directory)
    path.unlink()
    assert "has no tokenizer, and tokenizer.json is needed" in refused(directory)
    (directory / "tokenizer.model").write_bytes(b"")
    assert "has only tokenizer.model" in refused(directory) and "save_pretrained" in refused(directory)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"chat_template": 7}),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ],
)
def test_malformed_settings_are_refused(file: str, change: dict[str, Any], tmp_path: Path) -> None:
    directory = copy_of("tiny-llama3", tmp_path / "x")
    edit(directory / file, **change)
    assert file in refused(directory)
