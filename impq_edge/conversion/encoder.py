"""Who turns weights into bytes: what the writer asks, and what may be asked for.

:mod:`impq_edge.conversion.calibrated` passes a text through the model to know what enters every matrix.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from impq_edge.conversion.imatrix import Imatrix
from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import DEFAULT_ENCODER, ENCODERS
from impq_edge.ggml.types import TensorType
from impq_edge.model.calibration import DEFAULT_CALIBRATION_TOKENS, DEFAULT_WINDOW_TOKENS, Windows
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import sha256_file

UNWEIGHTED = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0)
"""Types whose bytes depend on the weights alone, whoever encodes."""


class Encoder(Protocol):
    """The writer asks for the tensors in the order of the file, each once."""

    def importance(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.float32] | None:
        """Return how much an error counts in each column, (row length,), for ggml's encoder; None: all alike."""
        ...

    def solved(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.uint8] | None:
        """Return the bytes (rows, bytes per row), rows as in the checkpoint; None: ggml's encoder is to do it."""
        ...


class PlainEncoder:
    """ggml's encoder without an importance matrix, as ``llama-quantize`` by default."""

    def importance(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.float32] | None:  # noqa: ARG002
        """Return None: all columns count alike."""
        return None

    def solved(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.uint8] | None:  # noqa: ARG002
        """Return None: ggml's encoder does everything."""
        return None


class ImatrixEncoder(PlainEncoder):
    """ggml's encoder with an importance matrix that was read from a file."""

    def __init__(self, imatrix: Imatrix) -> None:
        self._imatrix = imatrix

    def importance(self, tensor: TensorSpec, kind: TensorType) -> NDArray[np.float32] | None:  # noqa: ARG002
        """Return the file's mean squares; None for a tensor it does not know, as ``llama-quantize`` does."""
        return self._imatrix.importance(tensor.gguf_name)


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How weights become bytes."""

    encode: str | None = None  # one of ENCODERS; the backend's default, or imatrix where a file of one is given
    calibration: Path | None = None  # a UTF-8 text; the one that ships by default
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    compute: str | None = None  # "cuda" or "cpu"; CUDA when there is one by default
    imatrix: Path | None = None  # llama.cpp's file, in place of a text

    def __post_init__(self) -> None:
        if self.encode not in (None, *ENCODERS):
            raise ConversionError(f"--encode {self.encode} is unknown; choose one of {', '.join(ENCODERS)}.")
        if self.imatrix is not None and self.encode not in (None, "imatrix"):
            raise ConversionError(
                f"--imatrix {self.imatrix} has no effect with --encode {self.encode}; leave one of the two out."
            )
        if self.calibration_tokens < self.window_tokens:
            raise ConversionError(
                f"--calibration-tokens {self.calibration_tokens} is less than one window of {self.window_tokens}; "
                "ask for more tokens."
            )

    @property
    def encoder(self) -> str:
        """Which encoder that is."""
        return "imatrix" if self.imatrix else self.encode or DEFAULT_ENCODER


@dataclasses.dataclass(frozen=True)
class Opened:
    """An encoder, and what a file's papers tell of it."""

    encoder: Encoder
    facts: dict[str, str | int]  # everything the bytes depend on besides weights and types
    imatrix: Imatrix | None = None  # that was read from a file


def open_encoder(
    directory: Path,
    spec: ModelSpec,
    types: TensorTypes,
    options: EncodeOptions,
    windows: Callable[[], Windows],
    device: Callable[[], str],
    kept: Path,
    progress: Callable[[int, int], None],
) -> Opened:
    """Get an encoder ready for a file; no text is passed through the model before the writer asks.

    Parameters
    ----------
    directory, spec, types
        The checkpoint and what its tensors are to be stored in.
    options
        What was asked for.
    windows, device
        Say what text passes through the model and where, ``cuda`` or ``cpu``; asked if one does.
    kept
        A directory for what GPTQ makes, and where it is found again.
    progress
        Told how many blocks the text has passed, and how many there are.

    Raises
    ------
    ConversionError, ModelError
        When the importance matrix is not this model's, or the text is too short.
    """
    if set(types.values()) <= set(UNWEIGHTED):
        return Opened(PlainEncoder(), {})
    if options.encoder == "rtn":
        return Opened(PlainEncoder(), {"encode": "rtn"})
    if options.imatrix is not None:
        imatrix = Imatrix.read(options.imatrix)
        imatrix.require_for(spec)
        return Opened(
            ImatrixEncoder(imatrix), {"encode": "imatrix", "imatrix_sha256": sha256_file(options.imatrix)}, imatrix
        )
    from impq_edge.backends.kquant import KQuant
    from impq_edge.conversion.calibrated import open_calibrated

    encoder, facts = open_calibrated(directory, spec, windows(), KQuant(options.encoder), device(), kept, progress)
    return Opened(encoder, facts)
