"""Plots of the players: their bits, what they suffer, and how they interact."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from impq_edge.ggml.types import LADDER, TensorType
from impq_edge.model.players import Player
from impq_edge.releases.comparison import Comparison
from impq_edge.releases.facts import Pairs, covariances, part_of, players, power_of_ten
from impq_edge.releases.figure import NARROW_PX, WIDE_PX, Drawing, box, canvas, colour, draw, tip, words
from impq_edge.spqe.ladder import LadderProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW_PX, _GAP_PX, _LARGEST_CELL_PX = 26, 5, 52
_MAP_PX, _SCALE_PX, _TURNED_MARGIN_PX = 560, 66, 40
_CELLS = {True: 36, False: 12}  # in one line of the strip: wide, narrow
_MARKERS = {2: "v", 3: "<", 4: "o", 5: "s", 6: "D", 8: "^"}
_SMALLEST = 1e-9  # nats per token; logarithmic scales end here


def bits_of(kind: TensorType) -> int:
    """Return the nominal bits of a type, of those that have a colour."""
    known = {kind: bits for bits, kind in LADDER.items()}
    return known.get(kind, 16 if kind in (TensorType.F16, TensorType.BF16, TensorType.F32) else 8)


def outer_types(c: Comparison) -> dict[str, TensorType]:
    """Return the types of embedding and head, by their names in a GGUF."""
    return {
        t.gguf_name.removesuffix(".weight"): c.allocation.tensor_types[t.gguf_name]
        for t in c.profile.model.tensors
        if t.role in ("embedding", "head")
    }


def strip(c: Comparison) -> Drawing:
    """Draw everybody's bits: a column for each block, a row for each part of it, and embedding and head below."""
    who = [
        (player, bits) for player, bits in zip(players(c), c.allocation.player_bits, strict=True)
        if player.block is not None
    ]  # fmt: skip
    parts = list(dict.fromkeys(part_of(player) for player, _ in who))
    blocks, outer = c.profile.model.n_blocks, outer_types(c)

    def height(wide: bool) -> int:
        lines = math.ceil(blocks / _CELLS[wide])
        return lines * (20 + _ROW_PX * len(parts) + 2 * _GAP_PX) + (_ROW_PX + _GAP_PX) * len(outer)

    def paint(figure: "Figure", wide: bool) -> None:
        axes = canvas(figure, wide, height(wide))
        left = 104 if wide else 82
        across = math.ceil(blocks / math.ceil(blocks / _CELLS[wide]))
        cell = min(_LARGEST_CELL_PX, ((WIDE_PX if wide else NARROW_PX) - left) / across)
        top = 0.0
        for first in range(0, blocks, across):
            for block in range(first, min(first + across, blocks)):
                words(axes, left + (block - first + 0.5) * cell, top + 10, str(block), "muted")
            for row, part in enumerate(parts):
                y = top + 20 + row * _ROW_PX
                words(axes, left - 8, y + _ROW_PX / 2, part or "block", "ink", ha="right")
                for player, bits in who:
                    if part_of(player) == part and first <= (player.block or 0) < first + across:
                        x = left + ((player.block or 0) - first) * cell
                        _cell(axes, (x, y, cell, _ROW_PX), bits, str(bits), f"{player.name}: {bits} bit")
            top += 20 + _ROW_PX * len(parts) + 2 * _GAP_PX
        for name, kind in outer.items():
            words(axes, left - 8, top + _ROW_PX / 2, name, "ink", ha="right")
            told = kind.upper()
            _cell(axes, (left, top, across * cell, _ROW_PX), bits_of(kind), told, f"{name}: {told}")
            top += _ROW_PX + _GAP_PX

    label = f"Bits of the {len(who)} players of {blocks} blocks, and of embedding and head; the table below has all."
    return draw("strip", label, paint, wide_px=height(True), narrow_px=height(False))


def _cell(axes: Any, place: tuple[float, float, float, float], bits: int, text: str, told: str) -> None:
    x, y, width, height = place
    box(axes, (x + 1, y + 1, width - 2, height - 2), f"bits-{bits}", told)
    words(axes, x + width / 2, y + height / 2, text, "on-bits")


def sensitivity(c: Comparison) -> Drawing:
    """Draw what every player suffers with its standard error, a panel for each part of a block."""
    who = players(c)
    panels: dict[str, list[int]] = {}
    for index, player in enumerate(who):
        panels.setdefault(part_of(player) if player.block is not None else "embedding, head", []).append(index)
    ladder = isinstance(c.profile, LadderProfile)
    each = 250 if len(panels) == 1 else 185

    def paint(figure: "Figure", wide: bool) -> None:
        across = 2 if wide and len(panels) > 1 else 1
        down = math.ceil(len(panels) / across)
        grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for axes, (part, members) in zip(grid, panels.items(), strict=False):
            axes.set_title(part)
            (_ladder_panel if ladder else _game_panel)(axes, c, who, members)
            _name_players(axes, who, members, wide)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supylabel("KL divergence, nats/token" if ladder else "φ, nats/token", fontsize=11)
        handles, labels = grid[0].get_legend_handles_labels()
        kept = dict(zip(labels, handles, strict=True))
        figure.legend([*kept.values()], [*kept], loc="outside upper left", ncols=len(kept) if wide else 3,
                      handletextpad=0.3, columnspacing=1.2)  # fmt: skip

    label = (
        f"What each of {len(who)} players costs, with standard errors; the table below has the numbers."
    )  # fmt: skip
    rows = {True: math.ceil(len(panels) / min(2, len(panels))), False: len(panels)}
    return draw("sensitivity", label, paint, wide_px=40 + each * rows[True], narrow_px=60 + each * rows[False])


