"""The stages as functions: records in, records out. What the command line calls, and notebooks may.

Each module is imported when one of its functions is first used: writing needs no PyTorch where nothing is calibrated.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impq_edge.stages.allocating import (
        OUTER_TYPES,
        allocate,
        allocation_request,
        chooses,
        require_allocatable,
        require_no_program,
    )
    from impq_edge.stages.converting import FILE_TYPES, convert, imatrix, record_path, uniform_types
    from impq_edge.stages.measuring import ladder, load_profile, measured_types, profile
    from impq_edge.stages.opening import calibration_windows, open_model, require_compute, require_rows
    from impq_edge.stages.planning import plan

__all__ = [
    "FILE_TYPES",
    "OUTER_TYPES",
    "allocate",
    "allocation_request",
    "calibration_windows",
    "chooses",
    "convert",
    "imatrix",
    "ladder",
    "load_profile",
    "measured_types",
    "open_model",
    "plan",
    "profile",
    "record_path",
    "require_allocatable",
    "require_compute",
    "require_no_program",
    "require_rows",
    "uniform_types",
]

_HOMES = {
    "FILE_TYPES": "converting",
    "OUTER_TYPES": "allocating",
    "allocate": "allocating",
    "allocation_request": "allocating",
    "calibration_windows": "opening",
    "chooses": "allocating",
    "convert": "converting",
    "imatrix": "converting",
    "ladder": "measuring",
    "load_profile": "measuring",
    "measured_types": "measuring",
    "open_model": "opening",
    "plan": "planning",
    "profile": "measuring",
    "record_path": "converting",
    "require_allocatable": "allocating",
    "require_compute": "opening",
    "require_no_program": "allocating",
    "require_rows": "opening",
    "uniform_types": "converting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"impq_edge.stages.{_HOMES[name]}"), name)
