"""Quantisation backends: each takes a weight and returns it as its library would store it.

Adding one is a file beside this one, with a class like those here, and a line in ``_CLASSES``.
"""

import dataclasses
import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol

from impq_edge.errors import BackendError

if TYPE_CHECKING:
    import torch

Bits = Literal[2, 4]
BITS: tuple[Bits, Bits] = (2, 4)
"""The two versions of every block; names of formats rather than exact storage, see ``bits_per_weight``."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight after a round trip through a backend's storage."""

    weight: "torch.Tensor"  # (out, in), float32, on the device it came from
    bits_per_weight: float  # what the storage really takes, scales and zeros included


class Backend(Protocol):
    """What the game needs of a backend; the dataclass fields of an implementation are its settings."""

    LIBRARY: str

    def quantise(self, weight: "torch.Tensor", bits: Bits) -> Stored:
        """Return ``weight`` (out, in; float32) as stored at 2 or 4 bit."""
        ...


_CLASSES = {
    "kquant": ("impq_edge.backends.kquant", "KQuant"),
    "hqq": ("impq_edge.backends.hqq", "Hqq"),
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
        backend: Backend = getattr(importlib.import_module(module), attribute)(**settings)
    except ImportError as error:
        raise BackendError(f"Backend {name!r} needs {error.name}; install impq-edge[workstation].") from None
    except TypeError as error:
        raise BackendError(f"Backend {name!r} does not take these settings ({error}); see its options.") from None
    return backend


def describe(name: str, backend: Backend) -> dict[str, str | int | float | bool]:
    """Return what a profile records of a backend: its name, settings and its library's version."""
    settings = dataclasses.asdict(backend)  # type: ignore[call-overload]
    return {"name": name, "library": f"{backend.LIBRARY} {metadata.version(backend.LIBRARY)}", **settings}
