"""``report.html``: what a build made and measured, as one file that loads nothing and runs no script."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from impq_edge.releases.comparison import THIS_FILE, Comparison
from impq_edge.releases.facts import (
    coalitions,
    covariances,
    memory_groups,
    players,
    predictions,
    rate_told,
    stock_mixes,
)
from impq_edge.releases.file_plots import GROUP_ROLES, measured, memory, quality
from impq_edge.releases.lent import backend_name
from impq_edge.releases.markup import rendered, write_drawn
from impq_edge.releases.player_plots import heat_map, outer_types, sensitivity, strip
from impq_edge.releases.report import (
    LENT_ROWS,
    difference_told,
    file_head,
    file_rows,
    gate_rows,
    headline,
    how_measured,
    lent_setting,
    lent_told,
    memory_parts,
    memory_setting,
    provenance,
    sample,
    what_is_measured,
    what_was_measured,
)
from impq_edge.releases.telling import Say
from impq_edge.spqe.journal import to_text
from impq_edge.spqe.ladder import LadderProfile

_MIB = 2**20
_LISTED = 12  # rows of a table that shows the first of many
_STATUS = {"passed": "✓ passed", "failed": "✗ failed", "not_checked": "not checked"}


def write_page(c: Comparison, command: str, path: Path, say: Say) -> bool:
    """Write the page and return True, or say that it was left out and how to get it.

    A page of an earlier build is not left beside newer records.

    Raises
    ------
    RecordError
        When ``path`` cannot be written.
    """
    return write_drawn(path, lambda: render_page(c, command), say)


def render_page(c: Comparison, command: str) -> str:
    """Return the page; matplotlib must be installed. The same records and command give the same bytes."""
    facts = _head(c) | _files(c) | _allocation(c) | _memory(c) | _sensitivity(c) | _measured(c) | _pairs(c) | _lent(c)
    return rendered("page.html.jinja", facts | _papers(c, command) | {"sections": _sections(c)})


def _sections(c: Comparison) -> list[tuple[str, str]]:
    found = {
        "quality": "Quality", "allocation": "Allocation", "memory": "Memory", "predicted": "Predicted and measured",
        "sensitivity": "Sensitivity", "interactions": "Interactions", "backend": "Backend", "gates": "Gates",
        "checks": "Checks", "sample": "What it writes", "made": "How it was made",
    }  # fmt: skip
    if c.backend_losses is None:
        del found["backend"]
    if not c.gates:
        del found["gates"]
    return list(found.items())


def _head(c: Comparison) -> dict[str, Any]:
    artifact, report = c.mix[0], c.files[THIS_FILE]
    needed, there = c.plan.total_bytes, c.plan.memory_bytes
    rate = c.allocation.speeds.generation if c.allocation.speeds else None
    against = "all blocks are at 4 bit"
    if report != c.at_4_bit:
        against = f"{difference_told(report, c.at_4_bit)} nats/token to 4 bit"
    key = [
        ("File", f"{artifact.file_bytes / _MIB:,.1f}", "MiB", f"{artifact.bits_per_weight:.2f} bits per weight"),
        ("Blocks", f"{c.allocation.average_bits:.2f}", "bits", f"on average; {c.allocation.players} are the players"),
        ("Perplexity", "∞" if report.perplexity is None else f"{report.perplexity:.2f}", "", against),
        ("Memory", f"{needed / _MIB:,.0f}", "MiB", f"of {there / _MIB:,.0f}, the system's reserve included"),
    ]
    if rate is not None:
        number, unit, told = rate_told(rate).split(" ", 2)
        key.append(("Speed", number, unit, f"generation as predicted, {told.strip('()')}"))
    return {
        "title": f"{c.allocation.model_name} for {c.device.title}",
        "device": c.device.title,
        "file": artifact.artifact,
        "passed": c.passed,
        "verdict": c.verdict,
        "overview": c.overview,
        "key": key,
    }


def _files(c: Comparison) -> dict[str, Any]:
    head, rows = file_head(c), file_rows(c)
    unknown = ["not measured", *["–"] * (len(head) - 4)]
    rows += [
        [f"stock {mix.name}", f"{mix.file_bytes:,}", f"{mix.bits_per_weight:.2f}", *unknown] for mix in stock_mixes(c)
    ]
    caption = [
        "The loss is that of the evaluation text beyond all blocks at 4 bit, with the standard error of the paired "
        "differences."
    ]
    if set(c.allocation.player_bits) not in ({2}, {4}):
        caption.append("Below the dashed line a mix is better than a blend of the uniform files.")
    caption.append(
        "Of llama.cpp's stock mixes, on the scale below, only the size is known: nobody measured their quality here."
    )
    return {
        "quality_plot": quality(c),
        "quality_caption": " ".join(caption),
        "file_head": head,
        "file_rows": rows,
        "how_measured": how_measured(c),
        "prediction_rows": [(row.what, row.predicted, row.measured, row.told) for row in predictions(c)],
    }


def _allocation(c: Comparison) -> dict[str, Any]:
    rows = [
        (player.name, str(bits), f"{player.weights:,}")
        for player, bits in zip(players(c), c.allocation.player_bits, strict=True)
    ]
    known = {name for name, *_ in rows}
    weights = {t.gguf_name.removesuffix(".weight"): t.weights for t in c.profile.model.tensors}
    rows += [(name, kind.upper(), f"{weights[name]:,}") for name, kind in outer_types(c).items() if name not in known]
    return {"headline": headline(c), "strip_plot": strip(c), "allocation_rows": rows}


def _memory(c: Comparison) -> dict[str, Any]:
    groups = memory_groups(c.plan) | {"free": c.plan.free_bytes}
    return {
        "memory_setting": memory_setting(c),
        "memory_plot": memory(c),
        "memory_rows": [
            (name, GROUP_ROLES[name], f"{size / _MIB:,.1f}", f"{size / c.plan.memory_bytes:.1%}")
            for name, size in groups.items()
        ],
        "memory_parts": [(name, f"{size / _MIB:,.1f}") for name, size in memory_parts(c.plan).items()],
    }


def _sensitivity(c: Comparison) -> dict[str, Any]:
    found, rows = c.profile, []
    if isinstance(found, LadderProfile):
        head = ["player", "bits", *(f"at {bits} bit" for bits in c.allocation.types)]
        title = "KL divergence at every width, 10⁻³ nats per token"
        caption = "Every player alone at every width; rings mark what was chosen. The scale is logarithmic."
        table = found.divergences(c.allocation.types)[: len(players(c))]
        for player, bits, row in zip(players(c), c.allocation.player_bits, table, strict=True):
            rows.append((player.name, str(bits), *(f"{1e3 * value:.4f}" for value in row)))
    else:
        head, estimate = ["player", "bits", "φ, nats/token", "standard error"], found.estimate()
        title = f"Shapley values of the increase of the {what_is_measured(found)}"
        caption = "Shapley values with standard errors; colour and shape tell the bits that the player was given."
        for index, (player, bits) in enumerate(zip(players(c), c.allocation.player_bits, strict=True)):
            rows.append((player.name, str(bits), f"{estimate.phi[index]:+.5f}", f"{estimate.phi_stderr[index]:.5f}"))
    return {
        "sensitivity_told": what_was_measured(c), "sensitivity_plot": sensitivity(c), "sensitivity_caption": caption,
        "sensitivity_title": title, "sensitivity_head": head, "sensitivity_rows": rows,
    }  # fmt: skip


def _measured(c: Comparison) -> dict[str, Any]:
    drawing, found = measured(c), c.profile
    if drawing is None or isinstance(found, LadderProfile):
        return {"measured_plot": None, "measured_caption": "", "measured_rows": []}
    tried = coalitions(c, found)
    best = sorted((each for each in tried if each.fits), key=lambda each: each.increase)[:_LISTED]
    return {
        "measured_plot": drawing,
        "measured_caption": f"All {len(tried):,} coalitions that the game measured on the calibration text, by the "
        f"{what_is_measured(found)}; "
        "filled are those that meet every limit, and the diamond is the choice.",
        "measured_rows": [(to_text(each.bits), f"{each.average_bits:.3f}", f"{each.increase:+.5f}") for each in best],
    }


def _pairs(c: Comparison) -> dict[str, Any]:
    drawing, pairs = heat_map(c), covariances(c)
    if drawing is None or pairs is None:
        return {"pairs_plot": None, "pairs_told": "", "pair_rows": [], "pair_unit": ""}
    matrix, names, (factor, unit) = pairs.covariance, pairs.names, pairs.scale
    spread = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    upper = [(i, j) for i in range(len(names)) for j in range(i)]
    strongest = sorted(upper, key=lambda pair: -abs(matrix[pair]))[:_LISTED]
    rows = []
    for i, j in strongest:
        scale = spread[i] * spread[j]
        correlation = f"{matrix[i, j] / scale:+.2f}" if scale else "–"
        rows.append((f"{names[j]}, {names[i]}", f"{factor * matrix[i, j]:+.3f}", correlation))
    told = (
        "How the players' increases vary together over random orders in which they drop to 2 bit: the covariance C. "
        "Without interactions an increase is the same in every order, and C is zero."
    )
    joined = " Shown are the sums over the players of a block." if pairs.are_blocks else ""
    return {"pairs_plot": drawing, "pairs_told": told + joined, "pair_rows": rows, "pair_unit": unit}


def _lent(c: Comparison) -> dict[str, Any]:
    name, losses = backend_name(c.profile), c.backend_losses
    if losses is None:
        return {"lent_rows": [], "lent_setting": "", "lent_told": "", "backend": name}
    rows = [
        (row, f"{ours:.4f}", f"{shipped:.4f}")
        for row, ours, shipped in zip(LENT_ROWS, losses.backend, losses.kquant, strict=True)
    ]
    return {
        "lent_rows": rows, "lent_setting": lent_setting(c), "lent_told": lent_told(losses, name), "backend": name,
    }  # fmt: skip


def _papers(c: Comparison, command: str) -> dict[str, Any]:
    artifact, report = c.mix
    device, context, cache = c.allocation.device, str(c.allocation.context_tokens), c.allocation.kv_type
    run = ["llama-cli", "-m", artifact.artifact, "-c", context, "-t", str(c.device.threads)]
    run += [] if cache == "f16" else ["-ctk", cache, "-ctv", cache]
    return {
        "gate_rows": [(name, _STATUS[status], *row) for name, status, *row in gate_rows(c)],
        "check_rows": [(check.name.replace("_", " "), _STATUS[check.status], check.detail) for check in report.checks],
        "sample": sample(report),
        "command": command,
        "validate_command": shlex.join(
            ["impq-edge", "validate", artifact.artifact, "--device", device, "--context", context]
        ),
        "run_command": shlex.join(run),
        "provenance": provenance(c),
    }  # fmt: skip
