"""A release: models × devices × contexts in, files with their papers out, and a verdict.

The steps are a graph in the order they are taken: model → sensitivity → allocations → files → quality and validation
here → validation over ssh → gates → reports → papers. Each leaves its record, and one whose record is there and was
made from the same inputs is not done again, so that a release can be killed at any moment.
"""

import math
import shutil
from pathlib import Path
from typing import Literal

from impq_edge.conversion.card import read_card
from impq_edge.devices.profile import is_this_machine
from impq_edge.impq.allocation import Allocation
from impq_edge.lock import alone
from impq_edge.releases.examine import Examined, Taken, by_file, examine, validation, validation_record
from impq_edge.releases.gates import Trial, counted_bytes, evaluate, perplexity_ratio, process_bytes
from impq_edge.releases.making import MadeModel, make_model, outputs_of
from impq_edge.releases.manifest import (
    Comparison,
    Input,
    Manifest,
    Measured,
    Predicted,
    ReleasedFile,
    ReleasedModel,
    Taker,
)
from impq_edge.releases.matrix import Matrix, Profile, resolve
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import Order
from impq_edge.releases.papers import ModelPapers, write_papers
from impq_edge.releases.quality import Quality
from impq_edge.releases.reports import FileReport, plan_of, write_reports
from impq_edge.releases.running import llama_cli
from impq_edge.releases.telling import Say
from impq_edge.releases.trial import Reach
from impq_edge.releases.within import require_within
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.table import Progress
from impq_edge.validation.report import ValidationReport


