"""Calibration text as windows of tokens, cut the way llama-perplexity cuts its text."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ModelError
from impq_edge.records import read_text, shown_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_WINDOW_TOKENS = 512
DEFAULT_CALIBRATION_TOKENS = 16384
"""Half of the demo's blocks at 2 bit by GPTQ diverge by 0.0354 nats per token when it saw 4,096 tokens, by 0.0298 when
it saw 16,384, and by 0.0292 when it saw 49,152 (standard errors 0.0005)."""

_CHARACTERS_PER_TOKEN = 8  # a first guess; English has about four
_UNSURE_TOKENS = 256  # no word is that long


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of tokens and the identity of the text they were cut from."""

    tokens: NDArray[np.int64]  # (windows, window length)
    text_sha256: str

    def first(self, tokens: int) -> "Windows":
        """Return the first windows, at most so many tokens of them and at least one window."""
        return Windows(self.tokens[: max(1, tokens // self.tokens.shape[1])], self.text_sha256)


def read_windows(directory: Path, text: Path, tokens: int, window_tokens: int) -> Windows:
    """Tokenise a text once and cut it into windows, dropping what is left over.

    Where the tokenizer adds a BOS token, it *replaces* the first token of each window, as in
    llama.cpp's tools/perplexity/perplexity.cpp, so that the game is played on what is measured later.

    Parameters
    ----------
    directory
        The checkpoint, for its ``tokenizer.json``.
    text
        A UTF-8 file.
    tokens
        At most this many tokens are used, rounded down to whole windows.
    window_tokens
        Length of a window.

    Raises
    ------
    ModelError
        When the text is shorter than one window, or no window is asked for.
    """
    from tokenizers import Tokenizer

    if tokens < window_tokens:
        raise ModelError(f"--tokens {tokens} is less than one window of {window_tokens}; ask for more tokens.")
    content = read_text(text)
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower class
        raise ModelError(f"{path} cannot be used ({shown_text(str(error))}); download the checkpoint again.") from None
    ids = _first_ids(tokenizer, content, tokens)
    count = min(tokens, len(ids)) // window_tokens
    if count == 0:
        raise ModelError(f"{text} has {len(ids)} tokens, less than one window of {window_tokens}; use a longer text.")
    windows = ids[: count * window_tokens].reshape(count, window_tokens)
    bos = _bos_id(tokenizer)
    if bos is not None:
        windows[:, 0] = bos
    return Windows(windows, hashlib.sha256(content.encode()).hexdigest())


def _first_ids(tokenizer: "Tokenizer", content: str, tokens: int) -> NDArray[np.int64]:
    """Tokenise no more of a long text than is needed; the last tokens before a cut may be wrong and are dropped."""
    characters = _CHARACTERS_PER_TOKEN * tokens
    while True:
        ids = tokenizer.encode(content[:characters], add_special_tokens=False).ids
        if characters >= len(content) or len(ids) >= tokens + _UNSURE_TOKENS:
            return np.array(ids, dtype=np.int64)
        characters *= 2


def _bos_id(tokenizer: "Tokenizer") -> int | None:
    """Return the token that encoding puts in front of any text, None if there is no such token."""
    framed, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    return None if framed[0] == plain[0] else int(framed[0])
