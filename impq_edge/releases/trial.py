"""Measuring a file once: a report of the same file and the same request is taken as it is."""

import dataclasses
from pathlib import Path

from impq_edge.conversion.artifact import Artifact
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import RecordError, ValidationError
from impq_edge.impq.allocation import Allocation
from impq_edge.records import sha256_file, sha256_json
from impq_edge.releases.telling import Say
from impq_edge.spqe.table import Progress
from impq_edge.validation.remote.environment import Agree
from impq_edge.validation.remote.run import Clean, validate_on
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.validate import FILL_S, request_sha256, validate


@dataclasses.dataclass(frozen=True)
class Reach:
    """How devices are reached over ssh; see :func:`~impq_edge.validation.remote.run.validate_on`."""

    wheels: Path | None = None
    python: str | None = None
    ssh: str = "ssh"
    clean: Clean = "nothing"
    agree: Agree = lambda _question: False


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
    if (found := _kept(record, artifact, wanted)) is not None:
        return found
    report = validate(
        path, device=device, text=text, windows=windows, context_tokens=allocation.context_tokens,
        kv_type=allocation.kv_type, fill_s=fill_s, memory_limit_bytes="device" if ships else None, progress=progress,
    )  # fmt: skip
    if report.sha256 != artifact.sha256:
        raise RecordError(f"{path} was changed by something else before it was measured; run the same command again.")
    report.save(record)
    return report


def validated_there(
    host: str,
    path: Path,
    artifact: Artifact,
    device: tuple[str, DeviceProfile],
    allocation: Allocation,
    text: Path,
    windows: int,
    reach: Reach,
    say: Say,
    progress: Progress,
    record: Path,
) -> ValidationReport:
    """Measure a file that ships on the device itself, unless the record of the same measurement is there already.

    What ``request_sha256`` of the record stands for is known here without asking the device.

    Parameters
    ----------
    device
        A shipped name or the path of a TOML, and the profile that it names.

    Raises
    ------
    ValidationError
        When the device cannot be reached, or the file cannot be measured there.
    """
    name, profile = device
    context_tokens, kv_type = allocation.context_tokens, allocation.kv_type
    wanted = sha256_json(
        {
            "on": host, "device": profile.to_json(), "text": sha256_file(text), "windows": windows,
            "context_tokens": context_tokens, "kv_type": kv_type, "fill_s": FILL_S,
        }
    )  # fmt: skip
    if (found := _kept(record, artifact, wanted)) is not None:
        return found
    options = {
        "windows": windows, "context_tokens": context_tokens, "kv_type": kv_type, "fill_s": FILL_S,
        "memory_limit_bytes": "device",
    }  # fmt: skip
    try:
        report = validate_on(
            host, path, device=name, text=text, options=options, wheels=reach.wheels, python=reach.python,
            ssh=reach.ssh, clean=reach.clean, agree=reach.agree, say=say, progress=progress,
        )  # fmt: skip
    except ValidationError as error:
        raise type(error)(
            f"{profile.name} was not measured: {error} What has been built stays, and the same command goes on with it."
        ) from None
    report = dataclasses.replace(report, request_sha256=wanted)
    report.save(record)
    return report


def _kept(record: Path, artifact: Artifact, wanted: str) -> ValidationReport | None:
    if not record.exists():
        return None
    found = ValidationReport.load(record)
    return found if (found.sha256, found.request_sha256) == (artifact.sha256, wanted) else None
