"""``report.md``: what a build made and measured, for people."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from impq_edge.devices.memory import MemoryPlan
from impq_edge.impq.allocation import Allocation
from impq_edge.releases.comparison import Comparison, Scored
from impq_edge.releases.gates import told_number
from impq_edge.releases.lent import BackendLosses, backend_name
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.validation.report import ValidationReport

_MIB = 2**20
_BAR_WIDTH = 24
_SHOWN_TEXT = 400  # characters of the generation

LENT_ROWS = ("this mix", "all at 4 bit", "all at 2 bit", "K-quants' own choice")
"""What :class:`~impq_edge.releases.lent.BackendLosses` holds, in its order."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """One of the things a file comes from."""

    what: str
    identity: str  # a hash; empty where it has none
    how: str  # empty where nothing is to be told


def render(c: Comparison, command: str) -> str:
    """Return the report as Markdown; it holds no timings of the build, but the speeds that were measured."""
    artifact, report = c.mix
    verdict = c.verdict if c.passed else f"**{c.verdict}**"
    sections = [
        f"# {c.allocation.model_name} for {c.device.title}",
        f"`{artifact.artifact}` · {artifact.file_bytes:,} bytes · {artifact.bits_per_weight:.2f} bits/weight · "
        f"blocks at {c.allocation.average_bits:.2f} bits on average · {verdict}",
        headline(c),
        _predicted(c),
        _quality(c),
        _players(c),
        _memory(c),
        _gates(c),
        _checks(report),
        _backends(c),
        _sample(report),
        _provenance(c, command),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of window losses (one − other) and its standard error, nats per token.

    Both files were scored on the same windows, so what the windows have in common cancels.
    """
    differences = np.subtract(one, other)
    spread = differences.std(ddof=1) if len(differences) > 1 else math.nan
    return float(differences.mean()), float(spread / math.sqrt(len(differences)))


def headline(c: Comparison) -> str:
    """Return what speaks for the allocation, as sentences."""
    left = c.allocation.budget_bytes - c.allocation.predicted_file_bytes
    if c.allocation.everything_fits:
        room = f"{left / _MIB:,.1f} MiB of the device's budget would be left for more bits."
        return f"Everything fits at {c.allocation.types[-1]} bit: {room}"
    if c.allocation.evidence is not None:
        return (
            f"How the allocation was chosen: {c.allocation.evidence.told()}. It is the optimum of no program, so that "
            "nothing proves that there is no better one."
        )
    gap = c.allocation.objective - (c.allocation.lower_bound or 0.0)
    return (
        f"The allocation is optimal for the sensitivity profile: objective {c.allocation.objective:.6g} nats/token, "
        f"proven bound {gap:.2g} below it, bound of the continuous relaxation {c.allocation.relaxation_bound:.6g}."
    )


def _predicted(c: Comparison) -> str:
    speeds = c.allocation.speeds
    return "" if speeds is None else f"Speed {speeds.summary(c.allocation.device)}."


def _quality(c: Comparison) -> str:
    head = file_head(c)
    lines = ["## Quality, size and speed", "", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in file_rows(c)]
    return "\n".join([*lines, "", how_measured(c)])


def file_head(c: Comparison) -> list[str]:
    """Return the head of the table of files."""
    divergence = ["KL divergence, nats/token"] if _has_divergences(c) else []
    return [
        "file", "bytes", "bits/weight", "perplexity", "Δ loss to 4 bit, nats/token", *divergence, "prompt, tok/s",
        "generation, tok/s",
    ]  # fmt: skip


def file_rows(c: Comparison) -> list[list[str]]:
    """Return the files that were measured, as the cells of a table."""
    rows = []
    for name, file in c.files.items():
        against = "–" if file == c.at_4_bit else difference_told(file, c.at_4_bit)
        divergence = [divergence_told(file)] if _has_divergences(c) else []
        row = [name, f"{file.file_bytes:,}", f"{file.bits_per_weight:.2f}", perplexity_told(file), against, *divergence]
        rows.append([*row, speed_told(file.prompt), speed_told(file.generation)])
    return rows


def _has_divergences(c: Comparison) -> bool:
    return any(file.divergence is not None for file in c.files.values())


def how_measured(c: Comparison) -> str:
    """Return what has to be known to read the measurements."""
    report = c.mix[1]
    return (
        f"Perplexity as llama-perplexity computes it, on {report.tokens:,} tokens of {report.text}; its error is "
        f"mostly the text's and shared by the files, so differences are taken window by window. Speeds are of "
        f"{c.validated_on}, with standard deviations over repetitions."
    )


def difference_told(file: Scored, reference: Scored) -> str:
    """Return the paired difference of two files' losses, nats per token."""
    if file.perplexity is None or reference.perplexity is None:
        return "not finite"
    difference, error = paired_difference(file.window_nlls, reference.window_nlls)
    return f"{difference:+.4f} ± {error:.4f}"


