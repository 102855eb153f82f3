"""Measuring a file once: a report of the same file and the same request is taken as it is."""

from pathlib import Path

from impq_edge.conversion.artifact import Artifact
from impq_edge.devices.profile import DeviceProfile
from impq_edge.impq.allocation import Allocation
from impq_edge.spqe.table import Progress
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.validate import FILL_S, request_sha256, validate


def validated(
    path: Path,
    artifact: Artifact,
    device: DeviceProfile,
    allocation: Allocation,
    text: Path,
    windows: int,
    ships: bool,
    progress: Progress,
    record: Path | None = None,
) -> ValidationReport:
    """Measure a file, unless the record of the same measurement is there already: beside it, or where it is told.

    The device's limit of memory, and the check of it that fills the whole context, are for the file that ships: one
    that it is compared with may be too large for the device.
    """
    fill_s = FILL_S if ships else 0.0
    context_tokens, kv_type = allocation.context_tokens, allocation.kv_type
    wanted = request_sha256(
        device, text, windows=windows, context_tokens=context_tokens, kv_type=kv_type, fill_s=fill_s
    )
    record = record or path.with_name(f"{path.name}.validation.json")
    if record.exists():
        found = ValidationReport.load(record)
        if found.sha256 == artifact.sha256 and found.request_sha256 == wanted:
            return found
    report = validate(
        path, device=device, text=text, windows=windows, context_tokens=allocation.context_tokens,
        kv_type=allocation.kv_type, fill_s=fill_s, memory_limit_bytes="device" if ships else None, progress=progress,
    )  # fmt: skip
    report.save(record)
    return report
