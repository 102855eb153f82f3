"""Plots of the study, for `study_report.py`. matplotlib is imported when one is drawn; same cells, same file."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from impq_edge.records import atomic_path
from impq_edge.study.cells import Cell
from impq_edge.study.contests import BEST_ISOLATED, ISOLATED, RANDOM_MEAN, Game
from impq_edge.study.regret import EVERY_MODEL, HELD_OUT, Regret
from impq_edge.study.tables import PUBLISHED, REFERENCES, Quality
from impq_edge.study.transfer import Transfer

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#777777"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""

_GRID = {"visible": True, "color": "#E3E3E3", "linewidth": 0.5}
_PANELS_ACROSS = 3
_BITS_PER_CHARACTER = 0.041  # of a label left of the lines
_LINEAR_PERCENT = 1.0  # bars are linear up to here, and logarithmic beyond
_NO_REGRET = 1e-4  # relative; where the logarithmic scale of regrets ends and zero is


@dataclasses.dataclass(frozen=True)
class _Series:
    label: str
    colour: str
    marker: str
    line: str
    width: float


def _series(ours: str) -> dict[str, _Series]:
    """Return the lines of the first plot, the most important on top."""
    return {
        "singles": _Series("singles", ORANGE, "v", (0, (1, 1)), 1.0),  # type: ignore[arg-type]
        BEST_ISOLATED: _Series("best isolated", VERMILLION, "s", "--", 1.0),
        PUBLISHED: _Series("IMPQ, α = 0.5", GREEN, "^", "-.", 1.0),
        "evolution": _Series("evolution", PURPLE, "D", ":", 1.2),
        ours: _Series(ours, BLUE, "o", "-", 1.6),
    }


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure that is saved to ``path`` in the format of its suffix."""
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "impq-edge", "svg.fonttype": "none", "font.size": 9, "font.sans-serif": ["DejaVu Sans"]}
    with style.context(["default", settings]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        kind = path.suffix.removeprefix(".")
        nameless = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=nameless, dpi=110)
            if kind == "svg":
                temporary.write_text(_trimmed(temporary.read_text("utf-8")), "utf-8")


