import dataclasses

import pytest

from impq_edge.devices.profile import DeviceProfile
from impq_edge.validation.checks import check_all
from impq_edge.validation.report import Check
from impq_edge.validation.results import ChatTrial, Run, Score, Speed

DEVICE = DeviceProfile(
    name="board",
    title="A board",
    memory_bytes=1000 << 20,
    system_reserve_bytes=200 << 20,
    cores=4,
    threads=4,
    isa="aarch64",
    memory_bandwidth_bytes_per_s=1e10,
    min_generation_tok_per_s=5.0,
    min_prompt_tok_per_s=50.0,
    max_file_bytes=1000,
)
RUN = Run(
    load_s=1.0,
    prompt=Speed(512, 50.0, 1.0),
    generation=Speed(64, 5.0, 0.1),
    continuation="Once upon a time there was",
    chat=ChatTrial("Hello.", stopped=True, tokens=2, reason=""),
    filled_tokens=4096,
    process_bytes=60 << 20,
    peak_rss_bytes=800 << 20,
    anonymous_bytes=400 << 20,
)
SCORE = Score(12.0, 0.5, 510, (2.4, 2.5))


def checks(
    run: Run = RUN,
    score: Score = SCORE,
    file_bytes: int = 1000,
    device: DeviceProfile | None = DEVICE,
    here: bool = True,
) -> dict[str, Check]:
    return {check.name: check for check in check_all(run, score, file_bytes, 4096, device, here)}


def test_numbers_exactly_at_their_limits_pass() -> None:
    found = checks()
    assert {check.status for check in found.values()} == {"passed"}
    assert found["memory"].limit == 800 << 20


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("memory", {"peak_rss_bytes": (800 << 20) + 1}),
        ("prompt_speed", {"prompt": Speed(512, 49.9, 1.0)}),
        ("generation_speed", {"generation": Speed(64, 4.9, 0.1)}),
        ("chat_stops", {"chat": ChatTrial("and and", stopped=False, tokens=128, reason="")}),
        ("chat_stops", {"chat": ChatTrial(None, stopped=False, tokens=0, reason="cannot be rendered")}),
    ],
)
def test_each_number_beyond_its_limit_fails_alone(name: str, changes: dict[str, object]) -> None:
    found = checks(dataclasses.replace(RUN, **changes))
    assert {check.name for check in found.values() if check.status == "failed"} == {name}


def test_a_large_file_and_a_loss_that_is_not_finite_fail() -> None:
    assert checks(file_bytes=1001)["file_size"].status == "failed"
    broken = checks(score=Score(None, None, 255, (2.4,)))["perplexity"]
    assert broken.status == "failed"
    assert "window 2" in broken.detail


def test_without_a_device_nothing_is_held_against_the_file() -> None:
    found = checks(device=None, here=False)
    assert {name for name, check in found.items() if check.status == "not_checked"} == {
        "file_size",
        "memory",
        "prompt_speed",
        "generation_speed",
    }
    assert all(check.detail for check in found.values())


def test_speed_elsewhere_says_nothing_about_the_device() -> None:
    found = checks(dataclasses.replace(RUN, generation=Speed(64, 0.1, 0.0)), here=False)
    assert found["generation_speed"].status == found["prompt_speed"].status == "not_checked"
    assert found["memory"].status == "passed"


def test_a_context_that_was_not_filled_can_fail_the_memory_but_not_pass_it() -> None:
    half = dataclasses.replace(RUN, filled_tokens=2048, peak_rss_bytes=700 << 20)
    assert checks(half)["memory"].status == "not_checked"
    assert "2048 of 4096 tokens" in checks(half)["memory"].detail
    assert checks(dataclasses.replace(half, peak_rss_bytes=801 << 20))["memory"].status == "failed"
