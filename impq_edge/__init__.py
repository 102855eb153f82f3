"""impq-edge: the best mixed-precision GGUF that fits an edge device, and the proof of it.

The stages are functions; the command line only calls them. Each is imported when it is first used, so
that the base install (no torch) can validate.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impq_edge.conversion.encoder import EncodeOptions
    from impq_edge.devices.profile import device_names, load_device
    from impq_edge.releases.build import build
    from impq_edge.releases.order import load_order
    from impq_edge.releases.release import release
    from impq_edge.releases.verify import verify
    from impq_edge.spqe.options import GameOptions
    from impq_edge.stages import allocate, convert, imatrix, ladder, plan, profile
    from impq_edge.validation.validate import validate

__all__ = [
    "EncodeOptions", "GameOptions", "allocate", "build", "convert", "device_names", "imatrix", "ladder", "load_device",
    "load_order", "plan", "profile", "release", "validate", "verify",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "EncodeOptions": "impq_edge.conversion.encoder",
    "GameOptions": "impq_edge.spqe.options",
    "allocate": "impq_edge.stages",
    "build": "impq_edge.releases.build",
    "convert": "impq_edge.stages",
    "device_names": "impq_edge.devices.profile",
    "imatrix": "impq_edge.stages",
    "ladder": "impq_edge.stages",
    "load_device": "impq_edge.devices.profile",
    "load_order": "impq_edge.releases.order",
    "plan": "impq_edge.stages",
    "profile": "impq_edge.stages",
    "release": "impq_edge.releases.release",
    "validate": "impq_edge.validation.validate",
    "verify": "impq_edge.releases.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
