"""What is measured of a model's files: quality once a file, and a validation for every device and context.

Files are measured here first, and those of devices that are reached over ssh last, so that a device may be switched
on when everything else is done.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from impq_edge.impq.allocation import Allocation
from impq_edge.releases.lent import BackendLosses, lent_losses
from impq_edge.releases.making import Made, MadeModel
from impq_edge.releases.matrix import Cell, Matrix
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import found_from
from impq_edge.releases.quality import Quality, Yardsticks
from impq_edge.releases.telling import Say
from impq_edge.releases.trial import Reach, validated, validated_there
from impq_edge.spqe.table import Progress
from impq_edge.validation.report import ValidationReport


@dataclasses.dataclass(frozen=True)
class Taken:
    """A file for one device and context."""

    file: Made
    quality: Quality
    cell: Cell
    allocation: Allocation


@dataclasses.dataclass(frozen=True)
class Examined:
    """A model's files, and how they did here."""

    made: MadeModel
    taken: tuple[Taken, ...]
    uniform: dict[int, Quality]  # bits of all blocks → how that file did
    losses: dict[str, BackendLosses]  # key of a cell → what a backend that does not ship costs it
    calibration_sha256: str
    records: tuple[Path, ...]


def examine(matrix: Matrix, made: MadeModel, layout: Layout, say: Say, progress: Progress) -> Examined:
    """Measure everything that needs no other machine."""
    yardsticks = Yardsticks(matrix, made, layout, progress)
    uniform = {bits: yardsticks.at(bits) for bits in (4, 2)}
    taken = []
    for file in made.files:
        quality = yardsticks.of(file.artifact)
        taken += [Taken(file, quality, cell, allocation) for cell, allocation in file.taken]
    allocations = {layout.cell(made.row.name, t.cell.key) / "backend-losses.json": t.allocation for t in taken}
    losses = lent_losses(made.directory, made.found, allocations, matrix.encoding, say, progress)
    for each in taken:
        if each.cell.on is None:
            validation(matrix, made, each, layout, Reach(), say, progress)
    return Examined(
        made, tuple(taken), uniform, dict(zip((t.cell.key for t in taken), losses, strict=False)),
        yardsticks.calibration_sha256, (*yardsticks.records, *(allocations if losses else ())),
    )  # fmt: skip


def validation(
    matrix: Matrix, made: MadeModel, taken: Taken, layout: Layout, reach: Reach, say: Say, progress: Progress
) -> ValidationReport:
    """Measure a file as its device runs it, here or there, unless that is known already."""
    cell, artifact = taken.cell, taken.file.artifact
    path, record = layout.root / artifact.artifact, validation_record(made, cell, layout)
    if cell.on is None:
        return validated(
            path, artifact, cell.device, taken.allocation, matrix.text, matrix.order.windows, True, progress, record
        )
    say(f"Measuring {artifact.artifact} on {cell.device.name}, over ssh.")
    return validated_there(
        cell.on, path, artifact, (found_from(matrix.base, cell.asked), cell.device), taken.allocation, matrix.text,
        matrix.order.windows, reach, say, progress, record,
    )  # fmt: skip


def validation_record(made: MadeModel, cell: Cell, layout: Layout) -> Path:
    """Return where the report of a file on a device lies."""
    return layout.cell(made.row.name, cell.key) / "validation.json"


def by_file(examined: Examined) -> Iterator[tuple[Made, list[Taken]]]:
    """Yield every file with what it is for."""
    for file in examined.made.files:
        yield file, [taken for taken in examined.taken if taken.file is file]
