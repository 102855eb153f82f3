"""Vocabulary-only GGUFs, llama.cpp's view of them, and text that is hard to tokenise."""

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import llama_cpp as api
from checkpoints import TOKENIZERS
from gguf import GGUFWriter

from impq_edge.conversion.metadata import add_metadata
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import Architecture, HyperParameters
from impq_edge.model.spec import ModelSpec, TensorSpec

TINY: dict[str, Architecture] = {"tiny-llama3": "llama", "tiny-qwen3": "qwen3", "tiny-gemma2": "gemma2"}
ROWS = 8192  # of each tiny model's embedding


class Vocabulary:
    """A GGUF's tokenizer as llama.cpp loads it."""

    def __init__(self, path: Path, *, vocab_only: bool = True) -> None:
        api.llama_log_set(_SILENT, ctypes.c_void_p(0))
        parameters = api.llama_model_default_params()
        parameters.vocab_only = vocab_only
        parameters.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model is not None, f"llama.cpp refuses {path}"
        self.vocab = api.llama_model_get_vocab(self.model)

    def ids(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        data = text.encode()
        out = (api.llama_token * (2 * len(data) + 2))()
        count = api.llama_tokenize(self.vocab, data, len(data), out, len(out), add_special, parse_special)
        assert count >= 0
        return list(out[:count])

    def piece(self, token: int) -> bytes:
        """The text a token stands for in generated text."""
        buffer = ctypes.create_string_buffer(2048)
        count = api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        assert count >= 0
        return buffer.raw[:count]

    def is_end(self, token: int) -> bool:
        return bool(api.llama_vocab_is_eog(self.vocab, token))

    def is_control(self, token: int) -> bool:
        return bool(api.llama_vocab_is_control(self.vocab, token))


@api.llama_log_callback
def _SILENT(level: int, text: bytes, data: object) -> None:  # noqa: N802 - kept alive as a constant
    pass


def spec_of(architecture: Architecture, rows: int, name: str = "made for a test") -> ModelSpec:
    """A model that has the sizes a vocabulary-only file needs, and one matrix."""
    hyper = HyperParameters(
        architecture=architecture, n_blocks=1, hidden=256, ffn=256, n_heads=4, n_kv_heads=2, head_dim=64,
        vocabulary=rows, context=512, rms_epsilon=1e-6, rope_theta=1e4, rope_scaling=None, tied_embeddings=True,
        attention_bias=False, sliding_window=64 if architecture == "gemma2" else None,
        attention_softcap=50.0 if architecture == "gemma2" else None,
        final_softcap=30.0 if architecture == "gemma2" else None,
    )  # fmt: skip
    matrix = TensorSpec("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", (256, 256), "matrix", 0, "x")
    return ModelSpec(name=name, hyperparameters=hyper, tensors=(matrix,), content_sha256="0" * 64)


def write_vocabulary(path: Path, tokenizer: Tokenizer, architecture: Architecture) -> Path:
    """Write a GGUF without tensors."""
    spec = spec_of(architecture, len(tokenizer.tokens))
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, spec, tokenizer, {"blk.0.ffn_up.weight": TensorType.Q2_K}, {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def converted(directory: Path, rows: int = ROWS, architecture: Architecture = "llama") -> tuple[Tokenizer, Vocabulary]:
    """Read a checkpoint directory's tokenizer and load it back through llama.cpp."""
    tokenizer = read_tokenizer(directory, rows, architecture)
    return tokenizer, Vocabulary(write_vocabulary(directory / "vocabulary.gguf", tokenizer, architecture))


def copy_of(name: str, directory: Path, **changes: Any) -> Path:
    """Copy a tiny model's tokenizer; ``changes`` replace fields of its ``tokenizer.json``."""
    shutil.copytree(TOKENIZERS / name, directory)
    edit(directory / "tokenizer.json", **changes)
    return directory


def edit(path: Path, **changes: Any) -> None:
    """Replace top-level fields of a JSON file, which need not exist."""
    data = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(data | changes), "utf-8")


def read(directory: Path, field: str) -> Any:
    """A top-level field of ``tokenizer.json``."""
    return json.loads((directory / "tokenizer.json").read_text("utf-8"))[field]


def added_token(token: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": token, "content": content, **off, **flags}


HARD = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t\t",
    "\r\n",
    "\r\n\r\n",
    "\r",
    " \n ",
    "\n \n",
    " \t\n\r\x0b\x0c ",
    "Hello",
    " Hello",
    "Hello ",
    "  Hello  ",
    "Hello,  world",
    "a   b    c     d",
    "tab\tand\t\ttabs",
    "trailing   ",
    "line one\nline two\r\nline three\n\n\n\nafter a gap\n",
    "    indented\n\tindented\n        return x",
    "I'm, you're, he's, we've, I'll, I'd, can't",
    "I'M YOU'RE HE'S WE'VE I'LL I'D CAN'T",
    "I'm'm 's' 'tis O'Re'll 'RE'",
    "x'S'T'Re'vE'M'lL'd",
    "' s 'sS '' ''' 's",
    "’s ’t it’s",
    "1 12 123 1234 12345 1234567890",
    "3.14 1,000,000 1e-9 0x7FFF",
    "٣١٤ ১২৩ ४५६ Ⅷ ½ ² ㊿ 五",
    "naïve café résumé Ångström",
    "nai\u0308ve cafe\u0301 re\u0301sume\u0301 A\u030angstro\u0308m",
    "o\u0302\u0301\u0323 q\u0307\u0323 \u0301 alone",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \u0915\u093c \u05e9\u05bc\u05c1",
    "ﬁ ﬂ ﬆ Ĳ ǆ ß ẞ İ ı ſ K Å",
    "Ελληνικά Русский Українська Հայերեն ქართული",
    "עִבְרִית العَرَبِيَّة فارسی اردو ܣܘܪܝܝܐ",
    "हिन्दी বাংলা ਪੰਜਾਬੀ ગુજરાતી தமிழ்",
    "తెలుగు ಕನ್ನಡ മലയാളം සිංහල",
    "ไทย ລາວ မြန်မာ ភាសាខ្មែរ བོད་སྐད་",
    "中文 日本語 ひらがな カタカナ ｶﾀｶﾅ 한국어 각",
    "我喜欢在apple工作1314151天～ 「引用」、。",
    "ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ አማርኛ ⵜⵉⴼⵉⵏⴰⵖ ꦗꦮ 𐌰𐌱 𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "😀😃🦙 ✅ ☺ ☺️ ♥️",
    "👩‍👩‍👧‍👦 👨🏽‍💻 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ 😶‍🌫️",
    "a\u200bb\u200cc\u200dd\u2060e\ufefff",
    "\ufeffbyte order mark",
    "soft\u00adhyphen non\u00a0breaking",
    "\u00a0\u2003\u2028\u2029\u3000\u0085\u1680 spaces",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "\x00\x01\x02\x07\x08\x1b[31m\x7f\x80\x9f",
    "nul\x00in the middle",
    "\ufffd \ufffe \uffff \ue000 \U000f0000 \U0010ffff \U0001fffe",
    "$ £ € ¥ ₹ ₿ © ® ™ ° ± × ÷ ≠ ∑ ∫ √ ∞ → ⇒ █ ░ ─ ┼ “” ‘’ „“ « » … – —",
    "!!! ??? ... ,,, ;;; ::: --- ___ *** ### @@@ ~~~ ^^^ ||| \\\\\\ /// <<< >>> === +++ &&& %%% ```",
    "def f(x: int) -> str:\n    return f\"{x!r:>{10}}\"  # comment\n\n\nif __name__ == 'f':\n\tprint(f(0b1010))\n",
    '#include <stdio.h>\r\nint main(void) {\r\n    printf("%d\\n", 1 << 3);\r\n    return 0;\r\n}\r\n',
    "SELECT * FROM t WHERE a <> 'b''c' AND d >= 1e3;--",
    '<html><body class="x">&nbsp;<br/></body></html>',
    "https://example.org/path?q=1&r=%20#frag user@example.org",
    '{"key": [1, 2.5, null, true], "ünï": "\\u00e9"}',
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE x1y2z3 v1.2.3-rc4",
    "word" * 200,
    "supercalifragilisticexpialidocious" * 8,
    "é" * 300,
    "1" * 200,
    "=" * 150,
    " " * 100,
    "\n" * 70,
    "\t" * 70,
    "-" * 90 + " " * 90 + "x",
    "ha" * 120,
    "a b " * 60,
    " a" * 90,
    "\n \n" * 30,
    "\r\n" * 25,
    "The quick brown fox jumps over the lazy dog.",
    "<|begin_of_text|>",
    "a<|eot_id|>b",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|> x <|endoftext|>",
    "<bos>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    " <eos> <pad><unk><mask> ",
    "<|im_start|",
    "|im_start|>",
    "<<|im_start|>>",
    "<|im_start|><|im_start|>",
    "< eos>",
    "<eos",
    "<<eos>>",
    "<0x41>",
    "<0x0A><0xE4>",
    "[PAD8190]",
    "<s></s>",
    "[INST] x [/INST]",
    "▁",
    "▁▁x▁",
    "Ġ",
    "ĠaĊb",
    "Ã©",
]
"""Every script family, white space, sign and token-like text that a tokenizer could stumble over."""
