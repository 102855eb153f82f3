import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from impq_edge.data import data_path
from impq_edge.errors import RecordError, ValidationError
from impq_edge.validation.results import Divergence

TOOL = Path(__file__).parents[2] / "tools" / "bench_quality.py"
MIXES = ("Q2_K", "Q4_K_M")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The tool as a module: tools are scripts, in no package."""
    spec = importlib.util.spec_from_file_location("bench_quality", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_quality"] = module
    spec.loader.exec_module(module)
    return module


def divergence(*window_klds: float) -> Divergence:
    return Divergence(
        tokens=255 * len(window_klds), kld_mean=float(np.mean(window_klds)), kld_stderr=0.001, kld_median=0.01,
        kld_p99=0.1, kld_max=1.0, delta_p_mean=0.0, delta_p_stderr=0.0, delta_p_rms=0.0, delta_p_rms_stderr=0.0,
        same_top=0.9, same_top_stderr=0.01, perplexity_ratio=1.1, perplexity_ratio_stderr=0.01,
        reference_perplexity=50.0, reference_perplexity_stderr=1.0, window_klds=window_klds,
        reference_window_nlls=(4.0,) * len(window_klds),
    )  # fmt: skip


def quality(bench: ModuleType, name: str, ours_of: dict[tuple[str, str], tuple[float, ...]]) -> Any:
    """A model whose stock mixes diverge by 0.1 and 0.2 nats in the two windows of either text."""
    texts = [bench.Text(text, f"{text}.txt", "0" * 64) for text in ("books", "wikitext")]
    settings = bench.Settings(
        MIXES, tuple(texts), 2, 1, "calibration.txt", "0" * 64, 1024, 512, "tensors", (2, 3, 4), "gptq", 0, False,
        "0" * 64,
    )  # fmt: skip
    measured = []
    for (text, mix), klds in ours_of.items():
        for maker, values in ((bench.STOCK, (0.1, 0.2)), (bench.OURS, klds)):
            measured.append(bench.Measured(text, mix, maker, 55.0, divergence(*values)))
    files = [bench.Made("F16", "reference", "0" * 64, 9000, 9000, {})]
    files += [
        bench.Made(mix, maker, "0" * 64, size, size, {"output_norm.weight": "f32"})
        for size, mix in enumerate(MIXES, 2_000_000) for maker in (bench.STOCK, bench.OURS)
    ]  # fmt: skip
    return bench.Quality(
        bench.command_of("demo", settings), settings, {"llama_cpp": "1"},
        bench.Prepared(name, "0" * 64, 10**6, "cpu", "0" * 64, {"python": "3.11"}), tuple(files), tuple(measured),
        tuple(bench.pairs_of(measured)),
    )  # fmt: skip


@pytest.fixture
def two(bench: ModuleType) -> list[Any]:
    """Two models, eight cells: ours is lower in all but one."""
    half = (0.05, 0.1)
    cells = {(text, mix): half for text in ("books", "wikitext") for mix in MIXES}
    return [quality(bench, "one", cells), quality(bench, "two", {**cells, ("wikitext", "Q4_K_M"): (0.3, 0.15)})]


def save(found: list[Any], folder: Path) -> None:
    for one in found:
        one.save(folder / f"{one.model.name}.json")


def test_a_file_may_take_the_stock_files_bytes_and_not_one_more(bench: ModuleType) -> None:
    made = bench.Made("Q2_K", bench.OURS, "0" * 64, 1000, 1000, {})
    bench.require_no_more_bytes(made, 1000)
    with pytest.raises(ValidationError, match="1000 bytes for Q2_K, more than the stock file's 999"):
        bench.require_no_more_bytes(made, 999)


def test_the_paired_difference_is_that_of_the_means_and_its_error_knows_that_the_windows_are_the_same(
    bench: ModuleType,
) -> None:
    stock, ours = divergence(0.1, 0.9, 0.5), divergence(0.05, 0.85, 0.45)
    found = bench.pair("books", "Q2_K", bench.OURS, ours, stock)
    assert found.difference == pytest.approx(ours.kld_mean - stock.kld_mean)
    assert found.difference_stderr == pytest.approx(0, abs=1e-9)  # though the windows are far apart
    assert found.ratio == pytest.approx(0.45 / 0.5) and found.is_clear


def test_a_difference_within_two_errors_is_not_clear(bench: ModuleType) -> None:
    found = bench.pair("books", "Q2_K", bench.OURS, divergence(0.1, 0.1, 0.4), divergence(0.2, 0.3, 0.2))
    assert found.difference < 0 and not found.is_clear


def test_the_summary_counts_cells_and_names_the_worst(bench: ModuleType, two: list[Any]) -> None:
    told = bench.summary(two, bench.OURS)
    assert "−50.0 % in the median, lower than stock in 7 of 8 cells" in told
    assert "worst +50.0 %, two on wikitext at Q4_K_M" in told


def test_the_table_comes_from_the_records_alone(bench: ModuleType, two: list[Any], tmp_path: Path) -> None:
    save(two, tmp_path)
    told = bench.report(tmp_path)
    assert told == bench.table(two) == (tmp_path / "quality.md").read_text("utf-8")
    assert sum(line.startswith(("| one |", "| two |")) for line in told.splitlines()) == 8


def test_records_of_other_settings_are_not_put_in_one_table(bench: ModuleType, two: list[Any], tmp_path: Path) -> None:
    settings = dataclasses.replace(two[1].settings, windows=3)
    save([two[0], dataclasses.replace(two[1], settings=settings)], tmp_path)
    with pytest.raises(RecordError, match="different settings"):
        bench.report(tmp_path)


def test_the_plot_has_the_same_bytes_again(bench: ModuleType, two: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot; it comes with impq-edge[dev]")
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        bench.plot(two, path)
    text = paths[0].read_text("utf-8")
    assert text == paths[1].read_text("utf-8")
    assert all(label in text for label in ("two, wikitext", "file size, MiB", "Q4_K_M"))


@pytest.mark.slow
def test_a_run_measures_files_of_no_more_bytes_and_again_gives_the_same_record(tmp_path: Path) -> None:
    command = [
        sys.executable, TOOL, "demo", "--text", f"books={data_path('demo', 'evaluation.txt')}", "--windows", "2",
        "--mixes", "Q2_K", "--tokens", "512", "--calibration-tokens", "512", "--players", "blocks", "--types", "2,4,8",
        "--encode", "imatrix", "--compute", "cpu", "--same-types", "--two-four", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    for folder in ("first", "second"):  # the second in a place of another name
        places = ["--work", tmp_path / folder / "work", "--out", tmp_path / folder]
        subprocess.run([*command, *places], check=True, capture_output=True, env=environment)
    first, second = ((tmp_path / folder / "tiny-llama3.json").read_text("utf-8") for folder in ("first", "second"))
    assert first == second and str(tmp_path) not in first
    told = json.loads(first)
    sizes = {file["maker"]: file for file in told["files"]}
    assert sizes["ours"]["file_bytes"] <= sizes["stock"]["counted_bytes"] < sizes["stock"]["file_bytes"]
    assert sizes["2/4"]["file_bytes"] <= sizes["stock"]["counted_bytes"]
    assert sizes["same types"]["tensor_types"] == sizes["stock"]["tensor_types"]
