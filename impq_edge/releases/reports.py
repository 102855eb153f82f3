"""The reports of a release: of every file on every device what ``build`` tells of its one."""

import dataclasses
from pathlib import Path

from impq_edge.devices.memory import MemoryPlan, memory_plan
from impq_edge.releases.comparison import THIS_FILE, UNQUANTISED, Comparison, Scored, all_at, speeds_of
from impq_edge.releases.examine import Examined, Taken
from impq_edge.releases.making import MadeModel
from impq_edge.releases.manifest import COMMAND, PAGE_FILE, Taker
from impq_edge.releases.markup import write_markup
from impq_edge.releases.naming import Layout
from impq_edge.releases.page import write_page
from impq_edge.releases.quality import Quality
from impq_edge.releases.report import render
from impq_edge.validation.report import ValidationReport

TEXT_FILE = "report.md"


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What a report of one file on one device is made from."""

    taken: Taken
    validation: ValidationReport
    taker: Taker


def write_reports(examined: Examined, reports: list[FileReport], layout: Layout) -> list[Path]:
    """Write ``report.md`` and, where plots can be drawn, ``report.html`` beside the records of every cell.

    Returns
    -------
    list of Path
        What was written.
    """
    paths = []
    for each in reports:
        folder = layout.cell(examined.made.row.name, each.taken.cell.key)
        told = _comparison(examined, each, layout)
        write_markup(folder / TEXT_FILE, render(told, COMMAND))
        paths.append(folder / TEXT_FILE)
        if write_page(told, COMMAND, folder / PAGE_FILE, lambda _: None):  # that it cannot is said once, for all
            paths.append(folder / PAGE_FILE)
    return paths


def plan_of(made: MadeModel, taken: Taken) -> MemoryPlan:
    """Return what a file occupies on its device."""
    allocation = taken.allocation
    return memory_plan(
        made.spec, allocation.tensor_types, taken.file.artifact.file_bytes, taken.cell.device,
        context_tokens=allocation.context_tokens, kv_type=allocation.kv_type,
    )  # fmt: skip


def _comparison(examined: Examined, each: FileReport, layout: Layout) -> Comparison:
    made, taken, report = examined.made, each.taken, each.validation
    cell, artifact, weights = taken.cell, taken.file.artifact, examined.made.spec.weights
    prompt, generation = speeds_of(report)
    ours = dataclasses.replace(_scored(taken.quality, weights), prompt=prompt, generation=generation)
    uniform = {
        all_at(bits): ours if set(taken.allocation.player_bits) == {bits} else _scored(quality, weights)
        for bits, quality in examined.uniform.items()
    }
    up = len(layout.cell(made.row.name, cell.key).relative_to(layout.root).parts)
    return Comparison(
        device=cell.device,
        profile=made.found,
        allocation=taken.allocation,
        mix=(artifact, report),
        files={THIS_FILE: ours, **uniform, UNQUANTISED: _unquantised(taken.quality, weights)},
        plan=plan_of(made, taken),
        backend_losses=examined.losses.get(cell.key),
        gates=each.taker.gates,
        validated_on=_where(each.taker),
        overview="../" * up + PAGE_FILE,
    )


def _where(taker: Taker) -> str:
    if taker.measured.over_ssh:
        return "the device itself, which was reached over ssh"
    return "the device itself" if taker.measured.on_device else "the machine that made the release"


def _scored(quality: Quality, weights: int) -> Scored:
    score = quality.score
    return Scored(
        quality.sha256, quality.file_bytes, 8 * quality.file_bytes / weights, score.perplexity, score.stderr,
        score.window_nlls, quality.divergence,
    )  # fmt: skip


def _unquantised(quality: Quality, weights: int) -> Scored:
    found = quality.divergence
    return Scored(
        quality.reference_sha256, quality.reference_bytes, 8 * quality.reference_bytes / weights,
        found.reference_perplexity, found.reference_perplexity_stderr, found.reference_window_nlls,
    )  # fmt: skip