def _trimmed(svg: str) -> str:
    """Return a plot with coordinates to a hundredth of a point: half the file, and no difference that can be seen."""
    return re.sub(r"-?\d+\.\d{5,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


# Perplexity against average bits.


def plot_perplexity(cells: Sequence[Cell], rows: Sequence[Quality], ours: str, folder: Path) -> list[Path]:
    """Draw perplexity against average bits, a file per model and held-out text, a panel per game."""
    paths = []
    for model, text in sorted({(row.game.model, row.text) for row in rows}):
        mine = [row for row in rows if (row.game.model, row.text) == (model, text)]
        games = sorted({row.game for row in mine})
        across = min(_PANELS_ACROSS, len(games))
        down = math.ceil(len(games) / across)
        path = folder / f"perplexity-{model}-{text}.svg"
        with _figure(path, 4.0 * across, 3.0 * down + 0.4) as figure:
            panels = figure.subplots(down, across, squeeze=False).flatten()
            for axes, game in zip(panels, games, strict=False):
                here = [row for row in mine if row.game == game]
                _perplexity_panel(axes, here, _random_band(cells, game, text), ours)
                axes.set_title(f"{game.backend}, {game.players}", fontsize=9, loc="left")
            for axes in panels[len(games) :]:
                axes.set_visible(False)
            figure.supxlabel("average bits", fontsize=9)
            figure.suptitle(f"{model}: perplexity on {text}, held out")
        paths.append(path)
    return paths


def _random_band(cells: Sequence[Cell], game: Game, text: str) -> dict[float, tuple[float, float]]:
    """Return the best and worst of the random allocations, geometric means over cells."""
    found: dict[float, list[list[float]]] = {}
    for cell in (cell for cell in cells if Game(cell.model, cell.backend, cell.players) == game):
        drawn: dict[float, list[float]] = {}
        for answer in cell.answers:
            if answer.method.startswith(f"{RANDOM_MEAN}-") and text in cell.unquantised:
                drawn.setdefault(answer.average_bits, []).append(cell.exams[answer.coalition][text].loss)
        for bits, losses in drawn.items():
            found.setdefault(bits, []).append(losses)
    return {
        bits: (
            math.exp(sum(map(min, of_cells)) / len(of_cells)),
            math.exp(sum(map(max, of_cells)) / len(of_cells)),
        )
        for bits, of_cells in sorted(found.items())
    }


def _perplexity_panel(axes: Any, rows: Sequence[Quality], band: dict[float, tuple[float, float]], ours: str) -> None:
    labels = []
    if band:
        low, high = zip(*band.values(), strict=True)
        axes.fill_between([*band], low, high, color="#E8E8E8", linewidth=0, zorder=0)
        labels.append((low[0], high[0], "random", GREY))
    for method, series in _series(ours).items():
        points = [
            (row.average_bits, row.log_perplexity.value, row.log_perplexity.stderr or 0.0)
            for row in rows
            if row.method == method and row.log_perplexity.value is not None
        ]
        if not points:
            continue
        bits, logs, stderrs = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        middle = np.exp(logs)
        errors = [middle - np.exp(logs - stderrs), np.exp(logs + stderrs) - middle]
        axes.errorbar(
            bits, middle, yerr=errors, color=series.colour, marker=series.marker, linestyle=series.line,
            linewidth=series.width, markersize=3.5, elinewidth=0.9,
        )  # fmt: skip
        labels.append((middle[0], middle[0], series.label, series.colour))
    averages = sorted(
        {row.average_bits for row in rows if row.average_bits is not None and row.method not in REFERENCES}
    )
    for plain in (row.perplexity for row in rows if row.method == "unquantised"):
        if plain is not None:
            axes.plot([averages[0], averages[-1]], [plain, plain], color="black", linewidth=0.6)
            labels.append((plain, plain, "unquantised", "black"))
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.set_xticks(averages)
    room = max(14, *(len(text) for _, _, text, _ in labels)) * _BITS_PER_CHARACTER
    axes.set_xlim(averages[0] - 0.07 - room, averages[-1] + 0.08)
    axes.grid(which="both", **_GRID)
    _plain(axes)
    _label_left(axes, averages[0], [(math.sqrt(low * high), text, colour) for low, high, text, colour in labels])


def _log_ticks(axes: Any) -> None:
    """Tick a logarithmic scale with plain numbers, also where it spans less than a decade."""
    from matplotlib import ticker

    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    few, many = high / low < 6, high / low > 300
    logarithmic = ticker.LogLocator(subs=(1,) if many else (1, 2, 5), numticks=9)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5) if few else logarithmic)
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label_left(axes: Any, first: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name before its first point, apart from each other."""
    low, high = np.log(axes.get_ylim())
    labels = sorted(labels)
    wanted = [(math.log(value) - low) / (high - low) for value, _, _ in labels]
    for place, (_, text, colour) in zip(spread(wanted, 0.065), labels, strict=True):
        axes.annotate(text, (first - 0.07, place), xycoords=("data", "axes fraction"), ha="right", va="center",
                      fontsize=7.5, color=colour)  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return ascending places as near to ``wanted`` (ascending, of an axis from 0 to 1) as lets them be ``gap`` apart.

    Neighbours that are too close become a group, which is centred on the mean of what its members want.
    """
    groups: list[list[float]] = []
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _ends(groups[-1], gap)[0] - _ends(groups[-2], gap)[1] < gap:
            last = groups.pop()
            groups[-1] += last
    return [_ends(group, gap)[0] + gap * k for group in groups for k in range(len(group))]


def _ends(group: Sequence[float], gap: float) -> tuple[float, float]:
    length = gap * (len(group) - 1)
    start = max(0.02, min(sum(group) / len(group) - length / 2, 0.98 - length))
    return start, start + length


# Regret, and what it costs.


def _colour(method: str, ours: str) -> str:
    """Return the colour of a method's kind."""
    if method.startswith(ours):  # and what it is without one of its parts
        return BLUE
    if method in {*ISOLATED, BEST_ISOLATED}:
        return VERMILLION
    if method.startswith("random"):
        return GREY
    if method.startswith(("impq", "phi")):
        return GREEN
    return PURPLE if method.startswith("evolution") else ORANGE


_KINDS = (("isolated metrics", VERMILLION), ("permutations", GREEN), ("measured changes", ORANGE),
          ("evolution", PURPLE), ("random", GREY))  # fmt: skip


def _legend(figure: Any, ours: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in ((ours, BLUE), *_KINDS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def plot_regret(rows: Sequence[Regret], ours: str, path: Path) -> Path:
    """Draw bars of every method's perplexity above the best known allocation, in all models and in each."""
    held_out = _shown(rows, ours)
    models = _models(held_out)
    every = {row.method: row.median_nats or 0.0 for row in held_out if row.model == EVERY_MODEL}
    methods = sorted(every, key=lambda method: -every[method])
    with _figure(path, max(8.0, 2.5 * len(models) + 0.8), 0.23 * len(methods) + 1.6) as figure:
        panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axes, model in zip(panels, models, strict=True):
            found = {row.method: row for row in held_out if row.model == model}
            _bars(axes, [found.get(method) for method in methods], ours)
            axes.set_title(_title(model), fontsize=9)
        panels[0].set_yticks(range(len(methods)), methods)
        figure.suptitle(
            "Perplexity above the best allocation known, held-out texts: median, 95 % interval; logarithmic above 1 %",
            fontsize=10,
        )
        _legend(figure, ours)
    return path


def _shown(rows: Sequence[Regret], ours: str) -> list[Regret]:
    """Leave out what is not of held-out texts, and others told of the divergence: these are in the tables."""
    return [
        row
        for row in rows
        if row.judged == HELD_OUT and row.median_nats is not None
        if row.method == ours or not row.method.endswith("-kl")
    ]


def _models(rows: Sequence[Regret]) -> list[str]:
    """Return the panels: all models first, and alone where there is one model."""
    models = sorted({row.model for row in rows} - {EVERY_MODEL})
    return [EVERY_MODEL, *models] if len(models) > 1 else models


def _title(model: str) -> str:
    return "all models" if model == EVERY_MODEL else model


def _bars(axes: Any, rows: Sequence[Regret | None], ours: str) -> None:
    highest = max((100 * math.expm1(row.high_nats or row.median_nats or 0) for row in rows if row), default=1.0)
    for place, row in enumerate(rows):
        if row is None:
            axes.annotate(
                "not measured", (0, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
            continue
        middle, low, high = (
            100 * math.expm1(nats if nats is not None else row.median_nats or 0)
            for nats in (row.median_nats, row.low_nats, row.high_nats)
        )
        axes.barh(place, middle, color=_colour(row.method, ours), height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=0.8)
        axes.annotate(_percent(middle), (max(middle, high), place), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    if highest > _LINEAR_PERCENT:
        axes.set_xscale("symlog", linthresh=_LINEAR_PERCENT, linscale=0.7)
        axes.set_xlim(0, 8 * highest)
        axes.set_xticks([0, *(10**power for power in range(5) if 10**power < 3 * highest)])
    else:
        axes.set_xlim(0, 1.3 * max(highest, 1e-3))
        axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g} %" if value else "0")
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", **_GRID)
    _plain(axes)


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 else (f"{value:.1f} %" if value >= 1 else f"{value:.2g} %")


def plot_evaluations(rows: Sequence[Regret], ours: str, path: Path) -> Path:
    """Draw every method's evaluations against its regret on held-out texts, in all models and in each."""
    held_out = _shown(rows, ours)
    models = _models(held_out)
    across = min(2, len(models))
    down = math.ceil(len(models) / across)
    with _figure(path, max(8.0, 5.2 * across), 5.0 * down + 0.4) as figure:
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for axes, model in zip(panels, models, strict=False):
            _scatter(axes, [row for row in held_out if row.model == model], ours)
            axes.set_title(_title(model), fontsize=9, loc="left")
        for axes in panels[len(models) :]:
            axes.set_visible(False)
        _legend(figure, ours)
    return path


def _scatter(axes: Any, rows: Sequence[Regret], ours: str) -> None:
    points = [(row.evaluations or 0.0, math.expm1(row.median_nats or 0.0), row.method) for row in rows]
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_yscale("symlog", linthresh=_NO_REGRET, linscale=0.3)
    for spent, lost, method in points:
        marker, size = ("*", 110) if method == ours else ("o", 28)
        axes.scatter(spent, lost, color=_colour(method, ours), s=size, marker=marker, zorder=3, linewidth=0)
    axes.set_xlim(-0.5, 12 * max(spent for spent, _, _ in points) + 1)
    axes.set_ylim(-_NO_REGRET / 3, 2 * max(lost for _, lost, _ in points) + _NO_REGRET)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:,g} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("evaluations, for all averages together")
    axes.set_ylabel("perplexity above the best known")
    axes.grid(**_GRID)
    _plain(axes)
    _name_points(axes, points, ours)


def _name_points(axes: Any, points: Sequence[tuple[float, float, str]], ours: str) -> None:
    """Write the names right of the points, those of one neighbourhood above each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = [(*to_axes.transform((spent, lost)), method) for spent, lost, method in points]
    columns: list[list[tuple[float, float, str]]] = []
    for one in sorted(placed):
        if columns and one[0] - columns[-1][0][0] < 0.2:
            columns[-1].append(one)
        else:
            columns.append([one])
    for column in columns:
        ranked = sorted(column, key=lambda point: point[1])
        right = max(x for x, _, _ in column)
        for y, (x, at, method) in zip(spread([point[1] for point in ranked], 0.045), ranked, strict=True):
            arrow = {"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            axes.annotate(method, (x, at), xytext=(right + 0.03, y), xycoords="axes fraction", va="center",
                          textcoords="axes fraction", fontsize=7, color=_colour(method, ours),
                          arrowprops=arrow)  # fmt: skip


# Transfer between backends.


def plot_transfer(rows: Sequence[Transfer], path: Path) -> Path:
    """Draw a heat map of rank correlations between backends, per model and players, and per score."""
    boards = sorted({(row.model, row.players) for row in rows if row.backend != row.other})
    scores = list(dict.fromkeys(row.score for row in rows))
    with _figure(path, 3.5 * max(1, len(scores)) + 0.9, 3.2 * max(1, len(boards)) + 0.5) as figure:
        if not boards:
            figure.text(0.5, 0.5, "No two backends played with the same players.", ha="center")
            return path
        panels = figure.subplots(len(boards), len(scores), squeeze=False)
        for line, (model, players) in zip(panels, boards, strict=True):
            for axes, score in zip(line, scores, strict=True):
                here = [row for row in rows if (row.model, row.players, row.score) == (model, players, score)]
                image = _heat_map(axes, here)
                axes.set_title(f"{model}, {players}: {score}", fontsize=8.5)
        bar = figure.colorbar(image, ax=panels, shrink=min(1.0, 1.6 / len(boards)), aspect=30)
        bar.set_label("Spearman's rank correlation: median, (lowest–highest)")
    return path


def _heat_map(axes: Any, rows: Sequence[Transfer]) -> Any:
    backends = sorted({row.backend for row in rows} | {row.other for row in rows})
    values = np.full((len(backends), len(backends)), np.nan)
    image_of = axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
    for row in rows:
        for at in {(row.backend, row.other), (row.other, row.backend)}:
            y, x = (backends.index(name) for name in at)
            values[y, x] = np.nan if row.median is None else row.median
            told = "–" if row.median is None else f"{row.median:.2f}\n({row.lowest:.2f}–{row.highest:.2f})"
            dark = row.median is not None and row.median < 0.6
            axes.text(x, y, told, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    image_of.set_data(values)
    axes.set_xticks(range(len(backends)), backends, fontsize=8)
    axes.set_yticks(range(len(backends)), backends, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image_of
