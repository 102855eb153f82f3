"""The steps of a release that make its files: one sensitivity run a model, allocations, and each file once.

A step whose record is there and was made from the same inputs is not done again, so that a release that was killed
goes on, and one that has grown by a device makes what is new.
"""

import dataclasses
from pathlib import Path

from impq_edge.conversion.artifact import Artifact
from impq_edge.impq.allocation import Allocation
from impq_edge.model.spec import ModelSpec
from impq_edge.records import sha256_json
from impq_edge.releases.agreement import require_same_text
from impq_edge.releases.matrix import Cell, Matrix, Profile, Row, open_row
from impq_edge.releases.naming import Layout, file_name
from impq_edge.releases.telling import Say, say_allocation
from impq_edge.spqe.table import Progress
from impq_edge.stages import allocate, convert, ladder, load_profile, profile, record_path


@dataclasses.dataclass(frozen=True)
class Made:
    """A file and the cells that take it."""

    artifact: Artifact
    taken: tuple[tuple[Cell, Allocation], ...]  # the file holds the first one's recipe


@dataclasses.dataclass(frozen=True)
class MadeModel:
    """Everything that was made of one model."""

    row: Row
    directory: Path
    spec: ModelSpec
    found: Profile
    files: tuple[Made, ...]


def make_model(matrix: Matrix, row: Row, layout: Layout, say: Say, progress: Progress) -> MadeModel:
    """Measure a model once, allocate for every cell, and write each file."""
    row, directory, spec = open_row(matrix, row, progress)
    found = _sensitivity(matrix, row, directory, layout, say, progress)
    taken = [(cell, _allocation(matrix, row.name, cell, found, layout, say)) for cell in row.cells]
    files = []
    for name, sharing in share(taken).items():
        artifact = convert(
            row.source, out=layout.root / name, allocation=sharing[0][1], encode=matrix.encoding,
            kept=layout.kept(row.name), allow_fallback=matrix.order.allow_fallback, say=say, progress=progress,
        )  # fmt: skip
        files.append(Made(artifact, sharing))
    return MadeModel(row, directory, spec, found, tuple(files))


def share(taken: list[tuple[Cell, Allocation]]) -> dict[str, tuple[tuple[Cell, Allocation], ...]]:
    """Put together what can be one file, under the name of the first that takes it."""
    groups: dict[str, list[tuple[Cell, Allocation]]] = {}
    for cell, allocation in taken:
        groups.setdefault(sha256_json(allocation.tensor_types), []).append((cell, allocation))
    named: dict[str, tuple[tuple[Cell, Allocation], ...]] = {}
    for group in groups.values():
        cell, first = group[0]
        name = file_name(first)
        if name in named:  # two contexts of a device, whose files differ by less than a hundredth of a bit
            name = file_name(first, f"{cell.request.context_tokens}ctx")
        named[name] = tuple(group)
    return named


def outputs_of(made: MadeModel, layout: Layout) -> list[Path]:
    """Return the files and records that this step leaves."""
    records = layout.records(made.row.name)
    game = records / "sensitivity.game.json"
    paths = [records / "sensitivity.json", *([game] if game.exists() else [])]
    for file in made.files:
        first = layout.root / file.artifact.artifact
        paths += [first, *(layout.root / name for name in file.artifact.more_files), record_path(first)]
        paths += [layout.cell(made.row.name, cell.key) / "allocation.json" for cell, _ in file.taken]
    return paths


def _sensitivity(matrix: Matrix, row: Row, directory: Path, layout: Layout, say: Say, progress: Progress) -> Profile:
    game, out = matrix.game, layout.records(row.name) / "sensitivity.json"
    if row.given is not None and (found := row.found) is not None:
        require_same_text(found, directory, matrix.encoding, row.given)
        if not out.exists() or load_profile(out) != found:
            found.save(out)
        return found
    if game.is_ladder:
        return ladder(
            row.source, out=out, game=game, allow_fallback=matrix.order.allow_fallback, say=say, progress=progress
        )
    return profile(
        row.source, out=out, game=game, request=[cell.request for cell in row.cells], extend=False,
        kept=layout.kept(row.name), allow_fallback=matrix.order.allow_fallback, say=say, progress=progress,
    )  # fmt: skip


def allocated(matrix: Matrix, cell: Cell, found: Profile) -> Allocation:
    """Choose what a cell gets by a profile."""
    request = cell.request
    return allocate(
        found, device=cell.device, context_tokens=request.context_tokens, kv_type=request.kv_type,
        budget_bytes=request.file_budget_bytes, average_bits=request.average_bits,
        min_generation_tok_per_s=request.min_generation_tok_per_s, method=matrix.game.method,
        alpha=matrix.order.alpha, outer_type=request.outer_type, types=request.types,
    )  # fmt: skip


def _allocation(matrix: Matrix, name: str, cell: Cell, found: Profile, layout: Layout, say: Say) -> Allocation:
    allocation = allocated(matrix, cell, found)
    out = layout.cell(name, cell.key) / "allocation.json"
    if not out.exists() or Allocation.load(out) != allocation:  # whole and the same: its bytes stay
        allocation.save(out)
    say(f"{name} for {cell.device.name} at {cell.request.context_tokens:,} tokens of context:")
    say_allocation(allocation, say)
    return allocation
