"""``report.html`` of a release: every file on every device on one page, from the manifest alone."""

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from impq_edge.releases.card import finite, speed_told
from impq_edge.releases.figure import Drawing, colour, draw, tip
from impq_edge.releases.gates import Gate, told_number
from impq_edge.releases.manifest import PAGE_FILE, Manifest, ReleasedFile, ReleasedModel, Taker
from impq_edge.releases.markup import printable, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20
_STATUS = {"passed": "✓\N{NO-BREAK SPACE}passed", "failed": "✗\N{NO-BREAK SPACE}failed"}


def render_overview(made: Manifest) -> str:
    """Return the page; matplotlib must be installed. The same manifest gives the same bytes."""
    failed = sum(gate.status == "failed" for _, _, gate in _gates(made))
    sections = [(f"model-{number}", model.name) for number, model in enumerate(made.models, 1)]
    return rendered(
        "release.html.jinja",
        {
            "title": made.name,
            "told": f"{_count(len(made.models), 'model')} for {_count(_devices(made), 'device')}",
            "passed": made.passed,
            "verdict": "all gates passed" if made.passed else f"{_count(failed, 'gate')} failed",
            "key": _key(made, failed),
            "sections": [*sections, ("gates", "Gates"), ("made", "How it was made")],
            "models": [_model(made, number, model) for number, model in enumerate(made.models, 1)],
            "failed_rows": [_gate_row(*found) for found in _gates(made) if found[2].status == "failed"],
            "gate_rows": [_gate_row(*found) for found in _gates(made)],
            "command": made.command,
            "input_rows": [(entry.kind, entry.name, entry.sha256) for entry in made.inputs],
            "version_rows": list(made.versions.items()),
            "machine": made.machine,
            "reached": _reached(made),
        },
    )


def _key(made: Manifest, failed: int) -> list[tuple[str, str, str, str]]:
    total = sum(file.file_bytes for file in made.files)
    gates = len(list(_gates(made)))
    worst = max((t.measured.kl_divergence, t.device) for file in made.files for t in file.takers)
    fullest = max((_share(t), t.device) for file in made.files for t in file.takers)
    return [
        ("Files", str(len(made.files)), "", f"{total / _MIB:,.1f} MiB in all"),
        ("Devices", str(_devices(made)), "", f"{_count(len(_contexts(made)), 'context length')}"),
        ("Gates", f"{gates - failed}", f"of {gates}", "hold"),
        ("Furthest from F16", f"{worst[0]:.4f}", "nats", f"KL divergence per token, for {worst[1]}"),
        ("Fullest", f"{fullest[0]:.0%}", "", f"of what {fullest[1]} leaves a process"),
    ]


def _model(made: Manifest, number: int, model: ReleasedModel) -> dict[str, Any]:
    files = [(index, file) for index, file in enumerate(made.files, 1) if file.model == model.name]
    return {
        "id": f"model-{number}",
        "name": model.name,
        "told": _origin(model),
        "plot": _plot(number, model, files),
        "caption": "KL divergence from the unquantised model against file size, both on the evaluation text; squares "
        "are the same model with all blocks at 4 and at 2 bit. "
        + "; ".join(f"{index}: {_whom(file)}" for index, file in files)
        + ".",
        "rows": [_row(index, file, taker) for index, file in files for taker in file.takers],
        "compared": [
            (
                other.what, f"{other.file_bytes / _MIB:,.1f}", finite(other.perplexity), f"{other.kl_divergence:.4f}",
            )
            for other in model.compared
        ],
    }  # fmt: skip


def _origin(model: ReleasedModel) -> str:
    told = [f"{model.weights:,} weights", f"{model.evaluations:,} evaluations of sensitivity"]
    if model.license or model.license_name:
        told.append(f"licence {model.license_name or model.license}")
    if model.commit:
        told.append(f"commit {model.commit[:12]}")
    return ", ".join(told)


