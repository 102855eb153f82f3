from pathlib import Path

import pytest

from impq_edge.validation.llama import Engine
from impq_edge.validation.memory import anonymous_bytes, fill_context, peak_rss_bytes
from impq_edge.validation.settings import RunSettings

SETTINGS = RunSettings(context_tokens=1024, threads=1, ubatch_tokens=128)
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc/self/status is Linux's")


def test_a_context_is_filled_to_the_last_token(tiny_ggufs: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    with Engine(tiny_ggufs["gemma2"], SETTINGS) as engine:
        engine.decode([1, 2, 3])
        assert fill_context(engine, 600.0, lambda done, total: steps.append((done, total))) == 1024
        assert engine.position == 1024
    assert steps == [(128 * n, 1024) for n in range(1, 9)]


def test_filling_stops_when_its_time_is_up(tiny_ggufs: dict[str, Path]) -> None:
    with Engine(tiny_ggufs["llama"], SETTINGS) as engine:
        assert fill_context(engine, 0.0) == 128


@LINUX
def test_the_peak_never_falls_and_covers_what_is_held() -> None:
    slack = 1 << 20  # the kernel counts pages in batches
    before = peak_rss_bytes()
    held = bytearray(before + (32 << 20))  # zeroed memory is not resident before it is written
    held[::4096] = b"\x01" * len(held[::4096])
    during, anonymous = peak_rss_bytes(), anonymous_bytes()
    assert anonymous is not None
    assert before + (32 << 20) - slack <= anonymous <= during + slack
    del held
    assert peak_rss_bytes() >= during - slack
