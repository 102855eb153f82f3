import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from simulated import BITS, TEXTS, cell_of, played

from impq_edge.errors import RecordError
from impq_edge.study.cells import cell_path
from impq_edge.study.tables import perplexity_table
from impq_edge.study.transfer import transfer

TOOLS = Path(__file__).parents[2] / "tools"


def module(name: str) -> ModuleType:
    """A tool as a module: tools are scripts, in no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return module("study_report")


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return module("study_plots")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    for backend in ("hqq", "kquant"):
        for seed in range(2):
            cell = played(backend=backend, seed=seed, n_players=6)
            cell.save(cell_path(folder, cell))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "study_report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_command_per_table_prints_that_table_alone(tool: ModuleType, folder: Path) -> None:
    done = run(folder, "--table", "wins")
    assert done.returncode == 0
    assert "### Against every other method" in done.stdout
    assert "### The aims" not in done.stdout
    assert "4 cells of 2 games" in done.stdout


def test_every_table_is_laid_out_and_told_as_json(tool: ModuleType, folder: Path) -> None:
    study = tool.open_study(folder, "ours")
    text = tool.report(study, [*tool.TABLES])
    assert all(f"### {table.title}\n" in text for table in tool.TABLES.values())
    done = run(folder, "--json", "--method", "evolution")
    told = json.loads(done.stdout)
    assert told["method"] == "evolution"
    assert told.keys() - {"method", "cells"} == tool.TABLES.keys()
    assert told["wins"][0]["tally"]["contests"] == 4 * len(BITS) * len(TEXTS)


def test_a_method_that_no_cell_has_is_refused_with_those_there_are(tool: ModuleType, folder: Path) -> None:
    with pytest.raises(RecordError, match=r"'mine'.*evolution.*--method"):
        tool.open_study(folder, "mine")
    done = run(folder / "none")
    assert done.returncode == 1
    assert done.stderr.startswith("study_report: ") and "Traceback" not in done.stderr


def test_answers_over_their_average_are_told(tool: ModuleType) -> None:
    cell = played(n_players=6)
    assert "none over its average" in tool.summary(tool.Study([cell], "ours"))
    cheap = dataclasses.replace(cell.answers[-1], average_bits=2.0)
    cell = dataclasses.replace(cell, answers=(*cell.answers, cheap))
    assert f"1 over its average, the first {cheap.method} in {cell.name}" in tool.summary(tool.Study([cell], "ours"))


def test_labels_keep_their_distance_their_order_and_their_place(plots: ModuleType) -> None:
    wanted = [0.1, 0.5, 0.51, 0.52, 0.99]
    places = plots.spread(wanted, 0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] == pytest.approx(0.1)
    assert places[2] == pytest.approx(0.51)
    assert places[-1] <= 1


def test_plots_are_small_alike_each_time_and_bear_gaps(
    tool: ModuleType, plots: ModuleType, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    study = tool.open_study(folder, "ours")
    for out in ("one", "two"):
        tool.write_plots(tool.Study(study.cells, "ours"), [*tool.TABLES], tmp_path / out)
    made = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert made == [
        "evaluations.svg", "perplexity-toy-books.svg", "perplexity-toy-wikitext.svg", "regret.svg", "transfer.svg",
    ]  # fmt: skip
    for name in made:
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        assert len(first) < 150_000
    gap = [cell_of({"ours": {2.5: 4.0}, "phi": {3.0: 3.9}})]
    plots.plot_perplexity(gap, perplexity_table(gap, "ours"), "ours", tmp_path)
    plots.plot_transfer(transfer(gap), tmp_path / "transfer.svg")
    assert (tmp_path / "perplexity-toy-books.svg").exists()
