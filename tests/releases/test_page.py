"""The page that people look at: what it tells, what it must not do, and what a browser makes of it."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, Document, opened, opened_fitting, require_one_file, themes

import impq_edge
from impq_edge import stages
from impq_edge.releases import facts, figure
from impq_edge.releases.build import Build
from impq_edge.releases.comparison import Comparison, Scored, all_at
from impq_edge.releases.lent import BackendLosses
from impq_edge.releases.page import render_page, write_page
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.stages.planning import plan

pytest.importorskip("matplotlib", reason="the page's plots need matplotlib")

GAME = GameOptions(
    method="impq", permutations=2, tokens=512, players="sublayers", backend_settings={"encode": "rtn"}, compute="cpu"
)
DEVICE, CONTEXT = "laptop-16gb", 256
COMMAND = "impq-edge build --device laptop-16gb -o out"


@pytest.fixture(scope="module")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    out = tmp_path_factory.mktemp("page")
    return impq_edge.build(
        DEVICE, model=str(checkpoints["qwen3"]), out=out, game=GAME, windows=2, context_tokens=CONTEXT, average_bits=3,
        command=COMMAND,
    )  # fmt: skip


@pytest.fixture(scope="module")
def game(built: Build) -> Comparison:
    mix = (built.artifact, built.validation)
    files = {"this file": Scored.of(*mix)} | {all_at(bits): Scored.of(*both) for bits, both in built.uniform.items()}
    return Comparison(built.device, built.profile, built.allocation, mix, files, built.plan)


@pytest.fixture(scope="module")
def ladder(game: Comparison, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Every matrix at every width, and the files of the game beside it."""
    options = dataclasses.replace(GAME, players="tensors", types=(2, 3, 4, 8), permutations=0)
    path = tmp_path_factory.mktemp("ladder") / "ladder.json"
    found = stages.ladder(str(checkpoints["qwen3"]), out=path, game=options)
    allocation = stages.allocate(
        found, device=DEVICE, context_tokens=CONTEXT, budget_bytes=4_000_000, types=options.types
    )
    return dataclasses.replace(game, profile=found, allocation=allocation)


