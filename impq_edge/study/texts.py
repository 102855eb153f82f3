"""Which stretches of a text are calibrated on, and which are examined."""

import hashlib
from pathlib import Path

import numpy as np

from impq_edge.errors import ModelError
from impq_edge.model.calibration import Windows, read_windows

_WHOLE = 1 << 24  # tokens: more than any text here has


def calibration_stretch(directory: Path, text: Path, seed: int, tokens: int, window_tokens: int) -> Windows:
    """Return a seed's stretch of the first half of a text; no two seeds share a window.

    Raises
    ------
    ModelError
        When the first half does not have so many stretches.
    """
    windows = read_windows(directory, text, _WHOLE, window_tokens).tokens
    count = tokens // window_tokens
    chosen = windows[: len(windows) // 2][seed * count : (seed + 1) * count]
    if len(chosen) < count:
        raise ModelError(
            f"The first half of {text} has {len(windows) // 2} windows of {window_tokens} tokens, too few for seed "
            f"{seed} at {tokens} tokens; use a longer text or a lower seed."
        )
    return _named(chosen)


def exam_stretch(directory: Path, text: Path, count: int, window_tokens: int, *, second_half: bool) -> Windows:
    """Return windows spread evenly over a text, or over its second half where the first was calibrated on."""
    windows = read_windows(directory, text, _WHOLE, window_tokens).tokens
    rest = windows[(len(windows) + 1) // 2 :] if second_half else windows
    return _named(rest[np.linspace(0, len(rest) - 1, min(count, len(rest))).round().astype(int)])


def _named(windows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Windows:
    return Windows(windows, hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest())
