"""What people see: tables on stdout, everything else on stderr. The only file that knows rich."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(sentence: str) -> None:
    """Tell the person something that is not the result."""
    _err.print(escape(sentence))


def fail(sentence: str) -> None:
    """Tell the person why the command stopped."""
    _err.print(f"[red]Error:[/red] {escape(sentence)}")


def show_json(value: Any) -> None:
    """Print one JSON object, the command's result."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose cells are all numbers are set flush right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = all(_looks_numeric(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")  # names stay whole
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _out.print(table)


def show_line(line: str) -> None:
    """Print one line of the result."""
    _out.print(escape(line))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (phase, done, total) that draws one bar per phase with the time left."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    # Bound to the stream of this moment: a library's output may be kept away from sys.stderr for a while.
    screen = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)
            if done >= total:  # the next use of the name is a new phase
                bars.remove_task(tasks.pop(phase))

        try:
            yield advance
        except KeyboardInterrupt:
            say("Interrupted; finished work is kept, run the same command again to go on.")
            raise


def _looks_numeric(cell: str) -> bool:
    return bool(cell) and (cell[0] in "+-0123456789" or cell in {"–", ""}) and len(cell.split()) <= 3
