"""Perplexity by llama-perplexity's conventions (llama.cpp, tools/perplexity/perplexity.cpp), in bounded memory.

The text is tokenised once and cut into windows of 512. BOS replaces each window's first token where the
vocabulary adds it. Only positions 256 to 510 are scored, which predict tokens 257 to 511.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ValidationError
from impq_edge.validation.llama import Engine, Tokens
from impq_edge.validation.results import Score

WINDOW_TOKENS = 512
FIRST_SCORED = WINDOW_TOKENS // 2
SCORED_PER_WINDOW = WINDOW_TOKENS - 1 - FIRST_SCORED
CHUNK_TOKENS = 64
"""Scored positions are decoded this many at a time: their logits are what perplexity takes memory for."""


def measure_perplexity(
    engine: Engine, text: str, windows: int, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Score:
    """Score the first ``windows`` windows of a text, or all of them where it has fewer.

    Raises
    ------
    ValidationError
        When the text is shorter than one window.
    """
    cut = cut_windows(engine, text, windows)
    losses: list[NDArray[np.float64]] = []
    for index, window in enumerate(cut):
        loss = window_losses(engine, window)
        if not np.isfinite(loss).all():
            return summarise(losses, finite=False)
        losses.append(loss)
        progress(index + 1, len(cut))
    return summarise(losses, finite=True)


def cut_windows(engine: Engine, text: str, windows: int) -> list[Tokens]:
    """Return the first windows of a text, or all where it has fewer; refuse a text shorter than one."""
    tokens = engine.tokenize(text, add_special=True)
    count = min(windows, len(tokens) // WINDOW_TOKENS)
    if count == 0:
        raise ValidationError(
            f"The text is {len(tokens)} tokens long, shorter than one window of {WINDOW_TOKENS}; pass a longer text."
        )
    return [tokens[index * WINDOW_TOKENS : (index + 1) * WINDOW_TOKENS] for index in range(count)]


def window_losses(engine: Engine, window: Tokens) -> NDArray[np.float64]:
    """Return the NLL in nats of each scored token of one window, shape (255,)."""
    return np.concatenate([nll(logits, targets) for logits, targets in scored_logits(engine, window)])


def scored_logits(engine: Engine, window: Tokens) -> Iterator[tuple[NDArray[np.float32], Tokens]]:
    """Yield the logits of the scored positions, (tokens, vocabulary), with the tokens they are to predict."""
    inputs = window.copy()
    if engine.adds_bos:
        inputs[0] = engine.bos
    engine.clear()
    engine.decode(inputs[:FIRST_SCORED], outputs=0)
    for start in range(FIRST_SCORED, WINDOW_TOKENS - 1, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, WINDOW_TOKENS - 1)
        logits = engine.decode(inputs[start:stop], outputs=stop - start)
        yield logits, window[start + 1 : stop + 1]


def nll(logits: NDArray[np.float32], targets: Tokens) -> NDArray[np.float64]:
    """Return −log softmax(logits)[target] of each row, as llama-perplexity's ``log_softmax`` computes it.

    Parameters
    ----------
    logits
        Shape (tokens, vocabulary); overwritten.
    targets
        Shape (tokens,).
    """
    logits -= logits.max(axis=1, keepdims=True)
    target = logits[np.arange(len(targets)), targets].astype(np.float64)
    log_sum = np.log(np.exp(logits, out=logits).sum(axis=1, dtype=np.float64))
    result: NDArray[np.float64] = log_sum - target
    return result


def summarise(losses: Sequence[NDArray[np.float64]], finite: bool) -> Score:
    """Return the perplexity of the windows' losses, each (255,); none where one more window was not finite."""
    windows = tuple(float(loss.mean()) for loss in losses)
    scored = sum(len(loss) for loss in losses)
    if not finite:
        return Score(None, None, scored, windows)
    every = np.concatenate(losses)
    mean = float(every.mean())
    if mean > math.log(np.finfo(np.float64).max):
        return Score(None, None, scored, windows)
    value = math.exp(mean)
    # sqrt((E[x²] − E[x]²) / (n − 1)) · perplexity, as llama-perplexity prints it.
    return Score(value, value * math.sqrt(float(every.var()) / (scored - 1)), scored, windows)
