"""What a release would build, from the models' shapes alone: nothing is downloaded but shapes, and nothing written."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from impq_edge.conversion.layout import estimated_header_bytes, header_bytes
from impq_edge.devices.memory import memory_plan
from impq_edge.errors import RecordError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.allocate import allocate_blocks, allocate_ladder
from impq_edge.impq.allocation import Allocation
from impq_edge.model.players import players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.shapes import Shapes, find_shapes
from impq_edge.model.spec import ModelSpec
from impq_edge.releases.gates import process_bytes
from impq_edge.releases.making import allocated, share
from impq_edge.releases.matrix import Cell, Matrix, Profile, Row, resolve
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import Order, found_from
from impq_edge.releases.preview import evaluations_of
from impq_edge.stages import load_profile
from impq_edge.stages.opening import tokenizer_of


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """One device and context of a release, and the file it would take."""

    file: str
    model: str
    device: str
    context_tokens: int
    file_bytes: int
    memory_bytes: int  # of the process
    likely_tok_per_s: float | None
    is_decided: bool  # by a profile that is there, or because everything fits: else what fills the limits


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a release would build and take."""

    name: str
    directory: Path
    cells: tuple[Foreseen, ...]
    evaluations: dict[str, int]  # model → that would still be made
    work_bytes: int  # of the files that a model is compared with, removed when it is done: the largest model's

    @property
    def files(self) -> dict[str, int]:
        """Every file once, and its bytes."""
        return {cell.file: cell.file_bytes for cell in self.cells}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "release": self.name, "directory": str(self.directory), "files": self.files,
            "files_bytes": sum(self.files.values()), "work_bytes": self.work_bytes, "evaluations": self.evaluations,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }  # fmt: skip


def foresee(order: Order, *, out: Path, base: Path = Path()) -> DryRun:
    """Tell what a release would build.

    Sizes are exact where a profile decides already, where everything fits, and where all players are equally large; a
    model that is not here has its header estimated.

    Raises
    ------
    ImpqError
        One sentence for what cannot be used, as :func:`~impq_edge.releases.release.release`.
    """
    matrix, layout = resolve(order, base), Layout(out)
    cells: list[Foreseen] = []
    evaluations, work_bytes = {}, 0
    for row in matrix.rows:
        spec, header = _shape_of(matrix, row)
        known = _known_profile(row, layout)
        taken = [(cell, _expected(matrix, cell, spec, header, known)) for cell in row.cells]
        for name, sharing in share(taken).items():
            cells += [_foreseen(name, row.name, spec, cell, made, known is not None) for cell, made in sharing]
        evaluations[row.name] = 0 if known is not None else evaluations_of(spec, matrix.game)
        kinds = (TensorType.F16, BLOCK_TYPES[4], BLOCK_TYPES[2])
        outer = (TensorType.F16, matrix.order.head_type, matrix.order.head_type)
        compared = (tensor_types(spec, [kind] * spec.n_blocks, head) for kind, head in zip(kinds, outer, strict=True))
        work_bytes = max(work_bytes, sum(header + data_bytes(spec, types) for types in compared))
    return DryRun(order.name, out, tuple(cells), evaluations, work_bytes)


def _shape_of(matrix: Matrix, row: Row) -> tuple[ModelSpec, int]:
    """Return a model's shapes and the bytes of its GGUF before the tensor data."""
    shapes: Shapes = find_shapes(found_from(matrix.base, row.ordered.model), row.ordered.revision)
    spec = dataclasses.replace(shapes.spec, name=row.name)
    if row.source.directory is not None:
        return spec, header_bytes(spec, tokenizer_of(row.source.directory, spec))
    return spec, estimated_header_bytes(spec, shapes.vocabulary)


def _known_profile(row: Row, layout: Layout) -> Profile | None:
    """Return a profile that decides already: one that was given, or a finished one of an earlier run."""
    if row.found is not None:
        return row.found
    try:
        return load_profile(layout.records(row.name) / "sensitivity.json")
    except RecordError:
        return None


def _expected(matrix: Matrix, cell: Cell, spec: ModelSpec, header: int, known: Profile | None) -> Allocation:
    """Return the allocation of a profile that is there, or one that fills a cell's limits."""
    request, players = cell.request, matrix.game.player_kind
    if known is not None:
        return allocated(matrix, cell, known)
    who = players_of(spec, players, outer=request.is_ladder)
    weights = np.array([float(player.weights) for player in who])
    nothing = np.zeros((len(who), len(who)))
    if not request.is_ladder:
        return allocate_blocks(spec, header, weights / weights.sum(), nothing, "", request, players)
    losses = np.outer(weights / weights.sum(), [1 / bits for bits in request.types])
    return allocate_ladder(spec, header, losses, None, "", request, players)


def _foreseen(name: str, model: str, spec: ModelSpec, cell: Cell, allocation: Allocation, is_known: bool) -> Foreseen:
    plan = memory_plan(
        spec, allocation.tensor_types, allocation.predicted_file_bytes, cell.device,
        context_tokens=allocation.context_tokens, kv_type=allocation.kv_type,
    )  # fmt: skip
    rate = None if allocation.speeds is None else allocation.speeds.generation
    return Foreseen(
        name, model, cell.device.name, allocation.context_tokens, allocation.predicted_file_bytes,
        process_bytes(plan), None if rate is None else rate.likely_tok_per_s,
        is_known or allocation.everything_fits,
    )  # fmt: skip
