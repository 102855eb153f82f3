"""Kullback-Leibler divergence of a file to a reference, by llama-perplexity's conventions, in bounded memory.

``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity/perplexity.cpp) first writes the reference's
log-probabilities to disk, 2 bytes a number: 37 GB for 600 windows and a vocabulary of 128,256. Here both models are
run side by side and compared 64 tokens at a time. The windows, the scored positions and the statistics are
llama-perplexity's; the numbers differ from it only in that its log-probabilities are rounded to 16 bit of a window
of 16 nats, below which it takes them for 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ValidationError
from impq_edge.validation.llama import Engine, Tokens
from impq_edge.validation.perplexity import cut_windows, scored_logits, summarise
from impq_edge.validation.results import Divergence, Score

Values = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Compared:
    """Both predictions of some tokens; each field of shape (tokens,)."""

    nll: Values  # nats, of the file
    reference_nll: Values
    kld: Values
    same_top: NDArray[np.bool_]

    @classmethod
    def join(cls, parts: "list[Self]") -> Self:
        """Put the tokens of several parts one after another."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))


def measure_divergence(
    engine: Engine,
    reference: Engine,
    text: str,
    windows: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Score, Divergence | None]:
    """Compare two models on the first ``windows`` windows of a text, or all of them where it has fewer.

    Returns
    -------
    The file's own perplexity, as :func:`impq_edge.validation.perplexity.measure_perplexity` finds it, and its
    divergence from the reference; None where a prediction of the file is not finite.

    Raises
    ------
    ValidationError
        When the text is shorter than one window, the two have different vocabularies, or the reference's
        predictions are not finite.
    """
    cut = cut_windows(engine, text, windows)
    _require_same_vocabulary(engine, reference, cut, text)
    done: list[Compared] = []
    for index, window in enumerate(cut):
        both = zip(scored_logits(engine, window), scored_logits(reference, window), strict=True)
        found = Compared.join([compare_tokens(ours, theirs, targets) for (ours, targets), (theirs, _) in both])
        if not np.isfinite(found.reference_nll).all():
            raise ValidationError(
                f"The reference's loss is not finite in window {index + 1}; its weights are broken, make it anew."
            )
        if not np.isfinite(found.nll + found.kld).all():
            return summarise([part.nll for part in done], finite=False), None
        done.append(found)
        progress(index + 1, len(cut))
    score = summarise([part.nll for part in done], finite=True)
    return score, (summarise_divergence(done) if score.perplexity is not None else None)


def compare_tokens(logits: NDArray[np.float32], reference: NDArray[np.float32], targets: Tokens) -> Compared:
    """Compare the predictions of some tokens.

    Parameters
    ----------
    logits, reference
        Shape (tokens, vocabulary); overwritten.
    targets
        What the text has there, shape (tokens,).
    """
    rows = np.arange(len(targets))
    same_top = logits.argmax(axis=1) == reference.argmax(axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    reference -= reference.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
    weights = np.exp(reference)
    weight_sum = weights.sum(axis=1, dtype=np.float64)
    reference_log_sum = np.log(weight_sum)
    # Σ p (ln p − ln q) with the logarithms of the two sums, which no token changes, taken out: those in float64.
    gap = np.subtract(reference, logits, out=np.zeros_like(reference), where=weights > 0)  # 0 · ln 0 is 0
    kld = (weights * gap).sum(axis=1, dtype=np.float64) / weight_sum + log_sum - reference_log_sum
    return Compared(
        nll=log_sum - logits[rows, targets],
        reference_nll=reference_log_sum - reference[rows, targets],
        kld=kld,
        same_top=same_top,
    )


def summarise_divergence(windows: list[Compared]) -> Divergence:
    """Return the statistics that llama-perplexity prints, of windows of equal length with finite predictions."""
    reference = summarise([part.reference_nll for part in windows], finite=True)
    if reference.perplexity is None or reference.stderr is None:
        raise ValidationError("The reference's perplexity overflows; its weights are broken, make it anew.")
    every = Compared.join(windows)
    kld_mean, kld_stderr = mean_and_error(every.kld)
    delta_p = np.exp(-every.nll) - np.exp(-every.reference_nll)
    delta_p_mean, delta_p_stderr = mean_and_error(delta_p)
    square, square_stderr = mean_and_error(delta_p**2)
    rms = math.sqrt(square)
    same = float(every.same_top.mean())
    log_ratio, log_ratio_stderr = mean_and_error(every.nll - every.reference_nll)
    return Divergence(
        tokens=len(every.kld),
        kld_mean=kld_mean,
        kld_stderr=kld_stderr,
        kld_median=float(np.median(every.kld)),
        kld_p99=float(np.quantile(every.kld, 0.99)),
        kld_max=float(every.kld.max()),
        delta_p_mean=delta_p_mean,
        delta_p_stderr=delta_p_stderr,
        delta_p_rms=rms,
        delta_p_rms_stderr=square_stderr / (2 * rms) if rms else 0.0,
        same_top=same,
        same_top_stderr=math.sqrt(same * (1 - same) / (len(every.kld) - 1)),
        perplexity_ratio=math.exp(log_ratio),
        perplexity_ratio_stderr=math.exp(log_ratio) * log_ratio_stderr,
        reference_perplexity=reference.perplexity,
        reference_perplexity_stderr=reference.stderr,
        window_klds=tuple(float(part.kld.mean()) for part in windows),
        reference_window_nlls=reference.window_nlls,
    )


def mean_and_error(values: Values) -> tuple[float, float]:
    """Return the mean and its standard error, sqrt((E[x²] − E[x]²) / (n − 1))."""
    return float(values.mean()), math.sqrt(float(values.var()) / (len(values) - 1))


def _require_same_vocabulary(engine: Engine, reference: Engine, cut: list[Tokens], text: str) -> None:
    if engine.vocabulary != reference.vocabulary:
        raise ValidationError(
            f"The file has a vocabulary of {engine.vocabulary} tokens and the reference one of "
            f"{reference.vocabulary}; pass the F16 of the same model."
        )
    first = [model.bos if model.adds_bos else None for model in (engine, reference)]
    theirs = cut_windows(reference, text, len(cut))
    if first[0] != first[1] or not np.array_equal(np.concatenate(cut), np.concatenate(theirs)):
        raise ValidationError(
            "The file and the reference tokenise the text differently; pass the F16 of the same model."
        )