@pytest.fixture(scope="module")
def rounds(game: Comparison, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The best that was measured, where nothing is proven."""
    options = dataclasses.replace(GAME, method="rounds", permutations=6)
    path = tmp_path_factory.mktemp("rounds") / "profile.json"
    request = stages.allocation_request(
        DEVICE, context_tokens=CONTEXT, kv_type=None, budget_bytes=None, average_bits=3, alpha=None, outer_type="q6_k"
    )
    found = stages.profile(str(checkpoints["qwen3"]), out=path, game=options, request=request)
    allocation = stages.allocate(found, device=DEVICE, context_tokens=CONTEXT, average_bits=3, method="rounds")
    return dataclasses.replace(game, profile=found, allocation=allocation)


@pytest.fixture(scope="module", params=["game", "ladder", "rounds"])
def told(request: pytest.FixtureRequest) -> Comparison:
    found: Comparison = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def text(told: Comparison) -> str:
    return render_page(told, COMMAND)


@pytest.fixture(scope="module")
def page(text: str) -> "Document":
    return Document(text)


@pytest.fixture(scope="module")
def file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "report.html"
    path.write_text(text, "utf-8")
    return path


# What it tells.


def test_a_build_leaves_the_page_beside_the_report(built: Build, game: Comparison) -> None:
    page = (built.directory / "report.html").read_text("utf-8")
    assert page == render_page(game, COMMAND)
    assert not list(built.directory.glob(".*"))


def test_the_same_records_give_the_same_bytes(told: Comparison, text: str) -> None:
    assert render_page(told, COMMAND) == text


def test_the_numbers_are_those_of_the_records(told: Comparison, page: Document) -> None:
    artifact, report = told.mix
    files = {row[0]: row[1:] for row in page.rows("The files")}
    assert files["this file"][0] == f"{artifact.file_bytes:,}"
    assert files["all blocks at 2 bit"][2].startswith(f"{told.files[all_at(2)].perplexity:.3f} ")
    bits = {row[0]: row[1] for row in page.rows("Bits of every player")[1:]}
    given = zip(facts.players(told), told.allocation.player_bits, strict=True)
    assert [bits[player.name] for player, _ in given] == [str(each) for each in told.allocation.player_bits]
    both = page.rows("What was predicted before the file existed, and what was measured of it")
    assert f"{report.peak_rss_bytes / 2**20:,.1f} MiB" in {cell for row in both for cell in row}
    assert any(COMMAND in element["text"] for element in page.all("code"))


def test_the_strip_holds_every_players_bits(told: Comparison, page: Document) -> None:
    tips = [element["text"] for element in page.all("title")]
    for player, bits in zip(facts.players(told), told.allocation.player_bits, strict=True):
        if player.block is not None:
            assert tips.count(f"{player.name}: {bits} bit") == 2, "once for a desk, and once for a phone"


def test_sensitivities_have_errors(told: Comparison, page: Document) -> None:
    if isinstance(told.profile, LadderProfile):
        table = page.rows("KL divergence at every width, 10⁻³ nats per token")
        assert table[0][2:] == ["at 2 bit", "at 3 bit", "at 4 bit", "at 8 bit"]
        found = 1e3 * told.profile.divergences()
        assert np.array([[float(x) for x in row[2:]] for row in table[1:]]) == pytest.approx(found, abs=1e-4)
    else:
        what = "loss" if told.profile.settings.objective == "loss" else "KL divergence from the unquantised model"
        rows = page.rows(f"Shapley values of the increase of the {what}")[1:]
        estimate = told.profile.estimate()
        assert [float(row[2]) for row in rows] == pytest.approx(estimate.phi, abs=1e-5)
        assert [float(row[3]) for row in rows] == pytest.approx(estimate.phi_stderr, abs=1e-5)


def test_stock_mixes_have_the_size_that_planning_tells_and_no_quality(
    told: Comparison, page: Document, checkpoints: dict[str, Path]
) -> None:
    files = {row[0]: row[1:] for row in page.rows("The files")}
    planned = plan(str(checkpoints["qwen3"]), DEVICE, context_tokens=CONTEXT)
    sizes = {v.name: v.file_bytes - planned.header_bytes + told.allocation.header_bytes for v in planned.variants}
    for name in ("Q2_K", "Q3_K_M", "Q4_K_M"):
        assert files[f"stock {name}"] == [f"{sizes[name]:,}", files[f"stock {name}"][1], "not measured", "–", "–", "–"]


def test_groups_of_memory_are_all_of_it(game: Comparison) -> None:
    for layers in (0, 2):
        for apart in (None, 2**33):
            made = dataclasses.replace(
                game.plan, gpu_layers=layers, gpu_memory_bytes=apart, gpu_compute_bytes=7, gpu_reserve_bytes=11
            )
            assert sum(facts.memory_groups(made).values()) == made.total_bytes


def test_everything_that_was_measured_is_shown(rounds: Comparison) -> None:
    found = facts.coalitions(rounds, rounds.profile)  # type: ignore[arg-type]
    assert len(found) == len(rounds.profile.evaluations)  # type: ignore[union-attr]
    assert rounds.allocation.evidence is not None
    chosen = [each for each in found if each.is_chosen]
    best = min(each.increase for each in found if each.fits)
    assert [each.increase for each in chosen] == [best] == [pytest.approx(rounds.allocation.evidence.increase)]
    rows = Document(render_page(rounds, COMMAND)).rows("The least harmful coalitions among those that fit")
    assert rows[1][0] == "".join(map(str, rounds.allocation.player_bits))


def test_many_players_are_joined_into_their_blocks(game: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = facts.covariances(game)
    monkeypatch.setattr(facts, "_SHOWN_PAIRS", 5)
    joined = facts.covariances(game)
    assert alone is not None and joined is not None and joined.are_blocks and joined.names == ("0", "1", "2")
    for i in range(3):
        for j in range(3):
            parts = alone.covariance[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert joined.covariance[i, j] == pytest.approx(parts.sum())


def test_a_perplexity_that_is_not_finite_is_told(game: Comparison) -> None:
    broken = dataclasses.replace(game.at_4_bit, perplexity=None, perplexity_stderr=None)
    page = render_page(dataclasses.replace(game, files={**game.files, all_at(4): broken}), COMMAND)
    assert "not finite" in page and 'data-name="quality-wide"' not in page


def test_losses_of_another_backend_have_a_section(game: Comparison) -> None:
    bits = "".join(map(str, game.allocation.player_bits))
    coalitions = (bits, "4" * len(bits), "2" * len(bits), bits)
    losses = BackendLosses("a", "p", coalitions, (1.5, 1.0, 2.0, 1.5), (1.6, 1.1, 2.1, 1.2), 0.4, 0.1, 0.5)
    page = Document(render_page(dataclasses.replace(game, backend_losses=losses), COMMAND))
    assert page.rows("On the calibration text")[1:] == [
        ["this mix", "1.5000", "1.6000"], ["all at 4 bit", "1.0000", "1.1000"], ["all at 2 bit", "2.0000", "2.1000"],
        ["K-quants' own choice", "1.5000", "1.2000"],
    ]  # fmt: skip
    assert "#backend" in {element["attrs"]["href"] for element in page.all("a")}


def test_without_matplotlib_the_page_is_left_out(
    game: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    old, told = tmp_path / "report.html", list[str]()
    old.write_text("of another build")
    write_page(game, COMMAND, old, told.append)
    assert not old.exists(), "a page of other records is not left beside these"
    assert len(told) == 1 and "left out" in told[0] and "impq-edge[report]" in told[0]


# What it must not do.


def test_the_page_is_one_file(text: str) -> None:
    require_one_file(text)


def hostile(c: Comparison) -> Comparison:
    artifact, report = c.mix
    return dataclasses.replace(
        c,
        device=dataclasses.replace(c.device, title=HOSTILE),
        allocation=dataclasses.replace(c.allocation, model_name=HOSTILE),
        mix=(
            dataclasses.replace(artifact, artifact=HOSTILE.replace("/", "").replace("\0", "")),
            dataclasses.replace(
                report, generated_text=HOSTILE, chat_text=None, text=HOSTILE, system_info=HOSTILE,
                checks=(*report.checks, dataclasses.replace(report.checks[0], name=HOSTILE, detail=HOSTILE)),
            ),
        ),
    )  # fmt: skip


def test_nothing_in_a_record_becomes_markup(game: Comparison) -> None:
    text = render_page(hostile(game), HOSTILE + "\udcff")
    text.encode()  # half a surrogate pair, as a file's name may hold on the command line, is no UTF-8
    page, plain = Document(text), Document(render_page(game, COMMAND))
    assert not page.all("script", "img")
    added = ["tr", "th", "td", "td"]  # the check more that the hostile records hold
    assert sorted(e["tag"] for e in page.elements) == sorted([*(e["tag"] for e in plain.elements), *added])
    assert "document.title" in page.all("h1")[0]["text"] and "document.title" in page.all("blockquote")[0]["text"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


# Who can read it.


def test_headings_landmarks_and_names(page: Document) -> None:
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    assert [len(page.all(tag)) for tag in ("main", "nav", "header", "footer")] == [1, 1, 1, 1]
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    links = [e["attrs"]["href"] for e in page.all("a")]
    assert links[0] == "#report" and {link.removeprefix("#") for link in links} <= set(ids)
    assert {e["attrs"]["aria-labelledby"] for e in page.all("section")} <= set(ids)
    for e in page.elements:
        for value in e["attrs"].values():
            assert set(re.findall(r"url\(#([^)]+)\)", value or "")) <= set(ids), "a plot without its clip"


def test_every_plot_has_words_and_a_table(page: Document) -> None:
    plots = [e for e in page.all("svg") if e["attrs"].get("role") == "img"]
    assert len(plots) == len(page.all("svg")) == 2 * len(page.all("figure")) >= 8
    assert all(len(e["attrs"]["aria-label"]) > 20 for e in plots)
    tables = iter([i for i, e in enumerate(page.elements) if e["tag"] == "table"])
    after = [i for i, e in enumerate(page.elements) if e["tag"] in ("figure", "h2", "h3")]
    tables_at = list(tables)
    for here, following in zip(after, [*after[1:], len(page.elements)], strict=True):
        if page.elements[here]["tag"] == "figure":
            assert any(here < i < following for i in tables_at), page.elements[here]["text"]
    assert len(page.all("caption")) == len(tables_at)
    assert all("scope" in e["attrs"] for e in page.all("th"))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_sufficient(theme: str) -> None:
    colours = themes()[theme]
    assert set(figure.ROLES) <= colours.keys() == themes()["light"].keys()
    colours["marked"] = tuple(0.1 * a + 0.9 * b for a, b in zip(colours["ours"], colours["paper"], strict=True))
    bits = [role for role in colours if re.fullmatch(r"bits-\d+", role)]
    parts = ["weights", "cache", "buffers", "process", "reserve"]
    words = [(one, other) for one in ("ink", "muted") for other in ("paper", "panel", "marked")]
    words += [(one, "paper") for one in ("ours", "good", "bad")] + [("ours", "on-part"), ("ink", "free")]
    words += [("on-bits", role) for role in bits] + [("on-part", role) for role in parts]
    low = {pair: contrast(*(colours[role] for role in pair)) for pair in words}
    assert min(low.values()) >= 4.5, min(low, key=lambda pair: low[pair])
    painted = [*bits, *parts, "ours", "warm", "cool", "edge"]
    marks = {role: contrast(colours[role], colours["paper"]) for role in painted}
    assert min(marks.values()) >= 3, min(marks, key=lambda role: marks[role])
    assert contrast((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == pytest.approx(21)


# What a browser makes of it.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen_and_loads_nothing(file: Path, browser: Any, width: int, scheme: str) -> None:
    page = opened_fitting(browser, file, width, scheme)
    plots = "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0)"
    assert page.evaluate(f"{plots}.length") == page.evaluate("document.querySelectorAll('figure').length")
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().width > 0)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a))"
    )
    assert smallest >= 9.5, "px, of the words in plots"
    outside = page.evaluate(
        f"{plots}.flatMap(s => {{ const b = s.getBoundingClientRect();"
        " return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < b.left - 2 || r.right > b.right + 2 }).map(t => t.textContent) })"
    )
    assert not outside, "words cut off by the edge of their plot"
    page.close()


def test_hostile_names_do_not_run(game: Comparison, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_page(hostile(game), HOSTILE), "utf-8")
    for bypass in (False, True):  # the escaping holds alone, without the policy that forbids scripts
        page, requests, _ = opened(browser, path, bypass_csp=bypass)
        page.wait_for_load_state("load")
        assert page.title() != "ran" and "document.title" in page.title()
        assert requests == [path.as_uri()]
        assert page.evaluate("document.querySelectorAll('script, img, [onerror]').length") == 0
        page.close()


def test_the_keyboard_reaches_everything(game: Comparison, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_page(game, COMMAND), "utf-8")
    page, *_ = opened(browser, path, viewport={"width": 360, "height": 800})
    page.keyboard.press("Tab")
    focused = "(() => { const e = document.activeElement, b = e.getBoundingClientRect(), s = getComputedStyle(e);"
    focused += " return [e.textContent.trim(), b.top >= 0, s.outlineStyle, parseFloat(s.outlineWidth)] })()"
    assert page.evaluate(focused) == ["Skip to the report", True, "solid", 3]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "report"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        tag, style = page.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if tag == "BODY":
            break
        assert style == "solid", f"the focus on {tag} cannot be seen"
        reached.add(tag)
    assert {"SUMMARY", "DIV"} <= reached, "details open and wide tables scroll with keys alone"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(file: Path, browser: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page, *_ = opened(browser, file, color_scheme=scheme, bypass_csp=True, viewport={"width": 360, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    page.close()