@alone
def release(
    order: Order,
    *,
    out: Path,
    base: Path = Path(),
    source: Path | None = None,
    reach: Reach | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Make every file of an order, measure it, and write the papers; a killed one goes on.

    Parameters
    ----------
    out
        A directory of its own.
    base
        Where the order's paths start.
    source
        The file of the order, of which a copy is kept.
    reach
        How devices with ``on`` are reached over ssh.

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used. A gate that fails is no error: ``passed`` of the manifest tells.
    """
    require_within(out)
    layout, reach = Layout(out), reach or Reach()
    matrix = resolve(order, base)
    examined = []
    for row in matrix.rows:
        say(f"Model: {row.source.summary()}; {len(row.cells)} file{'s' if len(row.cells) > 1 else ''} at most.")
        examined.append(examine(matrix, make_model(matrix, row, layout, say, progress), layout, say, progress))
        shutil.rmtree(layout.work / row.name, ignore_errors=True)  # before the next model's take their place
    papers = [_papers(matrix, model, layout, reach, say, progress) for model in examined]
    made = write_papers(matrix, papers, layout, source, say)
    shutil.rmtree(layout.work, ignore_errors=True)
    return made


def _papers(
    matrix: Matrix, examined: Examined, layout: Layout, reach: Reach, say: Say, progress: Progress
) -> ModelPapers:
    made = examined.made
    files, paths, reports = [], [*outputs_of(made, layout), *examined.records], []
    for file, taken in by_file(examined):
        takers = []
        for each in taken:
            report = validation(matrix, made, each, layout, reach, say, progress)
            paths.append(validation_record(made, each.cell, layout))
            taker = _taker(matrix, examined, each, report, layout)
            takers.append(taker)
            reports.append(FileReport(each, report, taker))
        artifact = file.artifact
        files.append(
            ReleasedFile(
                artifact.artifact, made.row.name, artifact.sha256, artifact.file_bytes, artifact.bits_per_weight,
                taken[0].allocation.average_bits, tuple(takers),
            )
        )  # fmt: skip
    paths += write_reports(examined, reports, layout)
    model = _model(matrix, made, _compared(examined))
    return ModelPapers(model, tuple(files), _inputs(matrix, examined), tuple(paths))


def _taker(matrix: Matrix, examined: Examined, taken: Taken, report: ValidationReport, layout: Layout) -> Taker:
    made, cell, allocation = examined.made, taken.cell, taken.allocation
    quality, at_4_bit, artifact = taken.quality, examined.uniform[4], taken.file.artifact
    plan = plan_of(made, taken)
    there = cell.on is not None
    trial = Trial(report, quality, at_4_bit, plan, allocation.speeds, there or is_this_machine(cell.device), there)
    kld, kld_4 = quality.divergence, at_4_bit.divergence
    measured = Measured(
        file_bytes=artifact.file_bytes,
        memory_bytes=report.peak_rss_bytes,
        perplexity=report.perplexity,
        perplexity_stderr=report.perplexity_stderr,
        perplexity_ratio_to_f16=perplexity_ratio(trial, "f16"),
        perplexity_ratio_to_4bit=perplexity_ratio(trial, "4bit"),
        kl_divergence=kld.kld_mean,
        kl_divergence_stderr=kld.kld_stderr,
        kl_divergence_over_4bit=kld.kld_mean - kld_4.kld_mean,
        generation_tok_per_s=report.generation_tok_per_s,
        prompt_tok_per_s=report.prompt_tok_per_s,
        on_device=trial.on_device,
        over_ssh=trial.over_ssh,
    )
    return Taker(
        device=cell.device.name,
        title=cell.device.title,
        context_tokens=allocation.context_tokens,
        kv_type=allocation.kv_type,
        run=llama_cli(artifact.artifact, cell.device, allocation.context_tokens, allocation.kv_type),
        records=layout.cell(made.row.name, cell.key).relative_to(layout.root).as_posix(),
        allocation_sha256=allocation.identity(),
        predicted=_predicted(made.found, allocation, process_bytes(plan)),
        measured=measured,
        gates=evaluate(cell.gates, matrix.order.reference, trial),
        budget_bytes=cell.device.memory_bytes - cell.device.system_reserve_bytes,
        counted_bytes=counted_bytes(trial),
    )


def _predicted(found: Profile, allocation: Allocation, memory_bytes: int) -> Predicted:
    """Say what the profile expects, in what it was measured in; the calibration text is not the evaluation text."""
    ladder = isinstance(found, LadderProfile)
    is_loss = not ladder and found.settings.objective == "loss"
    return Predicted(
        file_bytes=allocation.predicted_file_bytes,
        memory_bytes=memory_bytes,
        perplexity_ratio_to_4bit=math.exp(min(allocation.objective, 100.0)) if is_loss else None,
        kl_divergence_over_4bit=None if ladder or is_loss else allocation.objective,
        kl_divergence=allocation.objective if ladder else None,
        speeds=allocation.speeds,
    )


def _compared(examined: Examined) -> tuple[Comparison, ...]:
    at = examined.uniform
    f16, whole = at[4], at[4].divergence.reference_perplexity
    return (
        Comparison("F16", f16.reference_bytes, f16.reference_sha256, whole, 0.0),
        _uniform("4 bit", at[4]),
        _uniform("2 bit", at[2]),
    )


def _uniform(what: Literal["4 bit", "2 bit"], found: Quality) -> Comparison:
    return Comparison(what, found.file_bytes, found.sha256, found.score.perplexity, found.divergence.kld_mean)


def _model(matrix: Matrix, made: MadeModel, compared: tuple[Comparison, ...]) -> ReleasedModel:
    card, _ = read_card(made.directory)
    source, found = made.row.source, made.found
    named = [_hub_id(model.repo_url) for model in card.base_models]
    return ReleasedModel(
        name=made.row.name,
        model=made.row.ordered.model,
        commit=source.commit,
        content_sha256=made.spec.content_sha256,
        weights=made.spec.weights,
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        base_models=(source.model,) if source.commit else tuple(name for name in named if name),
        languages=card.languages,
        seed=matrix.game.seed if isinstance(found, LadderProfile) else found.design.seed,
        sensitivity_sha256=found.identity(),
        evaluations=found.divergences().size if isinstance(found, LadderProfile) else len(found.evaluations),
        compared=compared,
    )


def _hub_id(url: str | None) -> str | None:
    prefix = "https://huggingface.co/"
    return url.removeprefix(prefix) if url and url.startswith(prefix) else None


def _inputs(matrix: Matrix, examined: Examined) -> tuple[Input, ...]:
    made, row = examined.made, examined.made.row
    found = [Input("model", row.ordered.model, made.spec.content_sha256, row.source.commit)]
    if row.ordered.profile is not None:
        found.append(Input("sensitivity profile", row.ordered.profile, made.found.identity()))
    name = "the text that ships" if matrix.encoding.calibration is None else matrix.encoding.calibration.name
    return (*found, Input("calibration text", name, examined.calibration_sha256))
