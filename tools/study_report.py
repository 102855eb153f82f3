"""Tables and plots of the study whether interaction-aware allocation pays.

    python tools/study_report.py CELLS_DIR --method OURS [--table wins] [--json] [--out docs/study]

CELLS_DIR holds the study's cells, a `.json.bz2` each. The tables go to stdout, as Markdown or, with `--json`, as one
JSON object with every number; `--table` picks one. With `--out` the plots of those tables are written there as SVG,
which needs matplotlib. What was not measured shows as a gap, in tables and plots alike.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from impq_edge.errors import ImpqError, RecordError
from impq_edge.study import markdown, tables
from impq_edge.study.cells import Cell, load_cells
from impq_edge.study.contests import contests_of, games_of, methods_of
from impq_edge.study.finer import finer
from impq_edge.study.regret import Regret, regret
from impq_edge.study.tables import Quality
from impq_edge.study.transfer import LENT, Transfer, lent_allocations, transfer

OURS = "ours"


class Study:
    """The cells, and what is made from them once."""

    def __init__(self, cells: Sequence[Cell], ours: str) -> None:
        self.cells, self.ours = cells, ours

    @functools.cached_property
    def quality(self) -> tuple[Quality, ...]:
        """Every game, text, average and method."""
        return tables.perplexity_table(self.cells, self.ours)

    @functools.cached_property
    def regrets(self) -> tuple[Regret, ...]:
        """Every method's regret."""
        return regret(self.cells)

    @functools.cached_property
    def ranks(self) -> tuple[Transfer, ...]:
        """Rank correlations between backends."""
        return transfer(self.cells)


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: its title, its records, how they are laid out, and its plots."""

    title: str
    records: Callable[[Study], Sequence[Any]]
    laid_out: Callable[[Study, Sequence[Any]], str]
    plots: Callable[[Study, Path], list[Path]] | None = None


def _perplexity_plots(study: Study, out: Path) -> list[Path]:
    import study_plots

    return study_plots.plot_perplexity(study.cells, study.quality, study.ours, out)


def _regret_plots(study: Study, out: Path) -> list[Path]:
    import study_plots

    return [
        study_plots.plot_regret(study.regrets, study.ours, out / "regret.svg"),
        study_plots.plot_evaluations(study.regrets, study.ours, out / "evaluations.svg"),
    ]


def _transfer_plots(study: Study, out: Path) -> list[Path]:
    import study_plots

    return [study_plots.plot_transfer(study.ranks, out / "transfer.svg")]


def _transfers(study: Study) -> list[Any]:
    return [*study.ranks, *lent_allocations(study.cells, LENT)]


def _laid_out_transfers(_: Study, rows: Sequence[Any]) -> str:
    ranks = [row for row in rows if isinstance(row, Transfer)]
    return markdown.transfers(ranks, [row for row in rows if not isinstance(row, Transfer)])


TABLES = {
    "aims": Table(
        "The aims", lambda s: tables.aims(s.cells, s.ours), lambda _, rows: markdown.aims(rows)
    ),
    "wins": Table(
        "Against every other method", lambda s: tables.wins(s.cells, s.ours), lambda _, rows: markdown.wins(rows)
    ),
    "regret": Table(
        "Evaluations and regret", lambda s: s.regrets, lambda _, rows: markdown.regrets(rows), _regret_plots
    ),
    "interactions": Table(
        "Do the off-diagonals pay?", lambda s: tables.interactions(s.cells), lambda _, rows: markdown.interactions(rows)
    ),
    "transfer": Table("Between backends", _transfers, _laid_out_transfers, _transfer_plots),
    "player-size": Table(
        "Kinds of players", lambda s: tables.player_size(s.cells, s.ours), lambda _, rows: markdown.player_sizes(rows)
    ),
    "finer": Table(
        "Finer players against blocks",
        lambda s: finer(contests_of(s.cells), s.ours),
        lambda _, rows: markdown.finer(rows),
    ),
    "perplexity": Table(
        "Perplexity", lambda s: s.quality, lambda _, rows: markdown.perplexities(rows), _perplexity_plots
    ),
    "divergence": Table("KL divergence", lambda s: s.quality, lambda _, rows: markdown.divergences(rows)),
    "paired": Table(
        "Perplexity against ours", lambda s: s.quality, lambda s, rows: markdown.differences(rows, s.ours)
    ),
}  # fmt: skip


def main() -> None:
    """Parse the options, print the tables, write the plots."""
    options = _options()
    try:
        study = open_study(options.cells, options.method)
        names = [options.table] if options.table else [*TABLES]
        print(_json(study, names) if options.json else report(study, names), end="")
        if options.out:
            write_plots(study, names, options.out)
    except ImpqError as error:
        sys.exit(f"study_report: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS_DIR", help="The study's cells.")
    parser.add_argument("--method", default=OURS, metavar="OURS", help="The method that is compared with the others.")
    parser.add_argument("--table", choices=[*TABLES], help="One table; all by default.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object, with every number.")
    parser.add_argument("--out", type=Path, help="Where the plots go; none are drawn without.")
    return parser.parse_args()


def open_study(folder: Path, ours: str) -> Study:
    """Read the cells.

    Raises
    ------
    RecordError
        When there are none, or none has an answer of ``ours``.
    """
    cells = load_cells(folder)
    methods = methods_of(contests_of(cells))
    if ours not in methods:
        raise RecordError(f"No cell has an answer of {ours!r}; give one of {', '.join(methods)} with --method.")
    return Study(cells, ours)


def report(study: Study, names: Sequence[str]) -> str:
    """Return tables as Markdown."""
    parts = [
        f"### {TABLES[name].title}\n\n{TABLES[name].laid_out(study, TABLES[name].records(study))}" for name in names
    ]
    return "\n".join([f"{summary(study)}\n", *parts])


def summary(study: Study) -> str:
    """Say in a sentence what the tables are made from, and what spends more than its average."""
    games = games_of(contests_of(study.cells))
    over = [
        f"{answer.method} in {cell.name} at {answer.average_bits:g}"
        for cell in study.cells
        for answer in cell.answers
        if cell.average_bits(answer.coalition) > answer.average_bits + 1e-9
    ]
    answers = sum(len(cell.answers) for cell in study.cells)
    exams = sum(len(cell.exams) for cell in study.cells)
    spent = f"{len(over)} over its average, the first {over[0]}" if over else "none over its average"
    return (
        f"{len(study.cells)} cells of {len(games)} games; {answers:,} answers, {spent}; {exams:,} coalitions examined. "
        f"Ours is {study.ours}."
    )


def _json(study: Study, names: Sequence[str]) -> str:
    told = {name: [dataclasses.asdict(row) for row in TABLES[name].records(study)] for name in names}
    return json.dumps({"method": study.ours, "cells": [cell.name for cell in study.cells], **told}, indent=1) + "\n"


def write_plots(study: Study, names: Sequence[str], out: Path) -> None:
    """Draw the plots of some tables; without matplotlib only say so."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print("matplotlib is not installed: no plots; run this where it is.", file=sys.stderr)
        return
    for name in names:
        for path in plots(study, out) if (plots := TABLES[name].plots) else []:
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