def _game_panel(axes: Any, c: Comparison, who: Sequence[Player], members: list[int]) -> None:
    assert not isinstance(c.profile, LadderProfile)
    estimate = c.profile.estimate()
    axes.axhline(0, color=colour("muted"), linewidth=1)
    for bits in c.allocation.types:
        for position, index in enumerate(members):
            if c.allocation.player_bits[index] == bits:
                phi, error = estimate.phi[index], estimate.phi_stderr[index]
                axes.errorbar(
                    [position], [phi], yerr=[error], fmt=_MARKERS[bits], color=colour(f"bits-{bits}"), capsize=3,
                    label=f"gets {bits} bit", gid=tip(f"{who[index].name}: {phi:+.5f} ± {error:.5f}"),
                )  # fmt: skip


def _ladder_panel(axes: Any, c: Comparison, who: Sequence[Player], members: list[int]) -> None:
    assert isinstance(c.profile, LadderProfile)
    rungs = {(rung.player, rung.bits): np.array(rung.divergences) for rung in c.profile.rungs}
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter(lambda value, _: power_of_ten(round(math.log10(value))))
    for bits in c.allocation.types:
        windows = [rungs[who[index].name, bits] for index in members]
        means = np.maximum([values.mean() for values in windows], _SMALLEST)
        errors = [values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0 for values in windows]
        role = colour(f"bits-{bits}")
        line = "-" if who[members[0]].block is not None else "none"
        axes.plot(range(len(members)), means, linestyle=line, color=role, linewidth=1, alpha=0.6)
        axes.errorbar(range(len(members)), means, yerr=np.minimum(errors, means - means / 10), fmt=_MARKERS[bits],
                      color=role, markersize=4, linewidth=1, label=f"{bits} bit")  # fmt: skip
        for position, index in enumerate(members):
            if c.allocation.player_bits[index] == bits:
                told = tip(f"{who[index].name}: {bits} bit chosen, {means[position]:.6f}")
                axes.plot([position], [means[position]], "o", markersize=11, markerfacecolor="none",
                          markeredgecolor=colour("ink"), markeredgewidth=1.5, gid=told, label="chosen")  # fmt: skip


def _name_players(axes: Any, who: Sequence[Player], members: list[int], wide: bool) -> None:
    inside = who[members[0]].block is not None
    step = 1 if not inside else math.ceil(len(members) / (24 if wide else 12))
    ticks = range(0, len(members), step)
    axes.set_xticks(ticks, [str(who[members[i]].block) if inside else who[members[i]].name for i in ticks])
    axes.set_xlim(-0.6, len(members) - 0.4)
    axes.tick_params(axis="x", length=0)
    if inside:
        axes.set_xlabel("block")


def heat_map(c: Comparison) -> Drawing | None:
    """Draw C as cells, the stronger the larger; nothing where no interactions were estimated."""
    pairs = covariances(c)
    if pairs is None or len(pairs.names) < 2:
        return None

    def paint(figure: "Figure", wide: bool) -> None:
        size = _MAP_PX if wide else NARROW_PX
        axes = canvas(figure, wide, size + (0 if wide else _SCALE_PX))
        _paint_pairs(axes, pairs, size)
        _paint_scale(axes, pairs, (size + 60, 60) if wide else (15, size + 26), upright=wide)

    label = f"How the loss increases of {len(pairs.names)} players vary together; the table has the strongest pairs."
    return draw("pairs", label, paint, wide_px=_MAP_PX, narrow_px=NARROW_PX + _SCALE_PX)


def _paint_pairs(axes: Any, pairs: Pairs, size_px: float) -> None:
    """The diagonal is left out: it holds variances, and would outshine the rest."""
    count, margin = len(pairs.names), 14 + 7 * max(map(len, pairs.names))
    cell = (size_px - margin) / count
    step = max(1, math.ceil(15 / cell))
    factor, unit = pairs.scale
    for i, name in enumerate(pairs.names):
        if i % step == 0:
            turned = 0 if margin < _TURNED_MARGIN_PX else 90
            words(axes, margin - 6, (i + 0.5) * cell, name, "muted", ha="right")
            words(axes, margin + (i + 0.5) * cell, count * cell + 6, name, "muted", va="top", rotation=turned)
        for j, other in enumerate(pairs.names):
            value = float(pairs.covariance[i, j])
            role, strength = _shade(value, pairs.largest) if i != j else ("rule", 1.0)
            told = f"{name}, {other}: {factor * value:+.2f}" if i != j else f"{name}, variance: {factor * value:.2f}"
            place = (margin + j * cell, i * cell, 0.95 * cell, 0.95 * cell)
            box(axes, place, role, f"{told} {unit}", alpha=strength)


def _shade(value: float, largest: float) -> tuple[str, float]:
    """Return the role and the opacity of a covariance; the page shines through where there is none."""
    return ("warm" if value > 0 else "cool"), round(abs(value) / largest, 2) if largest else 0.0


def _paint_scale(axes: Any, pairs: Pairs, corner: tuple[float, float], *, upright: bool) -> None:
    (x, y), (factor, unit) = corner, pairs.scale
    words(axes, x, y - (18 if upright else 10), f"covariance, {unit}", "ink", ha="left")
    for index, step in enumerate((1.0, 0.5, 0.0, -0.5, -1.0)):
        value = step * pairs.largest
        role, strength = _shade(value, pairs.largest)
        left, top = (x, y + 34 * index) if upright else (x + 60 * index, y)
        told = f"{factor * value:+.1f}" if step else "0"
        box(axes, (left, top, 34, 30) if upright else (left, top, 56, 16), role, told, strength)
        place = (left + 44, top + 15) if upright else (left + 28, top + 26)
        words(axes, *place, told, "ink", ha="left" if upright else "center")
