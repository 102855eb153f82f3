"""The comparison of predicted with measured speeds runs on a calibrated device and files alone."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

from calibrated import calibrated

from impq_edge.devices.latency import predict_speeds
from impq_edge.devices.profile import load_device
from impq_edge.records import to_toml
from impq_edge.validation.shapes import read_shapes

TOOL = Path(__file__).parents[2] / "tools" / "compare_latency.py"


def test_predicted_and_measured_stand_side_by_side(tiny_ggufs: dict[str, Path], tmp_path: Path) -> None:
    pi = load_device("raspberry-pi-5")
    device = calibrated(dataclasses.replace(pi, threads=1, use_extra_bufts=False, context_tokens=128))
    profile = tmp_path / "mine.toml"
    told = device.to_json()
    del told["schema"]
    profile.write_text(to_toml(_without_none(told)))
    files = [tiny_ggufs["llama"], tiny_ggufs["gemma2"]]
    done = subprocess.run(
        [sys.executable, TOOL, *files, "--device", profile, "--rounds", "2", "--repetitions", "1", "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["files"]
    assert [row["file"] for row in found] == [file.name for file in files]
    for row, file in zip(found, files, strict=True):
        speeds = predict_speeds(*read_shapes(file), device)
        assert row["basis"] == speeds.basis == "formats"
        for rate, row_ in ((speeds.prompt, row["prompt"]), (speeds.generation, row["generation"])):
            assert rate and row_["predicted"] == rate.likely_tok_per_s
            assert row_["low"] < row_["predicted"] < row_["high"] and row_["measured"] > 0 <= row_["spread"]
            assert math.isclose(row_["ratio"], row_["predicted"] / row_["measured"])


def _without_none(table: dict[str, object]) -> dict[str, object]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
