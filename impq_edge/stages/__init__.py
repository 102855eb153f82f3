"""The stages as functions: records in, records out. What the command line calls, and notebooks may."""

from impq_edge.stages.allocating import OUTER_TYPES, allocate, allocation_request, require_allocatable
from impq_edge.stages.converting import FILE_TYPES, convert, imatrix, record_path, uniform_types
from impq_edge.stages.measuring import ladder, load_profile, measured_types, profile
from impq_edge.stages.opening import calibration_windows, open_model, require_compute, require_rows

__all__ = [
    "FILE_TYPES",
    "OUTER_TYPES",
    "allocate",
    "allocation_request",
    "calibration_windows",
    "convert",
    "imatrix",
    "ladder",
    "load_profile",
    "measured_types",
    "open_model",
    "profile",
    "record_path",
    "require_allocatable",
    "require_compute",
    "require_rows",
    "uniform_types",
]
