"""Pages of one file each: they load nothing, run no script, and hold nothing of an input but text."""

import base64
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from impq_edge.data import data_path
from impq_edge.records import atomic_path
from impq_edge.releases.telling import Say

_LEFT_OUT = (
    "report.html was left out, since its plots need matplotlib: pip install 'impq-edge[report]', and run the same "
    "command again."
)


def write_drawn(path: Path, render: Callable[[], str], say: Say) -> bool:
    """Write a page with plots; where what they need is not installed, say how to get it, and leave no older page.

    Returns
    -------
    bool
        Whether it was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        path.unlink(missing_ok=True)
        say(_LEFT_OUT)
        return False
    write_markup(path, render())
    return True


def rendered(template: str, facts: dict[str, Any]) -> str:
    """Return a page; the same facts give the same bytes."""
    style = data_path("report", "page.css").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_path("report")), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=printable, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["drawn"] = Markup  # for what this package made, and for nothing else
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(**facts, style=style, style_sha256=digest)


def write_markup(path: Path, page: str) -> None:
    """Write a page, unless it is there already."""
    if path.exists() and path.read_bytes() == page.encode():
        return
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def printable(value: object) -> object:
    """Replace what no page may hold: control characters, and halves of surrogate pairs."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(x if x in "\n\t" or (x >= " " and not "\x7f" <= x < "\xa0" and not "\ud800" <= x <= "\udfff")
                   else "\N{REPLACEMENT CHARACTER}" for x in value)  # fmt: skip
