"""``impq-edge plan`` as a user meets it: tables and pictures at any width, in any encoding, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from impq_edge import console
from impq_edge.devices.profile import device_names
from impq_edge.stages.planning import Plan

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
PI = ("--device", "raspberry-pi-5")
BLOCKED = ["torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "scipy", "qpsolvers", "llama_cpp"]


def run(*arguments: str | Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "impq_edge.cli"]
    return subprocess.run(
        [sys.executable, *program, "plan", *map(str, arguments)],
        check=False, capture_output=True, text=True, env={**ENVIRONMENT, **environment},
    )  # fmt: skip


def test_what_it_shows() -> None:
    done = run("--model", "meta-llama/Llama-3.1-8B", *PI, "--context", "8192")
    assert done.returncode == 0
    assert done.stderr == (
        "Model: the shapes of meta-llama/Llama-3.1-8B that ship with impq-edge; the hub was not asked.\n"
    )
    assert "\x1b" not in done.stdout and "Llama-3.1-8B" in done.stdout and "Raspberry Pi 5" in done.stdout
    for shown in ("2 bit", "4 bit", "Q2_K", "Q4_K_M", "8,192", "KV cache", "weights", "free", "over", "tokens/s"):
        assert shown in done.stdout, shown


def test_the_mix_stands_between_2_and_4_bit() -> None:
    done = run("--model", "Llama-3.1-8B", "--device", "laptop-8gb")
    assert done.returncode == 0
    first = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert first[0] == "2 bit" and first[2] == "4 bit" and re.fullmatch(r"[23]\.\d\d bit mix", first[1])


def test_json_is_the_record(tmp_path: Path) -> None:
    done = run("--model", "Qwen3-4B", *PI, "--kv-type", "q8_0", "--json")
    (tmp_path / "plan.json").write_text(done.stdout)
    made = Plan.load(tmp_path / "plan.json")
    assert (made.model, made.device, made.kv_type) == ("Qwen3-4B", "raspberry-pi-5", "q8_0")


def test_all_devices_are_compared_in_a_line_each() -> None:
    done = run("--model", "Llama-3.2-3B", "--device", "all")
    assert done.returncode == 0
    for name in device_names():
        assert sum(line.startswith(f"│ {name} ") for line in done.stdout.splitlines()) == 1
    told = json.loads(run("--model", "Qwen3-0.6B", *PI, "--device", "laptop-8gb", "--json").stdout)
    assert [plan["device"] for plan in told["plans"]] == ["raspberry-pi-5", "laptop-8gb"]


def test_nothing_fits() -> None:
    done = run("--model", "Qwen3-8B", *PI, "--context", "40000")
    assert done.returncode == 1 and "What it takes" in done.stdout
    told = done.stderr.splitlines()
    assert len(told) == 2 and told[1].startswith("Error: Qwen3-8B does not fit raspberry-pi-5 even as Q2_K")
    assert "--context" in told[1]
    done = run("--model", "Qwen3-8B", "--device", "raspberry-pi-zero-2w", "--device", "raspberry-pi-4-4gb")
    assert done.returncode == 1 and done.stdout.count("nothing") == 2
    assert [line[:7] for line in done.stderr.splitlines()[1:]] == ["Error: ", "Error: "]


@pytest.mark.parametrize("columns", [44, 60, 80, 160])
def test_tables_and_pictures_keep_to_the_terminal(columns: int) -> None:
    done = run("--model", "gemma-2-9b", *PI, "--context", "8192", COLUMNS=str(columns))
    lines = done.stdout.split("What it takes\n")[1].splitlines()
    shown = lines[: next(i for i, line in enumerate(lines) if line.startswith("Speeds"))]
    assert max(map(len, shown)) <= columns
    bars = [line for line in shown if "█" in line and ("free" in line or "over" in line) and "weights" not in line]
    assert len(bars) == 10 and len({line.index("│") for line in bars}) == 1


def test_an_encoding_without_blocks() -> None:
    done = run("--model", "gemma-2-9b", *PI, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "?" not in done.stdout and "#" in done.stdout
    assert re.search(r"\d\.\d \(\d\.\d-\d\.\d\)", done.stdout)


def test_the_base_install_can_plan(demo: Path) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); from impq_edge.cli import main; main()"
    for model in ("Qwen3-1.7B", str(demo)):
        done = run("--model", model, *PI, code=code)
        assert done.returncode == 0, done.stderr
    done = run("--model", "org/unknown", *PI, code=code)
    assert done.returncode == 3 and "Shapes ship for" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "Qwen3-4B"], 2, "--device"),
        (["--model", "Qwen3-4B", "--device", "pi"], 3, "No device is called 'pi'"),
        (["--model", "Qwen4", *PI], 3, "Shapes ship for"),
        (["--model", "demo", *PI, "--types", "4,2"], 3, "ascending"),
        (["--model", "demo", *PI, "--types", "two"], 3, "--types 'two'"),
        (["--model", "demo", *PI, "--revision", "main"], 3, "leave the revision out"),
        (["--model", "demo", *PI, "--context", "0"], 2, "--context"),
        (["--model", "demo", *PI, "--kv-type", "q2_k"], 2, "--kv-type"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = run(*arguments, HF_HOME=str(tmp_path), NO_COLOR="1", COLUMNS="200")
    assert done.returncode == code and done.stdout == "" and words in done.stderr
    assert "Traceback" not in done.stderr
    if code == 3:
        assert [line[:7] for line in done.stderr.splitlines() if not line.startswith("Model: ")] == ["Error: "]


def test_bars_are_to_scale(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console._out, "_width", 60)
    bars = [
        console.Bar("half", {"a": 2.0, "b": 3.0, "none": 0.0}, "5 free"),
        console.Bar("over", {"a": 2.0, "b": 13.0, "none": 0.0}, "5 over"),
    ]
    console.show_bars("Title", bars, console.Limit(10.0, "10 GiB", "limit", "left"))
    title, above, half, over, meanings = capsys.readouterr().out.splitlines()
    assert title == "Title" and above.strip() == "10 GiB" and above.rstrip()[-1] == "B"
    mark = half.index("│")
    assert over.index("│") == mark == len(above.rstrip()) - 1
    start = half.index("╱")
    assert half.count("·") == pytest.approx((mark - start) / 2, abs=1)
    assert half.count("▪") == pytest.approx(1.5 * half.count("╱"), abs=1)
    assert over[mark + 1 :].count("▪") == pytest.approx((mark - start) / 2, abs=1)
    assert half.endswith("5 free") and over.endswith("5 over") and len(half) == len(over)
    assert meanings == " ╱ a  ▪ b  · left  │ limit"
