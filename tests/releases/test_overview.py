"""The reports of a release: one of every file on every device, and the page over all of them."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from pages import HOSTILE, Document, opened, opened_fitting, require_one_file

from impq_edge.releases.manifest import Manifest
from impq_edge.releases.order import Gates, Order, OrderedDevice, OrderedModel
from impq_edge.releases.overview import render_overview
from impq_edge.releases.release import release
from impq_edge.releases.verify import verify

pytest.importorskip("matplotlib", reason="the reports' plots need matplotlib")


@pytest.fixture(scope="module")
def base(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    shutil.copytree(checkpoints["qwen3"], folder / "qwen3")
    return folder


ORDER = Order(
    "small", (OrderedModel("qwen3"),),
    (OrderedDevice("raspberry-pi-5", average_bits="3"),
     OrderedDevice("laptop-16gb", gates=Gates(max_kl_divergence=1e-9))),
    contexts=(256,), encode="rtn", windows=2, game={"method": "impq", "permutations": 2, "tokens": 512},
    gates=Gates(max_memory=2**32),
)  # fmt: skip


@pytest.fixture(scope="module")
def released(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    out = tmp_path_factory.mktemp("release") / "small"
    return release(ORDER, out=out, base=base), out


@pytest.fixture(scope="module")
def text(released: tuple[Manifest, Path]) -> str:
    return (released[1] / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def two_models(released: tuple[Manifest, Path]) -> Manifest:
    """The release, and the same files again as those of another model."""
    made, _ = released
    other = dataclasses.replace(made.models[0], name="other")
    files = (*made.files, *(dataclasses.replace(file, model="other") for file in made.files))
    return dataclasses.replace(made, models=(*made.models, other), files=files)


def test_every_file_on_every_device_has_its_reports(released: tuple[Manifest, Path]) -> None:
    made, out = released
    listed = {output.path for output in made.outputs}
    card = (out / "README.md").read_text()
    takers = [(file, taker) for file in made.files for taker in file.takers]
    assert len(takers) == 2 and verify(out).passed
    for file, taker in takers:
        for name in ("report.md", "report.html"):
            path = f"{taker.records}/{name}"
            assert path in listed and f"]({path})" in card
        told = (out / taker.records / "report.md").read_text()
        assert told.startswith(f"# {file.model} for {taker.title}\n") and file.file in told and made.command in told
        assert ("all gates passed" in told) == taker.passed
        page = Document((out / taker.records / "report.html").read_text())
        rows = {row[0]: row for row in page.rows("The files")}
        assert rows["this file"][1] == f"{file.file_bytes:,}"
        assert rows["this file"][5] == f"{taker.measured.kl_divergence:.4f} ± {taker.measured.kl_divergence_stderr:.4f}"
        for what, name in (("F16", "the unquantised model in F16"), ("2 bit", "all blocks at 2 bit")):
            model = next(model for model in made.models if model.name == file.model)
            other = next(other for other in model.compared if other.what == what)
            assert rows[name][1] == f"{other.file_bytes:,}" and rows[name][3].startswith(f"{other.perplexity:.3f}")
        gates = page.rows("What every file for this device must keep")[1:]
        assert [row[0] for row in gates] == [gate.name for gate in taker.gates]
        require_one_file((out / taker.records / "report.html").read_text(), ("../../../report.html",))


def test_the_page_leads_to_every_report_and_file(released: tuple[Manifest, Path], text: str) -> None:
    made, out = released
    page = Document(text)
    links = [unquote(e["attrs"]["href"]) for e in page.all("a")]
    outside = [link for link in links if not link.startswith("#")]
    for file in made.files:
        for taker in file.takers:
            assert outside.count(f"{taker.records}/report.html") == 1 and file.file in outside
    assert all((out / link).is_file() for link in outside)
    for taker in (taker for file in made.files for taker in file.takers):
        back = Document((out / taker.records / "report.html").read_text()).all("nav")[0]
        assert "The whole release" in back["text"]
        assert (out / taker.records / "../../../report.html").resolve() == (out / "report.html").resolve()
    require_one_file(text, tuple(outside))


def test_the_numbers_are_those_of_the_manifest(released: tuple[Manifest, Path], text: str) -> None:
    made, _ = released
    page = Document(text)
    rows = page.rows("What every device takes, each with its own report")[1:]
    first = made.models[0].name
    takers = [(file, taker) for file in made.files for taker in file.takers if file.model == first]
    for row, (file, taker) in zip(rows, takers, strict=True):
        assert taker.title in row[0] and f"{taker.context_tokens} tokens" in row[0]
        assert file.file in row[1] and row[2] == f"{file.file_bytes / 2**20:,.1f}"
        assert row[4] == f"×{taker.measured.perplexity_ratio_to_f16:.4f}"
        assert row[5].startswith(f"{taker.measured.kl_divergence:.4f} ") and "predicted" in row[6]
        assert row[7] == ("✓\N{NO-BREAK SPACE}passed" if taker.passed else "✗\N{NO-BREAK SPACE}max_kl_divergence")
    assert "1 gate failed" in text and len(page.rows("What failed")) == 2
    assert render_overview(made) == text, "the same manifest gives the same bytes"


def test_nothing_in_a_manifest_becomes_markup(released: tuple[Manifest, Path]) -> None:
    made, _ = released
    file = made.files[0]
    taker = dataclasses.replace(file.takers[0], title=HOSTILE, device=HOSTILE)
    bad = dataclasses.replace(
        made,
        name=HOSTILE,
        machine=HOSTILE,
        models=tuple(dataclasses.replace(m, name=HOSTILE, license=HOSTILE) for m in made.models[:1]),
        files=(dataclasses.replace(file, model=HOSTILE, takers=(taker,)),),
        passed=taker.passed,
    )
    text = render_overview(bad)
    page = Document(text)
    assert not page.all("script", "img") and "document.title" in page.all("h1")[0]["text"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_headings_names_and_tables(two_models: Manifest) -> None:
    page = Document(render_overview(two_models))
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    assert {e["attrs"]["aria-labelledby"] for e in page.all("section")} <= set(ids)
    assert all("scope" in e["attrs"] for e in page.all("th")) and all(
        e["attrs"]["aria-label"] for e in page.all("meter")
    )
    plots = page.all("svg")
    assert len(plots) == 2 * len(two_models.models) == 4 and all(len(e["attrs"]["aria-label"]) > 20 for e in plots)
    # A table shown as cards on a phone stays a table to a screen reader.
    cells = [e for e in page.elements if "table" in e["within"] and e["tag"] in ("tr", "th", "td")]
    in_cards = [e for e in cells if e["attrs"].get("role")]
    assert {e["attrs"]["role"] for e in in_cards} == {"row", "columnheader", "rowheader", "cell"}


def test_without_matplotlib_the_pages_are_left_out_once_said(
    released: tuple[Manifest, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, told = Path(shutil.copytree(released[1], tmp_path / "copy")), list[str]()
    made = release(ORDER, out=out, base=base, say=told.append)
    assert not list(out.rglob("*.html")) and len(list(out.rglob("report.md"))) == 2 and verify(out).passed
    assert not any(PurePosixPath(output.path).suffix == ".html" for output in made.outputs)
    assert sum("impq-edge[report]" in sentence for sentence in told) == 1
    assert "report.html" not in (out / "README.md").read_text()


# What a browser makes of it.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_it_fits_the_screen_and_loads_nothing(
    released: tuple[Manifest, Path],
    browser: Any,
    width: int,
    scheme: str,
) -> None:
    path = released[1] / "report.html"
    page = opened_fitting(browser, path, width, scheme)
    cut = page.evaluate(
        "[...document.querySelectorAll('.cells tbody td, .cells tbody th')].filter(e => e.offsetParent && "
        "e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert not cut, "cells whose words are cut off"
    if width == 360:  # cards need no scrolling sideways
        box = "document.querySelector('.cells').parentElement"
        assert page.evaluate(f"{box}.scrollWidth <= {box}.clientWidth + 1")
    page.close()


def test_a_click_leads_to_the_report_and_back(released: tuple[Manifest, Path], browser: Any) -> None:
    page, *_ = opened(browser, released[1] / "report.html", viewport={"width": 360, "height": 800})
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "report"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.cells th') !== null"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url("**/records/**/report.html")
    page.get_by_role("link", name="The whole release").click()
    page.wait_for_url("**/small/report.html")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(
    released: tuple[Manifest, Path], two_models: Manifest, browser: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    (tmp_path / "two.html").write_text(render_overview(two_models), "utf-8")
    reports = [tmp_path / "two.html", released[1] / released[0].files[0].takers[0].records / "report.html"]
    for path in reports:
        page, *_ = opened(browser, path, color_scheme=scheme, bypass_csp=True, viewport={"width": width, "height": 800})
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = axe.Axe().run(page)
        assert not found.response["violations"], found.generate_report()
        page.close()
