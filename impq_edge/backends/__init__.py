"""Quantisation backends: each takes a weight and returns it as its library would store it.

Adding one is a file beside this one, with a class like those here, and a line in ``_CLASSES``.
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from impq_edge.errors import BackendError

if TYPE_CHECKING:
    import torch

Bits = Literal[2, 4]
BITS: tuple[Bits, Bits] = (2, 4)
"""The two versions of every player; names of formats rather than exact storage, see ``bits_per_weight``."""

Statistics = Literal["none", "squares", "hessian"]
"""What a backend wants to know of a matrix's inputs."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What enters a matrix on the calibration text when nothing is quantised."""

    tokens: int
    mean_square: "torch.Tensor"  # (in,), float32: mean over tokens of x_j²
    second_moment: "torch.Tensor | None"  # (in, in), float32: mean over tokens of x xᵀ; None unless asked for


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight after a round trip through a backend's storage."""

    weight: "torch.Tensor"  # (out, in), float32, on the device it came from
    bits_per_weight: float  # what the storage really takes, scales and zeros included


class Backend(Protocol):
    """What the game needs of a backend; the dataclass fields of an implementation are its settings."""

    LIBRARY: ClassVar[str]

    @property
    def statistics(self) -> Statistics:
        """What :meth:`quantise` must be given of the inputs."""
        ...

    def quantise(self, weight: "torch.Tensor", bits: Bits, inputs: Inputs | None = None) -> Stored:
        """Return ``weight`` (out, in; float32) as stored at 2 or 4 bit.

        ``inputs`` is None where ``statistics`` is ``"none"``.
        """
        ...


_CLASSES = {
    "kquant": ("impq_edge.backends.kquant", "KQuant"),
    "hqq": ("impq_edge.backends.hqq", "Hqq"),
    "quanto": ("impq_edge.backends.quanto", "Quanto"),
    "gptq": ("impq_edge.backends.gptq", "Gptq"),
}
NAMES = tuple(_CLASSES)


def load_backend(name: str, **settings: Any) -> Backend:
    """Import a backend's library and return it with the given settings, the library's defaults otherwise.

    Raises
    ------
    BackendError
        When the name is unknown, the library is not installed, or a setting is not one of the backend's.
    """
    if name not in _CLASSES:
        raise BackendError(f"Backend {name!r} is unknown; choose one of {', '.join(NAMES)}.")
    module, attribute = _CLASSES[name]
    try:
        with undisturbed():
            chosen = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendError(f"Backend {name!r} needs {error.name}; install impq-edge[workstation].") from None
    known = {field.name: field.type for field in dataclasses.fields(chosen)}
    for setting, value in settings.items():
        if setting not in known:
            raise BackendError(
                f"Backend {name!r} has no setting {setting.replace('_', '-')!r}; it takes "
                f"{', '.join(k.replace('_', '-') for k in known) or 'none'}."
            )
        fits = type(value) is known[setting] or (known[setting] is float and type(value) is int)
        if not fits:
            raise BackendError(
                f"Backend {name!r} takes {setting.replace('_', '-')} as {getattr(known[setting], '__name__', '?')}, "
                f"not {value!r}."
            )
    backend: Backend = chosen(**settings)
    return backend


class _Muted(io.TextIOBase):
    """Swallows text until released, then passes it on: libraries bind their log handlers to it on import."""

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        self._stream = stream
        self.released = False

    def write(self, text: str) -> int:
        written: int = getattr(sys, self._stream).write(text) if self.released else len(text)
        return written

    def flush(self) -> None:
        if self.released:
            getattr(sys, self._stream).flush()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let a library be imported or run without its banner, its log and its changes of the environment.

    gptqmodel prints a banner, configures the root logger, adds warning filters, and sets
    CUDA_DEVICE_ORDER and PYTORCH_ALLOC_CONF, on import.
    """
    root = logging.root
    environment, disabled, handlers, level = dict(os.environ), root.manager.disable, root.handlers[:], root.level
    out, err = _Muted("stdout"), _Muted("stderr")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        out.released = err.released = True
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)


def load_recorded(recorded: Mapping[str, Any]) -> Backend:
    """Load the backend that :func:`describe` recorded, whatever its library's version is now."""
    settings = {key: value for key, value in recorded.items() if key not in ("name", "library")}
    return load_backend(str(recorded.get("name")), **settings)


def describe(name: str, backend: Backend) -> dict[str, str | int | float | bool]:
    """Return what a profile records of a backend: its name, settings and its library's version."""
    settings = dataclasses.asdict(backend)  # type: ignore[call-overload]
    return {"name": name, "library": f"{backend.LIBRARY} {metadata.version(backend.LIBRARY)}", **settings}
