"""What people see: tables on stdout, everything else on stderr. The only file that knows rich."""

import codecs
import contextlib
import dataclasses
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_SIGNS = ("╱▪▒░█▓▚", "·", "│")  # of parts, of what is left, of the limit
_PLAIN_SIGNS = ("/o=-#%&", ".", "|")
_COLOURS = ("yellow", "magenta", "cyan", "blue", "green", "red", "white")
_PLAIN_LETTERS = {"–": "-", "−": "-", "…": "...", "±": "+-", "×": "x", "·": ".", "│": "|", "─": "-", "φ": "phi"}
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the order of letters
_MIN_BAR, _MAX_BAR = 16, 64  # cells

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_anything() -> None:
    """Write letters that the streams' encoding lacks as the nearest plain ones, instead of failing at them."""
    codecs.register_error("plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN_LETTERS.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def _harmless(text: str) -> str:
    """Return text as rich prints it, whatever is in it: names and messages may come from anybody's files."""
    return escape(_visible(text))


def _visible(text: str) -> str:
    """Write what a terminal would act on as it is written in Python."""
    return "".join(ascii(char)[1:-1] if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char) in {"Cc", "Cs"} or char in _TURNING)


def say(sentence: str) -> None:
    """Tell the person something that is not the result."""
    _err.print(_harmless(sentence))


def fail(sentence: str) -> None:
    """Tell the person why the command stopped."""
    _err.print(f"[red]Error:[/red] {_harmless(sentence)}")


def give_up_output() -> None:
    """Write no more to stdout, not even what is left of it when the interpreter ends: nobody could take it."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def show_json(value: Any) -> None:
    """Print one JSON object, the command's result."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def width() -> int:
    """Return how many characters a line of the result may have."""
    return _out.width


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], sections: Collection[int] = ()
) -> None:
    """Print a table; columns whose cells are all numbers are set flush right, a rule follows the rows ``sections``."""
    table = Table(title=_harmless(title), title_justify="left")
    for index, column in enumerate(columns):
        numeric = all(_looks_numeric(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")  # names stay whole
    for index, row in enumerate(rows):
        table.add_row(*(_harmless(cell) for cell in row), end_section=index in sections)
    _out.print(table)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of a picture of stacked bars."""

    name: str
    parts: Mapping[str, float]  # by name, from the left; the same names in every bar
    note: str  # behind the bar


@dataclasses.dataclass(frozen=True)
class Limit:
    """What the parts of a bar are to stay below."""

    size: float
    note: str  # above its mark, such as "8 GiB"
    name: str  # what the mark means
    left_name: str  # what the rest up to it means


def show_bars(title: str, bars: Sequence[Bar], limit: Limit) -> None:
    """Print stacked bars over one scale with the limit marked, and what their signs mean.

    Every part has its own sign, so that nothing depends on colour; letters where the encoding lacks blocks.
    """
    signs, left, mark = _SIGNS if _can_print(_SIGNS) else _PLAIN_SIGNS
    kinds = {name: (signs[i % len(signs)], _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(bars[0].parts)}
    label, behind = max(len(bar.name) for bar in bars), max(len(bar.note) for bar in bars)
    cells = max(_MIN_BAR, min(_MAX_BAR, _out.width - label - behind - 4))
    scale = cells / max(limit.size, *(sum(bar.parts.values()) for bar in bars))
    at = round(limit.size * scale)
    _out.print(Text(_visible(title), style="italic"))
    _out.print(" " * max(0, label + at + 3 - len(limit.note)) + limit.note)
    for bar in bars:
        drawn = _drawn(bar.parts, kinds, scale)
        drawn += [(left, "dim")] * (at - len(drawn))
        drawn.insert(at, (mark, "bold"))
        line = Text(f" {bar.name:<{label}} ")
        for sign, colour in drawn:
            line.append(sign, style=colour)
        _out.print(line.append(" " * (cells + 1 - len(drawn))).append(f" {bar.note:>{behind}}"))
    meanings = [
        Text(sign, style=colour).append(f" {name}", style="default")
        for name, (sign, colour) in kinds.items()
        if any(bar.parts[name] for bar in bars)
    ]
    meanings += [Text(left, style="dim").append(f" {limit.left_name}"), Text(f"{mark} {limit.name}")]
    for row in _rows_of(meanings, _out.width):
        _out.print(row)


def _drawn(parts: Mapping[str, float], kinds: Mapping[str, tuple[str, str]], scale: float) -> list[tuple[str, str]]:
    """Return a sign and a colour for every cell of a bar; ends are rounded where they lie, so that sums stay right."""
    cells: list[tuple[str, str]] = []
    end = 0.0
    for name, size in parts.items():
        end += size
        cells += [kinds[name]] * (round(end * scale) - len(cells))
    return cells


def _rows_of(pieces: Sequence[Text], width: int) -> list[Text]:
    """Set pieces side by side as far as lines go."""
    rows: list[Text] = []
    for piece in pieces:
        if rows and len(rows[-1]) + 2 + len(piece) <= width:
            rows[-1].append("  ").append_text(piece)
        else:
            rows.append(Text(" ").append_text(piece))
    return rows


def _can_print(signs: tuple[str, str, str]) -> bool:
    try:
        "".join(signs).encode(_out.encoding)
    except UnicodeEncodeError:
        return False
    return True


def show_line(line: str) -> None:
    """Print one line of the result."""
    _out.print(_harmless(line))


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