def perplexity_told(file: Scored) -> str:
    """Return a file's perplexity with its error."""
    if file.perplexity is None or file.perplexity_stderr is None:
        return "not finite"
    return f"{file.perplexity:.3f} ± {file.perplexity_stderr:.3f}"


def divergence_told(file: Scored) -> str:
    """Return how far a file is from the unquantised model, nats per token."""
    found = file.divergence
    return "–" if found is None else f"{found.kld_mean:.4f} ± {found.kld_stderr:.4f}"


def speed_told(rate: tuple[float, float] | None) -> str:
    """Return measured tokens per second with their standard deviation."""
    return "–" if rate is None else f"{rate[0]:,.1f} ± {rate[1]:,.1f}"


def _players(c: Comparison) -> str:
    return _ladder(c, c.profile) if isinstance(c.profile, LadderProfile) else _game(c, c.profile)


def what_was_measured(c: Comparison) -> str:
    """Return what sensitivity means here and where it comes from, as sentences."""
    found, settings = c.profile, c.profile.settings
    if isinstance(found, LadderProfile):
        return (
            "KL divergence to the unquantised model, in 10⁻³ nats per token, when one of them alone is stored at fewer "
            f"bits, on {settings.tokens:,} tokens. The sum over the chosen ones is {1e3 * c.allocation.objective:.4f}."
        )
    all_4, all_2 = (found.losses[(bits,) * found.n_players] for bits in (4, 2))
    return (
        f"Increase of the {what_is_measured(found)} when one of the {settings.players} drops from 4 to 2 bit: Shapley "
        f"values from {_how_many(found)} ({found.design.estimator}) on {settings.tokens:,} tokens, with standard "
        f"errors. All at 4 bit {all_4:.4f}, all at 2 bit {all_2:.4f} nats/token; the unquantised model's loss is "
        f"{np.mean(found.reference_losses):.4f}."
    )


def _ladder(c: Comparison, found: LadderProfile) -> str:
    types = c.allocation.types
    table = found.divergences(types)
    lines = [
        f"## {found.settings.players.capitalize()}, embedding and head",
        "",
        what_was_measured(c),
        "",
        f"| | bits | {' | '.join(f'{bits} bit' for bits in types)} |",
        f"|:---|---:|{'---:|' * len(types)}",
    ]
    for player, bits, row in zip(found.who, c.allocation.player_bits, table, strict=True):
        values = (f"**{1e3 * v:.4f}**" if b == bits else f"{1e3 * v:.4f}" for b, v in zip(types, row, strict=True))
        lines.append(f"| {player.name.removeprefix('blk.')} | {bits} | {' | '.join(values)} |")
    return "\n".join(lines)


def _game(c: Comparison, found: SensitivityProfile) -> str:
    estimate, settings = found.estimate(), found.settings
    largest = max(float(np.abs(estimate.phi).max()), 1e-12)
    lines = [
        f"## {settings.players.capitalize()}",
        "",
        what_was_measured(c),
        "",
        f"| {settings.players.removesuffix('s')} | bits | φ, nats/token | |",
        "|:---|---:|---:|:---|",
    ]
    for index, (player, bits) in enumerate(zip(found.who, c.allocation.player_bits, strict=True)):
        phi, error = estimate.phi[index], estimate.phi_stderr[index]
        bar = "█" * round(_BAR_WIDTH * max(0.0, phi) / largest)
        lines.append(f"| {player.name.removeprefix('blk.')} | {bits} | {phi:+.5f} ± {error:.5f} | {bar} |")
    return "\n".join(lines)


def what_is_measured(found: SensitivityProfile | LadderProfile) -> str:
    """Return the name of v."""
    return "loss" if found.settings.objective == "loss" else "KL divergence from the unquantised model"


def _how_many(found: SensitivityProfile) -> str:
    """Say what φ comes from: of rounds only the pairs they began with, as the others were not drawn at random."""
    if found.design.rounds is None:
        return f"{len(found.evaluations):,} coalitions"
    return f"{len(found.draws):,} of the complement pairs among {len(found.evaluations):,} coalitions"


def _memory(c: Comparison) -> str:
    lines = [
        f"## Memory on {c.device.title}",
        "",
        memory_setting(c),
        "",
        "| part | MiB |",
        "|---|---:|",
    ]
    lines += [f"| {name} | {size / _MIB:,.1f} |" for name, size in memory_parts(c.plan).items()]
    return "\n".join(lines)


def memory_setting(c: Comparison) -> str:
    """Return what the memory is planned for."""
    return f"At {c.allocation.context_tokens:,} tokens of context with a {c.allocation.kv_type} cache."


def memory_parts(plan: MemoryPlan) -> dict[str, int]:
    """Return what either memory is held for, by a name for people, in bytes."""
    return plan.parts() | {f"on the GPU: {name}": size for name, size in plan.gpu_parts().items()}


