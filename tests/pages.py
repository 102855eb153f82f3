"""What a page is made of, and what a browser makes of it: helpers of the tests of reports."""

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from impq_edge.data import data_path

VOID = {"meta", "link", "br", "img", "hr", "input"}

HOSTILE = (
    '<script>document.title="ran"</script><img src=x onerror=document.title="ran">"\'&amp;</style></title>\x00\x1b[31m'
)


class Document(HTMLParser):
    """Elements in order, with their attributes, text and ancestors; unclosed elements are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"unclosed: {self._open[-1]['tag']}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "within": [e["tag"] for e in self._open]}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] in tags]

    def rows(self, caption: str) -> list[list[str]]:
        """Return the cells of a table's rows, the head first."""
        start = next(i for i, e in enumerate(self.elements) if e["tag"] == "caption" and e["text"] == caption)
        found: list[list[str]] = []
        for element in _while_inside(self.elements[start:], len(self.elements[start]["within"]) - 1):
            if element["tag"] == "tr":
                found.append([])
            elif element["tag"] in ("td", "th"):
                found[-1].append(element["text"])
        return found


def _while_inside(elements: list[dict[str, Any]], depth: int) -> Iterator[dict[str, Any]]:
    for element in elements:
        if len(element["within"]) <= depth:
            return
        yield element


def require_one_file(text: str, links: tuple[str, ...] = ()) -> None:
    """Refuse a page that loads anything, runs anything, or leads elsewhere than to itself and to ``links``."""
    page = Document(text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None and text.count("<style") == 1
    policy = next(e["attrs"]["content"] for e in page.all("meta") if e["attrs"].get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "mathdefault" not in text, "nothing in a plot is taken for a formula, or shown as the source of one"
    assert not page.all("script", "link", "img", "iframe", "object", "embed", "base", "form", "foreignobject")
    assert "url(" not in style[1] and "@import" not in style[1]
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on") and name != "style", (element["tag"], name)
            assert name not in ("src", "href", "xlink:href") or value.startswith("#") or value in links, value
            assert "://" not in (value or "") and "url(" not in (value or "").replace("url(#", "")


def themes() -> dict[str, dict[str, tuple[float, ...]]]:
    """Theme → name of a colour → its red, green and blue, 0 to 1."""
    light, dark = data_path("report", "page.css").read_text("utf-8").split("@media (prefers-color-scheme: dark)")
    found = {}
    for name, text in (("light", light), ("dark", dark)):
        colours = re.findall(r"--([\w-]+): #([0-9a-f]{6})\b", text)
        assert len(colours) == len(dict(colours))
        found[name] = {role: tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)) for role, code in colours}
    return found


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, which speaks to chromium")
    with api.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


def opened(browser: Any, path: Path, **settings: Any) -> tuple[Any, list[str], list[str]]:
    """Return a page, what it requested, and what the console said."""
    page = browser.new_page(**settings)
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    return page, requests, said


def opened_fitting(browser: Any, path: Path, width: int, scheme: str) -> Any:
    """Return a page with everything unfolded that fits the screen, is in its colours, and loaded and said nothing."""
    page, requests, said = opened(browser, path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert requests == [path.as_uri()] and not said
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == f"rgb{tuple(round(255 * c) for c in themes()[scheme]['paper'])}"
    return page
