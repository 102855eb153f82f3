"""A release: models × devices × contexts in, files with their papers out, and a verdict.

The steps are a graph in the order they are taken: model → sensitivity → allocations → files → quality and validation
→ gates → papers. Each leaves its record, and one whose record is there and was made from the same inputs is not done
again, so that a release can be killed at any moment.
"""

import math
import shutil
from pathlib import Path

from impq_edge.conversion.card import read_card
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import is_this_machine
from impq_edge.impq.allocation import Allocation
from impq_edge.model.calibration import Windows
from impq_edge.releases.gates import Trial, evaluate, perplexity_ratio, process_bytes
from impq_edge.releases.lock import alone
from impq_edge.releases.making import Made, MadeModel, make_model, outputs_of
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
from impq_edge.releases.matrix import Cell, Matrix, Profile, resolve
from impq_edge.releases.naming import Layout
from impq_edge.releases.order import Order
from impq_edge.releases.papers import ModelPapers, write_papers
from impq_edge.releases.quality import Quality, Yardsticks
from impq_edge.releases.running import llama_cli
from impq_edge.releases.telling import Say
from impq_edge.releases.trial import validated
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.table import Progress
from impq_edge.stages import calibration_windows
from impq_edge.validation.report import ValidationReport


@alone
def release(
    order: Order,
    *,
    out: Path,
    base: Path = Path(),
    source: Path | None = None,
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

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used. A gate that fails is no error: ``passed`` of the manifest tells.
    """
    layout = Layout(out)
    matrix = resolve(order, base)
    papers = []
    for row in matrix.rows:
        say(f"Model: {row.source.summary()}; {len(row.cells)} file{'s' if len(row.cells) > 1 else ''} at most.")
        papers.append(_papers(matrix, make_model(matrix, row, layout, say, progress), layout, progress))
    made = write_papers(matrix, papers, layout, source)
    shutil.rmtree(layout.work, ignore_errors=True)
    return made


def _papers(matrix: Matrix, made: MadeModel, layout: Layout, progress: Progress) -> ModelPapers:
    yardsticks = Yardsticks(matrix, made, layout, progress)
    at_4_bit = yardsticks.at_4_bit()
    files, paths, qualities = [], outputs_of(made, layout), []
    for file in made.files:
        quality = yardsticks.of(file.artifact)
        qualities.append(quality)
        takers = []
        for cell, allocation in file.taken:
            record = layout.cell(made.row.name, cell.key) / "validation.json"
            report = validated(
                layout.root / file.artifact.artifact, file.artifact, cell.device, allocation, matrix.text,
                matrix.order.windows, True, progress, record,
            )  # fmt: skip
            paths.append(record)
            takers.append(_taker(matrix, made, file, cell, allocation, report, quality, at_4_bit, layout))
        first = file.taken[0][1]
        artifact = file.artifact
        files.append(
            ReleasedFile(
                artifact.artifact, made.row.name, artifact.sha256, artifact.file_bytes, artifact.bits_per_weight,
                first.average_bits, tuple(takers),
            )
        )  # fmt: skip
    compared = _compared(qualities[0], at_4_bit)
    model = _model(matrix, made, compared)
    return ModelPapers(model, tuple(files), _inputs(matrix, made), (*paths, *yardsticks.records))


def _taker(
    matrix: Matrix,
    made: MadeModel,
    file: Made,
    cell: Cell,
    allocation: Allocation,
    report: ValidationReport,
    quality: Quality,
    at_4_bit: Quality,
    layout: Layout,
) -> Taker:
    plan = memory_plan(
        made.spec, allocation.tensor_types, file.artifact.file_bytes, cell.device,
        context_tokens=allocation.context_tokens, kv_type=allocation.kv_type,
    )  # fmt: skip
    trial = Trial(report, quality, at_4_bit, plan, allocation.speeds, is_this_machine(cell.device))
    kld, kld_4 = quality.divergence, at_4_bit.divergence
    measured = Measured(
        file_bytes=file.artifact.file_bytes,
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
    )
    return Taker(
        device=cell.device.name,
        title=cell.device.title,
        context_tokens=allocation.context_tokens,
        kv_type=allocation.kv_type,
        run=llama_cli(file.artifact.artifact, cell.device, allocation.context_tokens, allocation.kv_type),
        records=layout.cell(made.row.name, cell.key).relative_to(layout.root).as_posix(),
        allocation_sha256=allocation.identity(),
        predicted=_predicted(made.found, allocation, process_bytes(plan)),
        measured=measured,
        gates=evaluate(cell.gates, matrix.order.reference, trial),
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


def _compared(any_quality: Quality, at_4_bit: Quality) -> tuple[Comparison, ...]:
    reference = any_quality.divergence.reference_perplexity
    return (
        Comparison("F16", any_quality.reference_bytes, any_quality.reference_sha256, reference, 0.0),
        Comparison(
            "4 bit", at_4_bit.file_bytes, at_4_bit.sha256, at_4_bit.perplexity, at_4_bit.divergence.kld_mean
        ),
    )  # fmt: skip


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


def _inputs(matrix: Matrix, made: MadeModel) -> tuple[Input, ...]:
    row = made.row
    found = [Input("model", row.ordered.model, made.spec.content_sha256, row.source.commit)]
    if row.given is not None and row.ordered.profile is not None:
        found.append(Input("sensitivity profile", row.ordered.profile, made.found.identity()))
    text = _calibration(made.directory, matrix.encoding)
    name = "the text that ships" if matrix.encoding.calibration is None else matrix.encoding.calibration.name
    return (*found, Input("calibration text", name, text.text_sha256))


def _calibration(directory: Path, encoding: EncodeOptions) -> Windows:
    return calibration_windows(directory, encoding.calibration, encoding.calibration_tokens, encoding.window_tokens)
