"""What every stage begins with: the checkpoint, its record, the text, and where to compute."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.data import data_path
from impq_edge.errors import SensitivityError
from impq_edge.ggml.types import TensorType
from impq_edge.model.calibration import Windows, read_windows
from impq_edge.model.recipe import fallbacks, require_no_fallback
from impq_edge.model.source import Source, fetch, find
from impq_edge.model.spec import ModelSpec, changed_files, read_model
from impq_edge.model.watched import changed

if TYPE_CHECKING:
    from impq_edge.spqe.table import Progress

_MIB = 2**20


def open_model(
    model: str | Source, revision: str | None = None, progress: "Progress" = lambda *_: None
) -> tuple[Path, ModelSpec]:
    """Find a checkpoint, download what is missing of it, and read its record.

    Raises
    ------
    ModelError
        When it cannot be used, or is no longer what ``model`` says it held.
    """
    source = find(model, revision) if isinstance(model, str) else model
    directory = fetch(source, in_mebibytes("downloading, MiB", source.download_bytes, progress))

    def hashed(done: int, total: int) -> None:
        progress("hashing the checkpoint, MiB", done // _MIB, total // _MIB)

    spec = read_model(directory, source.name, hashed)
    if source.content_sha256 not in (None, spec.content_sha256):
        raise changed(*(directory / name for name in changed_files(spec.content_sha256, source.content_sha256)))
    return directory, spec


def tokenizer_of(directory: Path, spec: ModelSpec) -> Tokenizer:
    """Read a checkpoint's tokenizer as its GGUF will hold it."""
    return read_tokenizer(directory, spec.hyperparameters.vocabulary, spec.hyperparameters.architecture)


def calibration_text(text: Path | None) -> Path:
    """Return the text that was asked for, or the shipped one."""
    return text or data_path("demo", "calibration.txt")


def calibration_windows(directory: Path, text: Path | None, tokens: int, window_tokens: int) -> Windows:
    """Cut windows from a text, the shipped calibration text by default."""
    return read_windows(directory, calibration_text(text), tokens, window_tokens)


def require_rows(spec: ModelSpec, allow_fallback: bool, outer: TensorType = TensorType.Q6_K) -> None:
    """Refuse a model whose rows hold no K-quants, unless the substitution is allowed."""
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, TensorType.Q2_K, outer))


def require_compute(compute: str | None) -> str:
    """Return where the game is played: what was asked for, else CUDA where there is a GPU.

    Raises
    ------
    SensitivityError
        When CUDA is asked for and there is none.
    """
    import torch

    if compute == "cuda" and not torch.cuda.is_available():
        raise SensitivityError("--compute cuda was asked for, but PyTorch sees no GPU; use --compute cpu.")
    return compute or ("cuda" if torch.cuda.is_available() else "cpu")


def in_mebibytes(phase: str, total_bytes: int, progress: "Progress") -> Callable[[int], None]:
    """Turn steps in bytes into a phase in MiB."""
    done_bytes = 0

    def advance(step_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes = min(done_bytes + step_bytes, total_bytes)
        progress(phase, done_bytes // _MIB, total_bytes // _MIB)

    return advance