def _gates(c: Comparison) -> str:
    if not c.gates:
        return ""
    lines = ["## Gates of the release", "", "| gate | status | value | limit | |", "|---|---|---:|---:|---|"]
    lines += [f"| {' | '.join(row)} |" for row in gate_rows(c)]
    return "\n".join(lines)


def gate_rows(c: Comparison) -> list[list[str]]:
    """Return the gates as the cells of a table."""
    return [
        [gate.name, gate.status, told_number(gate.value), told_number(gate.limit), gate.detail] for gate in c.gates
    ]  # fmt: skip


def _checks(report: ValidationReport) -> str:
    lines = ["## Checks", "", "| check | status | detail |", "|---|---|---|"]
    lines += [f"| {check.name} | {check.status.replace('_', ' ')} | {check.detail} |" for check in report.checks]
    return "\n".join(lines)


def _backends(c: Comparison) -> str:
    losses = c.backend_losses
    if losses is None:
        return ""
    name = backend_name(c.profile)
    lines = [
        f"## {name} against the K-quants that ship",
        "",
        lent_setting(c),
        "",
        f"| blocks | {name}, nats/token | K-quants, nats/token |",
        "|---|---:|---:|",
    ]
    for row, ours, shipped in zip(LENT_ROWS, losses.backend, losses.kquant, strict=True):
        lines.append(f"| {row} | {ours:.4f} | {shipped:.4f} |")
    lines += ["", lent_told(losses, name)]
    return "\n".join(lines)


def lent_setting(c: Comparison) -> str:
    """Return which losses are compared where the profile's backend is not what ships."""
    return (
        f"The profile was measured with {backend_name(c.profile)}; the file holds K-quants "
        f"({c.mix[0].encoding.get('encode')}). On the calibration text, the {what_is_measured(c.profile)} of the same "
        "blocks:"
    )


def lent_told(losses: BackendLosses, backend: str) -> str:
    """Return what being allocated by another backend costs the file, as sentences."""
    verdict = (
        losses.warning(backend)
        if losses.matters
        else f"Being allocated by {backend} costs the file {losses.lost:+.4f} ± {losses.lost_stderr:.4f} nats/token, "
        "which is no clear loss."
    )
    order = "" if losses.rank_correlation is None else f" φ and these rank as {losses.rank_correlation:.2f} (Spearman)."
    return f"K-quants' own choice is that of every player measured alone at 2 bit.{order} {verdict}"


def _sample(report: ValidationReport) -> str:
    text = sample(report).replace("```", "'''")
    return f"## What it writes\n\n```text\n{text}\n```"


def sample(report: ValidationReport) -> str:
    """Return the beginning of what the file wrote."""
    return (report.chat_text or report.generated_text)[:_SHOWN_TEXT]


def _provenance(c: Comparison, command: str) -> str:
    lines = ["## How it was made", "", *([f"    {command}", ""] if command else [])]
    lines += [
        f"- {made.what}{f' `{made.identity}`' if made.identity else ''}{f': {made.how}' if made.how else ''}"
        for made in provenance(c)
    ]
    return "\n".join(lines)


def provenance(c: Comparison) -> list[Provenance]:
    """Return what the file was made from and how, from the model to the validation."""
    artifact, report = c.mix
    settings = c.profile.settings
    backend = ", ".join(f"{key} {value}" for key, value in settings.backend.items() if key != "name")
    measured = (
        f"{settings.backend['name']} ({backend}), {_design(c.profile)}, {settings.device} {settings.dtype}, "
        f"text {settings.text_sha256[:16]}…"
    )
    outer = f"embedding and head {c.allocation.outer_type or 'among the players'}"
    encoding = ", ".join(f"{key} {value}" for key, value in artifact.encoding.items())
    return [
        Provenance("model content", c.allocation.model_sha256, ""),
        Provenance("sensitivity", c.allocation.profile_sha256, measured),
        Provenance("allocation", c.allocation.identity(), f"{_by(c.allocation)}, {outer}"),
        Provenance("file", artifact.sha256, encoding),
        Provenance(f"validated with llama-cpp-python {report.llama_cpp_python}", "", report.system_info),
    ]


def _design(found: SensitivityProfile | LadderProfile) -> str:
    if isinstance(found, LadderProfile):
        return f"every player at {', '.join(map(str, found.types))} bit"
    design = found.design
    how = (
        f"{design.estimator} of {design.permutations} permutations' cost, seed {design.seed}, stopped by "
        f"{found.stopped_by}"
    )
    if design.rounds is None:
        return how
    budgets = len(design.rounds.budgets)
    what = f"{budgets} budget{'' if budgets == 1 else 's'}"
    return f"rounds at {what} after a design of {design.rounds.share:.0%}, {how}"


def _by(allocation: Allocation) -> str:
    return f"α = {allocation.alpha}" if allocation.evidence is None else f"method {allocation.evidence.method}"
