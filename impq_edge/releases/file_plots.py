"""Plots of the files: quality against size, everything the game measured, and a device's memory."""

import math
from typing import TYPE_CHECKING, Any

from impq_edge.releases.comparison import Comparison
from impq_edge.releases.facts import Point, Stock, Tried, coalitions, memory_groups, points, stock_mixes
from impq_edge.releases.figure import NARROW_PX, WIDE_PX, Drawing, box, canvas, colour, draw, tip, words
from impq_edge.spqe.ladder import LadderProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20
GROUP_ROLES = {
    "weights": "weights", "KV cache": "cache", "compute buffers": "buffers", "process and tokenizer": "process",
    "system reserve": "reserve", "free": "free",
}  # fmt: skip
"""Group of memory → the role of its colour."""

_SHOWN_COALITIONS = 2000  # dots


def quality(c: Comparison) -> Drawing | None:
    """Draw loss against size; of the stock mixes, which nobody measured, only the size. None without a number."""
    files, stock = points(c), stock_mixes(c)
    if not files:
        return None

    def paint(figure: "Figure", wide: bool) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.22 if wide else 0.34))
        axes.margins(x=0.14, y=0.2)
        sizes = [each.file_bytes for each in files] + [each.file_bytes for each in stock]
        _paint_files(axes, files, (min(sizes) / _MIB, max(sizes) / _MIB), "perplexity" if wide else "ppl")
        _paint_stock(below, stock, wide)
        axes.tick_params(axis="x", bottom=False)
        axes.set_ylabel("loss beyond 4 bit, nats/token")
        below.set_xlabel("file, MiB")

    label = "Loss beyond all blocks at 4 bit against file size: " + "; ".join(
        f"{point.name} {point.file_bytes / _MIB:,.1f} MiB, {point.difference:+.4f}" for point in files
    )
    return draw("quality", label, paint, wide_px=380, narrow_px=330)


def _paint_files(axes: Any, files: list[Point], ends: tuple[float, float], measure: str) -> None:
    uniform = sorted((p.file_bytes / _MIB, p.difference) for p in files if p.name.startswith("all "))
    if len(uniform) > 1:
        axes.plot(*zip(*uniform, strict=True), "--", color=colour("muted"), linewidth=1)
    for point in files:
        ours = point.name == "this file"
        size, error = point.file_bytes / _MIB, 0.0 if math.isnan(point.stderr) else point.stderr
        told = f"{point.name}: {point.file_bytes:,} bytes, {point.difference:+.4f} ± {error:.4f} nats/token"
        axes.errorbar(
            [size], [point.difference], yerr=[error], fmt="o" if ours else "s", markersize=9 if ours else 7,
            color=colour("ours" if ours else "muted"), capsize=4, gid=tip(told),
        )  # fmt: skip
        left = size - ends[0] > 0.4 * (ends[1] - ends[0])  # of our mark there is room for its words
        axes.annotate(
            f"{point.name.replace('blocks at ', '')}\n{measure} {point.perplexity:.2f}", (size, point.difference),
            xytext=((-10 if left else 10), -6) if ours else (10, 2), textcoords="offset points",
            ha="right" if ours and left else "left",
            va="top" if ours else "bottom", color=colour("ours" if ours else "ink"),
            weight="bold" if ours else "normal",
        )  # fmt: skip


def _paint_stock(axes: Any, stock: list[Stock], wide: bool) -> None:
    """Their sizes alone, on a scale of its own."""
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    for index, mix in enumerate(stock):
        size, told = mix.file_bytes / _MIB, tip(f"{mix.name}: {mix.file_bytes:,} bytes, not measured")
        axes.plot([size], [0.08], "|", color=colour("muted"), markersize=12, markeredgewidth=2, gid=told)
        row = 0.55 if wide or index % 2 == 0 else 0.9  # neighbours get in each other's way on a phone
        axes.text(size, row, mix.name, color=colour("ink"), ha="center", va="center")


def measured(c: Comparison) -> Drawing | None:
    """Draw every coalition of the game that was measured; nothing for ladders, which play none."""
    if isinstance(c.profile, LadderProfile) or c.allocation.types != (2, 4):
        return None
    found = coalitions(c, c.profile)
    shown = [each for each in found if not each.is_chosen][-_SHOWN_COALITIONS:]

    def paint(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        for fits, name, face in ((False, "over a limit", "none"), (True, "meets every limit", colour("cool"))):
            some = [each for each in shown if each.fits == fits]
            axes.plot(
                [each.average_bits for each in some], [each.increase for each in some], "o", markersize=4,
                markerfacecolor=face, markeredgecolor=colour("cool" if fits else "muted"), label=name, linestyle="none",
            )  # fmt: skip
        _paint_chosen(axes, c, found)
        axes.set_xlabel("average bits of the blocks")
        axes.set_ylabel("beyond all at 4 bit, nats/token")
        figure.legend(loc="outside upper left", ncols=3 if wide else 2, handletextpad=0.3, columnspacing=1.2)

    label = f"{len(found):,} coalitions that the game measured, by average bits and harm; the chosen one marked."
    return draw("measured", label, paint, wide_px=340, narrow_px=310)


def _paint_chosen(axes: Any, c: Comparison, found: list[Tried]) -> None:
    """As it was measured, or where the estimate puts it."""
    known = [each.increase for each in found if each.is_chosen]
    axes.plot(
        [c.allocation.average_bits], known or [c.allocation.objective], "D", markersize=10, markeredgewidth=2,
        color=colour("ours"), markerfacecolor=colour("ours") if known else "none",
        label="chosen" if known else "chosen, as predicted", linestyle="none",
    )  # fmt: skip


def memory(c: Comparison) -> Drawing:
    """Draw where the device's memory goes: all of it, and the part that is the model's once more, larger."""
    groups = memory_groups(c.plan)
    reserve = groups.pop("system reserve")
    whole = {**groups, "system reserve": reserve, "free": max(0, c.plan.free_bytes)}
    bars = [(f"all of the device: {c.plan.memory_bytes / _MIB:,.0f} MiB", whole)]
    bars.append((f"of it the model: {sum(groups.values()) / _MIB:,.1f} MiB", groups))

    def paint(figure: "Figure", wide: bool) -> None:
        axes = canvas(figure, wide, 150)
        for row, (title, parts) in enumerate(bars):
            words(axes, 0, 75 * row + 14, title, "ink", ha="left")
            _paint_bar(axes, parts, 75 * row + 26, WIDE_PX if wide else NARROW_PX)

    label = "Memory: " + ", ".join(f"{name} {size / _MIB:,.1f} MiB" for name, size in whole.items())
    return draw("memory", label, paint, wide_px=150, narrow_px=150)


def _paint_bar(axes: Any, parts: dict[str, int], top: float, width: float) -> None:
    total, left = sum(parts.values()), 0.0
    for name, size in parts.items():
        part = width * size / total
        role = GROUP_ROLES[name]
        box(axes, (left, top, max(part - 1, 0.5), 36), role, f"{name}: {size / _MIB:,.1f} MiB")
        if part > 9 * len(name):
            words(axes, left + part / 2, top + 18, name, "ink" if name == "free" else "on-part")
        left += part
