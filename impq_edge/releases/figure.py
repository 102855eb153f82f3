"""Plots as SVG that lives inside a page: its colours are the page's, its text is text, and it needs no script.

matplotlib knows no CSS. It paints with stand-ins, one for every role of a colour, and what it wrote is then rewritten:
stand-ins become CSS variables, ``style`` becomes attributes (a page can then forbid inline styles), and every name is
made unique, since the plots of a page share one space of names.
"""

import dataclasses
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE_PX, NARROW_PX = 880, 330
"""Every plot is painted twice, for a desk and for a phone, and CSS shows one of them: scaled text is unreadable."""

ROLES = (
    "paper", "ink", "muted", "rule", "ours", "warm", "cool",
    "bits-2", "bits-3", "bits-4", "bits-5", "bits-6", "bits-8", "bits-16", "on-bits",
    "weights", "cache", "buffers", "process", "reserve", "free", "on-part",
)  # fmt: skip
"""What a colour is for; the page's style sheet defines ``--ROLE`` for light and for dark."""

_STAND_INS = {role: f"#0101{index:02x}" for index, role in enumerate(ROLES, start=1)}
_VARIABLES = {stand_in: f"var(--{role})" for role, stand_in in _STAND_INS.items()}
_PX_PER_INCH = 72  # matplotlib's unit in SVG is the point, and the page takes it for a pixel
_TIP = "tip:"
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_LOCAL = re.compile(r"#(\w+)")
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

Paint = Callable[["Figure", bool], None]
"""Paints a figure; told whether it is the wide one."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One plot in both widths, as SVG elements."""

    wide: str
    narrow: str


def colour(role: str) -> str:
    """Return what to paint with, for one of :data:`ROLES`."""
    return _STAND_INS[role]


def tip(text: str) -> str:
    """Return the ``gid`` that gives an artist a tooltip."""
    return _TIP + text


def draw(name: str, label: str, paint: Paint, *, wide_px: float, narrow_px: float) -> Drawing:
    """Paint a plot in both widths.

    Parameters
    ----------
    name
        Of the plot in its page, made of letters.
    label
        What it shows, for those who cannot see it.
    wide_px, narrow_px
        Heights.
    """
    return Drawing(
        _painted(f"{name}-wide", label, paint, WIDE_PX, wide_px),
        _painted(f"{name}-narrow", label, paint, NARROW_PX, narrow_px),
    )


def canvas(figure: "Figure", wide: bool, height_px: float) -> Any:
    """Return axes over all of a figure, whose units are pixels from the upper left."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDE_PX if wide else NARROW_PX)
    axes.set_ylim(height_px, 0)
    axes.set_axis_off()
    return axes


def words(
    axes: Any, x: float, y: float, text: str, role: str, *, ha: str = "center", va: str = "center_baseline",
    rotation: float = 0.0,
) -> None:  # fmt: skip
    """Write on a canvas."""
    axes.text(x, y, text, color=colour(role), ha=ha, va=va, rotation=rotation)


def box(axes: Any, place: tuple[float, float, float, float], role: str, told: str, alpha: float = 1.0) -> None:
    """Fill a box (left, top, width, height) of a canvas, with a tooltip."""
    from matplotlib.patches import Rectangle

    left, top, width, height = place
    axes.add_patch(
        Rectangle((left, top), width, height, facecolor=colour(role), linewidth=0, alpha=alpha, gid=tip(told))
    )


def _painted(name: str, label: str, paint: Paint, width_px: float, height_px: float) -> str:
    from matplotlib import style
    from matplotlib.figure import Figure

    wide = width_px == WIDE_PX
    with style.context(["default", _settings(12 if wide else 11)]):
        figure = Figure(figsize=(width_px / _PX_PER_INCH, height_px / _PX_PER_INCH), layout="constrained")
        figure.patch.set_visible(False)
        paint(figure, wide)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _rewritten(file.getvalue(), name, label)


def _settings(font_px: int) -> dict[str, Any]:
    ink, muted, rule = map(colour, ("ink", "muted", "rule"))
    return {
        "svg.fonttype": "none", "svg.hashsalt": "impq-edge", "text.parse_math": False,
        "font.size": font_px, "font.sans-serif": ["DejaVu Sans"], "text.color": ink,
        "axes.facecolor": "none", "axes.edgecolor": muted, "axes.labelcolor": ink, "axes.titlecolor": ink,
        "axes.titlesize": font_px, "axes.titlelocation": "left", "axes.labelsize": font_px,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": rule, "grid.linewidth": 1,
        "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "xtick.labelsize": font_px - 1, "ytick.labelsize": font_px - 1,
        "legend.frameon": False, "legend.fontsize": font_px, "lines.linewidth": 1.5, "lines.markersize": 6,
    }  # fmt: skip


def _rewritten(svg: str, name: str, label: str) -> str:
    """Return a plot as an element of a page; ``svg`` is matplotlib's own, so that parsing it is safe."""
    root = ElementTree.fromstring(svg)
    used = {found for element in root.iter() for value in element.attrib.values() for found in _LOCAL.findall(value)}
    for element in root.iter():
        for child in [c for c in element if c.tag in (f"{_SVG}style", f"{_SVG}metadata")]:
            element.remove(child)
        _rewrite(element, name, used)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "class": name.rpartition("-")[2], "data-name": name}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
    return _without_empty_groups(ElementTree.tostring(root, encoding="unicode"))


def _rewrite(element: ElementTree.Element, name: str, used: set[str]) -> None:
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "id" and value.startswith(_TIP):
            title = ElementTree.Element(f"{_SVG}title")
            title.text = value.removeprefix(_TIP)
            element.insert(0, title)
        elif key == "id":
            if value in used:
                element.set("id", f"{name}-{value}")
        elif key == "style":
            for declaration in filter(None, map(str.strip, value.split(";"))):
                _set_style(element, *map(str.strip, declaration.split(":", 1)))
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            kept = value if key in ("class", "role") else _LOCAL.sub(rf"#{name}-\1", value)
            element.set(key.removeprefix(_XLINK), _NUMBER.sub(_rounded, kept.replace("\n", "")))
    for text in ("text", "tail"):
        if not (getattr(element, text) or "").strip():
            setattr(element, text, None)


def _set_style(element: ElementTree.Element, key: str, value: str) -> None:
    """Turn a declaration into an attribute; the font is the page's."""
    if key == "font":  # as older versions write it: "700 11px 'DejaVu Sans', sans-serif"
        weight, _, size = value.partition("px")[0].rpartition(" ")
        element.set("font-size", f"{size}px")
        if weight:
            element.set("font-weight", weight)
    elif key != "font-family":
        element.set(key, _VARIABLES.get(value, _NUMBER.sub(_rounded, value)))


def _rounded(found: re.Match[str]) -> str:
    """To a hundredth of a pixel: half the size, and no difference that can be seen."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _without_empty_groups(svg: str) -> str:
    before = ""
    while before != svg:
        before, svg = svg, re.sub(r"<(g|defs) ?/>|<g></g>", "", svg)
    return svg
