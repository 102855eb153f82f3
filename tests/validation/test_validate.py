import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Literal

import pytest

from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, Identity
from impq_edge.errors import RecordError, ValidationError
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.validate import available_threads, validate

QUICK = {"windows": 1, "generated_tokens": 4, "repetitions": 2, "context_tokens": 512, "threads": 1, "timeout_s": 300.0}
DEVICE = DeviceProfile(
    name="board",
    title="A board",
    memory_bytes=4 << 30,
    system_reserve_bytes=1 << 30,
    cores=64,
    threads=64,
    isa="x86-64+avx2",
    memory_bandwidth_bytes_per_s=1e10,
    context_tokens=1024,
    kv_type="q8_0",
    ubatch_tokens=256,
    mmap=False,
)


@pytest.fixture(scope="module")
def report(demo_gguf: Path) -> ValidationReport:
    return validate(demo_gguf, **QUICK)


def statuses(report: ValidationReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_a_good_file_passes_and_is_described(report: ValidationReport, demo_gguf: Path) -> None:
    text = data_path("demo", "evaluation.txt")
    assert report.passed
    assert report.file == demo_gguf.name
    assert report.file_bytes == demo_gguf.stat().st_size
    assert report.sha256 == hashlib.sha256(demo_gguf.read_bytes()).hexdigest()
    assert report.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert report.architecture == "llama"
    assert report.tokens == 255
    assert len(report.window_nlls) == 1
    assert report.perplexity is not None
    assert 10 < report.perplexity < 200  # a trained model on English
    assert report.generated_text.startswith("Once upon a time")
    assert report.filled_tokens == report.settings.context_tokens == 512


def test_the_peak_holds_the_file_and_the_process(report: ValidationReport) -> None:
    # Scoring takes place in another process: 64 rows of logits alone would add 2 MB.
    assert report.process_bytes + report.file_bytes < report.peak_rss_bytes


def test_a_report_survives_the_disk_and_names_what_scripts_read(report: ValidationReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    assert ValidationReport.load(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema"] == "impq-edge.validation/1"
    assert {"perplexity", "perplexity_stderr", "tokens", "prompt_tok_per_s", "generation_tok_per_s"} <= data.keys()
    assert {"peak_rss_bytes", "file_bytes", "generated_text", "device", "settings", "checks", "passed"} <= data.keys()


def test_a_report_that_contradicts_its_checks_is_refused(report: ValidationReport, tmp_path: Path) -> None:
    data = report.to_json() | {"passed": False}
    (tmp_path / "forged.json").write_text(json.dumps(data))
    with pytest.raises(RecordError, match="contradicts the checks"):
        ValidationReport.load(tmp_path / "forged.json")


def test_a_device_s_settings_are_used_and_its_memory_is_checked(demo_gguf: Path) -> None:
    options = {**QUICK, "context_tokens": None, "threads": None}
    found = validate(demo_gguf, device=DEVICE, **options)
    settings = found.settings
    assert found.device == "board"
    assert (settings.context_tokens, settings.kv_type, settings.ubatch_tokens) == (1024, "q8_0", 256)
    assert (settings.mmap, settings.use_extra_bufts) == (False, False)
    assert settings.threads == available_threads()  # this machine is not the board
    assert statuses(found)["memory"] == "passed"
    assert found.passed
    assert found.memory_limit
    assert found.memory_limit.limit_bytes == 3 << 30


def of_memory(limit_bytes: int) -> DeviceProfile:
    return dataclasses.replace(
        DEVICE, memory_bytes=limit_bytes + (20 << 20), system_reserve_bytes=20 << 20, python_process_bytes=1 << 20
    )


def test_a_device_too_small_for_a_run_ends_it_or_fails_the_check_where_it_may_go_on(demo_gguf: Path) -> None:
    with pytest.raises(ValidationError, match="may hold 30 MiB"):
        validate(demo_gguf, device=of_memory(30 << 20), **QUICK)
    cramped = validate(demo_gguf, device=of_memory(30 << 20), memory_limit_bytes=None, **QUICK)
    assert statuses(cramped)["memory"] == "failed"
    assert not cramped.passed
    assert cramped.memory_limit is None


@pytest.mark.parametrize(("device", "limit"), [(of_memory(5 << 20), "device"), (None, 5 << 20)])
def test_a_file_larger_than_the_limit_is_refused_before_anything_is_read(
    device: DeviceProfile | None, limit: int | Literal["device"], demo_gguf: Path
) -> None:
    begun: list[str] = []
    with pytest.raises(ValidationError, match=r"bytes, but .* 5,242,880; choose a smaller file"):
        validate(
            demo_gguf,
            device=device,
            memory_limit_bytes=limit,
            progress=lambda stage, _, __: begun.append(stage),
            **QUICK,
        )
    assert not begun


def test_a_reference_too_large_for_the_device_does_not_count_against_it(demo_gguf: Path, demo: Path) -> None:
    # Both are loaded side by side, where only one of them is for the device.
    found = validate(demo_gguf, device=of_memory(90 << 20), reference=demo_gguf, **QUICK)
    assert found.divergence
    with pytest.raises(ValidationError, match="may hold 55 MiB"):
        validate(demo_gguf, memory_limit_bytes=55 << 20, reference=demo_gguf, **QUICK)


def test_speed_limits_hold_on_the_device_itself(demo_gguf: Path) -> None:
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    total = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if cpu is None or total is None:
        pytest.skip("this processor does not tell its name")
    here = dataclasses.replace(
        DEVICE,
        memory_bytes=int(total[1]) * 1024,
        threads=1,
        identify=Identity(cpu=cpu[1]),
        min_generation_tok_per_s=1e12,
        min_prompt_tok_per_s=1e-6,
    )
    found = validate(demo_gguf, device=here, **QUICK | {"threads": None})
    assert found.settings.threads == 1
    assert statuses(found)["generation_speed"] == "failed"
    assert statuses(found)["prompt_speed"] == "passed"
    assert not found.passed


def test_repacking_and_the_cache_s_type_leave_perplexity_as_it_is(report: ValidationReport, demo_gguf: Path) -> None:
    other = validate(demo_gguf, **QUICK, use_extra_bufts=False, kv_type="q8_0")
    assert other.settings.kv_type == "q8_0"
    assert other.window_nlls == pytest.approx(report.window_nlls, rel=5e-3)


def test_progress_tells_every_stage(demo_gguf: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    validate(demo_gguf, **QUICK, progress=lambda *step: heard.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        "hash",
        "perplexity",
        "speed",
        "context",
    ]
    assert all(done <= total for _, done, total in heard)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"windows": 0}, "windows is 0"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"kv_type": "q5_9"}, "Cache type 'q5_9' is unknown; choose one of f32, f16, bf16, q8_0"),
        ({"context_tokens": 8}, "context of 8 tokens holds no answer"),
        ({"timeout_s": 0.01}, "not done after 0.01 s"),
    ],
)
def test_options_out_of_range_are_one_sentence(demo_gguf: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        validate(demo_gguf, **QUICK | options)


def test_a_damaged_file_never_reaches_llama_cpp(demo_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(demo_gguf.read_bytes()[:-4096])
    with pytest.raises(ValidationError, match="cut short by"):
        validate(tmp_path / "cut.gguf", **QUICK)


def test_a_text_that_cannot_be_read_or_is_too_short_is_refused(demo_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        validate(demo_gguf, text=tmp_path / "none.txt", **QUICK)
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(ValidationError, match="shorter than one window"):
        validate(demo_gguf, text=tmp_path / "short.txt", **QUICK)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes to processors")
def test_threads_are_those_this_process_may_use() -> None:
    assert available_threads() == len(os.sched_getaffinity(0))
