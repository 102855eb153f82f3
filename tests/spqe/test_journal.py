from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from impq_edge.errors import RecordError, SensitivityError
from impq_edge.spqe.journal import Journal, from_text, to_text

INPUTS = {"model": "abc", "tokens": 512, "backend": {"name": "hqq"}}


def filled(path: Path) -> Journal:
    journal = Journal(path, INPUTS)
    journal.add("44", np.array([1.0, 1 / 3]))
    journal.add("24", np.array([2.0, np.pi]))
    return journal


def test_everything_written_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "j"
    before = filled(path).losses
    after = Journal(path, INPUTS).losses
    assert list(after) == list(before) and all(np.array_equal(after[c], before[c]) for c in before)


def test_a_cut_at_any_byte_loses_at_most_what_was_cut(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    filled(whole)
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data)):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        journal = Journal(path, INPUTS)
        assert len(journal.losses) == max(0, sum(end <= cut for end in ends) - 1)
        journal.add("22", np.array([0.5]))
        assert Journal(path, INPUTS).losses["22"] == np.array([0.5])
        path.unlink()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SensitivityError, match=r"Line 3 of .* is damaged"):
        Journal(path, INPUTS)
    assert path.read_bytes() == data


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text("my diary\n")
    with pytest.raises(SensitivityError, match="no journal"):
        Journal(path, INPUTS)
    assert path.read_text() == "my diary\n"


def test_nothing_is_written_before_the_first_loss(tmp_path: Path) -> None:
    Journal(tmp_path / "j", INPUTS)
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("change", [{"model": "x"}, {"tokens": 1024}, {"backend": {"name": "kquant"}}])
def test_other_inputs_are_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    filled(tmp_path / "j")
    with pytest.raises(SensitivityError, match=f"started with {next(iter(change))} = "):
        Journal(tmp_path / "j", {**INPUTS, **change})


def test_coalitions_as_text() -> None:
    assert to_text((4, 2, 2)) == "422" and from_text("422") == (4, 2, 2)


def test_a_full_disk_takes_no_part_of_a_line(small_disk: Callable[[str], Path]) -> None:
    path = small_disk("size=8k") / "j"
    journal, told = Journal(path, INPUTS), 0
    with pytest.raises(RecordError, match=r"j is full: [\d,]+ bytes are needed and [\d,]+ bytes are free; free some"):
        for told in range(1000):
            journal.add(f"{told:b}".translate({48: "2", 49: "4"}), np.array([told / 3]))
    assert path.read_bytes().endswith(b"\n") and len(Journal(path, INPUTS).losses) == told
    small_disk("size=1m")
    journal.add("2424", np.array([0.5]))
    assert len(Journal(path, INPUTS).losses) == told + 1
    path.with_name("filled").write_bytes(bytes((1 << 20) - path.stat().st_size // 4096 * 4096 - 4096))
    other = path.with_name("other")
    with pytest.raises(RecordError, match="is full"):
        Journal(other, INPUTS).add("44", np.array([1.0]))
    assert not other.exists()