def _row(index: int, file: ReleasedFile, taker: Taker) -> dict[str, Any]:
    measured = taker.measured
    failed = [gate.name for gate in taker.gates if gate.status == "failed"]
    share, (speed, basis) = _share(taker), speed_told(taker)
    return {
        "title": taker.title,
        "device": taker.device,
        "context": f"{taker.context_tokens:,}",
        "report": str(PurePosixPath(taker.records, PAGE_FILE)),
        "number": str(index),
        "file": file.file,
        "size": f"{file.file_bytes / _MIB:,.1f}",
        "memory": f"{_memory(taker) / _MIB:,.0f}"
        + ("" if taker.budget_bytes is None else f" of {taker.budget_bytes / _MIB:,.0f}"),
        "share": f"{share:.3f}",
        "share_told": f"{share:.0%} of what the device leaves",
        "ratio": f"×{measured.perplexity_ratio_to_f16:.4f}",
        "divergence": f"{measured.kl_divergence:.4f} ± {measured.kl_divergence_stderr:.4f}",
        "speed": speed,
        "basis": basis,
        "passed": taker.passed,
        "gates": f"✗\N{NO-BREAK SPACE}{', '.join(failed)}" if failed else _STATUS["passed"],
    }


def _memory(taker: Taker) -> int:
    """Return what counts of a process's memory, in bytes: what the gate compares."""
    worse = max(taker.measured.memory_bytes, taker.predicted.memory_bytes)
    return worse if taker.counted_bytes is None else taker.counted_bytes


def _share(taker: Taker) -> float:
    return _memory(taker) / taker.budget_bytes if taker.budget_bytes else 0.0


def _plot(number: int, model: ReleasedModel, files: list[tuple[int, ReleasedFile]]) -> Drawing:
    ours = [(str(i), f.file_bytes / _MIB, f.takers[0].measured.kl_divergence, printable(f.file)) for i, f in files]
    uniform = [
        (f"all {other.what}", other.file_bytes / _MIB, other.kl_divergence, f"all blocks at {other.what}")
        for other in model.compared
        if other.what != "F16" and math.isfinite(other.kl_divergence)
    ]

    def paint(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        axes.margins(x=0.14, y=0.2)
        axes.plot([size for _, size, *_ in uniform], [v for *_, v, _ in uniform], "--", color=colour("muted"))
        for name, size, value, told in (*uniform, *ours):
            is_ours = name.isdecimal()
            axes.plot(
                [size], [value], "o" if is_ours else "s", markersize=9 if is_ours else 7,
                color=colour("ours" if is_ours else "muted"), gid=tip(f"{told}: {size:,.1f} MiB, {value:.4f}"),
            )  # fmt: skip
            axes.annotate(
                name, (size, value), xytext=(-9, -5) if is_ours else (9, 3), textcoords="offset points",
                ha="right" if is_ours else "left", va="top" if is_ours else "bottom",
                color=colour("ours" if is_ours else "ink"), weight="bold" if is_ours else "normal",
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("file, MiB")
        axes.set_ylabel("KL divergence, nats/token" if wide else "KLD, nats/token")

    label = f"KL divergence against file size of {printable(model.name)}: " + "; ".join(
        f"{told} {size:,.1f} MiB, {value:.4f}" for _, size, value, told in (*ours, *uniform)
    )
    return draw(f"model{number}", label, paint, wide_px=330, narrow_px=290)


def _whom(file: ReleasedFile) -> str:
    return ", ".join(dict.fromkeys(taker.device for taker in file.takers))


def _gates(made: Manifest) -> list[tuple[ReleasedFile, Taker, Gate]]:
    return [(file, taker, gate) for file in made.files for taker in file.takers for gate in taker.gates]


def _gate_row(file: ReleasedFile, taker: Taker, gate: Gate) -> tuple[str, ...]:
    return (
        f"{file.model}, {taker.device}, {taker.context_tokens:,} tokens", gate.name, _STATUS[gate.status],
        told_number(gate.value), told_number(gate.limit), gate.detail,
    )  # fmt: skip


def _reached(made: Manifest) -> str:
    """Say where speeds and memory come from."""
    takers = [taker.measured for file in made.files for taker in file.takers]
    told = ["Perplexity and KL divergence were measured on the machine that made the release."]
    if any(measured.over_ssh for measured in takers):
        told.append("Speed and memory marked “over ssh” were measured on the device itself.")
    if not all(measured.on_device for measured in takers):
        told.append(
            "Speeds marked “predicted” are of devices that were not reached; their memory is the larger of what was "
            "predicted for the device and what was measured here."
        )
    return " ".join(told)


def _devices(made: Manifest) -> int:
    return len({taker.device for file in made.files for taker in file.takers})


def _contexts(made: Manifest) -> set[int]:
    return {taker.context_tokens for file in made.files for taker in file.takers}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
