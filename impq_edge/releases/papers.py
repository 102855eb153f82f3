"""The papers of a release: manifest, model card, and the list of sums."""

import dataclasses
import functools
import itertools
import os
import re
from pathlib import Path

from impq_edge.errors import RecordError
from impq_edge.records import atomic_path, sha256_file
from impq_edge.releases.card import render_card
from impq_edge.releases.manifest import (
    CARD_FILE,
    COMMAND,
    MANIFEST_FILE,
    ORDER_FILE,
    PAGE_FILE,
    SUMS_FILE,
    Input,
    Manifest,
    Output,
    ReleasedFile,
    ReleasedModel,
    output_of,
    sums_text,
    versions_here,
)
from impq_edge.releases.markup import write_drawn
from impq_edge.releases.matrix import Matrix
from impq_edge.releases.naming import Layout
from impq_edge.releases.overview import render_overview
from impq_edge.releases.telling import Say
from impq_edge.validation.machine import cpu_name
from impq_edge.validation.validate import available_threads

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.(?!impq-edge\.lock).+\.lock|.+\.json\.journal")
"""Of :func:`impq_edge.records.atomic_path` and :func:`impq_edge.lock.sole_making`, and of finished games."""


@dataclasses.dataclass(frozen=True)
class ModelPapers:
    """What one model adds to the manifest."""

    model: ReleasedModel
    files: tuple[ReleasedFile, ...]
    inputs: tuple[Input, ...]
    paths: tuple[Path, ...]


def write_papers(matrix: Matrix, papers: list[ModelPapers], layout: Layout, source: Path | None, say: Say) -> Manifest:
    """Write card, page, manifest and sums, the sums last: what they name is there."""
    root, made = layout.root, _manifest(matrix, papers, layout, source)
    _remove_superseded(made, layout)
    _remove_leftovers(root)
    with atomic_path(root / CARD_FILE) as temporary:
        temporary.write_text(render_card(made), "utf-8")
    own = [CARD_FILE]
    if write_drawn(root / PAGE_FILE, functools.partial(render_overview, made), say):
        own.append(PAGE_FILE)
    made = dataclasses.replace(made, outputs=(*made.outputs, *(output_of(root, root / name) for name in own)))
    made.save(root / MANIFEST_FILE)
    with atomic_path(root / SUMS_FILE) as temporary:
        temporary.write_text(sums_text([*made.outputs, output_of(root, root / MANIFEST_FILE)]), "utf-8")
    return made


def _manifest(matrix: Matrix, papers: list[ModelPapers], layout: Layout, source: Path | None) -> Manifest:
    devices = {cell.asked: cell.device for row in matrix.rows for cell in row.cells}
    inputs = [entry for paper in papers for entry in paper.inputs]
    inputs += [Input("device", name, device.identity()) for name, device in devices.items()]
    inputs.append(Input("evaluation text", matrix.text.name, sha256_file(matrix.text)))
    paths = [path for paper in papers for path in paper.paths]
    for device in devices.values():
        path = layout.root / "records" / "devices" / f"{device.name}.json"
        device.save(path)
        paths.append(path)
    if source is not None:
        paths.append(_copied(source, layout.root / ORDER_FILE))
    outputs = tuple(output_of(layout.root, path) for path in sorted(set(paths)))
    files = tuple(file for paper in papers for file in paper.files)
    made = Manifest(
        name=matrix.order.name,
        command=COMMAND,
        recipe=matrix.order,
        machine=f"{cpu_name() or 'unknown processor'}, {available_threads()} threads",
        versions=versions_here(),
        reference=matrix.order.reference,
        inputs=tuple(dict.fromkeys(inputs)),
        models=tuple(paper.model for paper in papers),
        files=files,
        outputs=outputs,
        passed=all(taker.passed for file in files for taker in file.takers),
    )
    return _as_before(made, layout)


def _as_before(made: Manifest, layout: Layout) -> Manifest:
    """Keep the versions of a release in which nothing was made anew: they are those that made it."""
    try:
        before = Manifest.load(layout.root / MANIFEST_FILE)
    except RecordError:
        return made
    kept = {output for output in before.outputs if output.path not in (CARD_FILE, PAGE_FILE)}
    if set(made.outputs) != kept:
        return made
    return dataclasses.replace(made, versions=before.versions, machine=before.machine)


def _copied(source: Path, target: Path) -> Path:
    content = source.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
    return target


def _remove_superseded(made: Manifest, layout: Layout) -> None:
    """Remove what an earlier manifest lists, unchanged, and this one does not: files for devices that are gone."""
    try:
        before = Manifest.load(layout.root / MANIFEST_FILE)
    except RecordError:
        return
    now = {output.path for output in made.outputs} | {CARD_FILE, PAGE_FILE}
    for old in before.outputs:
        path = layout.root / old.path
        if old.path not in now and is_output(layout.root, old):
            path.unlink()
            for folder in path.relative_to(layout.root).parents:
                if folder != Path() and not any((layout.root / folder).iterdir()):
                    (layout.root / folder).rmdir()


def _remove_leftovers(root: Path) -> None:
    """Remove what killed runs left half-written; nobody else works here, and nothing of it is needed any more."""
    for folder, _, names in [*itertools.islice(os.walk(root), 1), *os.walk(root / "records")]:
        for name in filter(_TEMPORARY.fullmatch, names):
            Path(folder, name).unlink()


def is_output(root: Path, output: Output) -> bool:
    """Whether a file of a release is there, a plain one in the release itself, with the bytes it was made with."""
    path = root / output.path
    inside = path.resolve() == root.resolve() / output.path
    return inside and path.is_file() and path.stat().st_size == output.file_bytes and sha256_file(path) == output.sha256
