"""One at a time: whoever comes second is refused, and nobody is kept out by what a dead process left."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import impq_edge
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.errors import RecordError
from impq_edge.lock import LOCK_FILE, sole_making, sole_use


def test_a_file_is_made_by_one_at_a_time(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "m.gguf"
    hold = f"import time; from pathlib import Path; from impq_edge.lock import sole_making\n\
with sole_making(Path({str(out)!r})):\n print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    for make in (impq_edge.convert, impq_edge.profile):  # by hand, in the directory of a build
        with pytest.raises(RecordError, match=f"m.gguf is in use by process {child.pid}; wait .* or choose another -o"):
            make(str(checkpoints["qwen3"]), out=out)
    with sole_making(out.with_name("other.gguf")):
        pass
    child.kill()
    child.wait()
    impq_edge.convert(str(checkpoints["qwen3"]), out=out, type="q2_k", encode=EncodeOptions("rtn"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["m.gguf", "m.gguf.json"]


def test_a_lock_that_finds_no_room_leaves_nothing(small_disk: Callable[[str], Path]) -> None:
    small = small_disk("size=4096")
    (small / "filled").write_bytes(bytes(4096))
    with pytest.raises(RecordError, match="out is full: 0 bytes are free; free some space"), sole_use(small / "out"):
        pass
    assert [path.name for path in small.iterdir()] == ["filled"]
    small_disk("size=1m,nr_inodes=3")
    with (
        pytest.raises(RecordError, match="bytes are free, and no room for another file; free"),
        sole_use(small / "out"),
    ):
        pass
    assert [path.name for path in small.iterdir()] == ["filled"]
    small_disk("ro")
    with (
        pytest.raises(RecordError, match="out cannot be written: Read-only file system; choose"),
        sole_use(small / "out"),
    ):
        pass


def test_a_file_in_the_place_of_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(RecordError, match="a file stands where a directory is needed"), sole_use(out):
            pass
    assert (tmp_path / "file").read_text() == "kept"


def test_one_that_ends_does_not_pull_the_directory_from_under_the_next(tmp_path: Path) -> None:
    """Each removes the directory that it made and left empty, while another is about to lock it."""
    out, faults = tmp_path / "a" / "out", list[str]()

    def work() -> None:
        for _ in range(300):
            try:
                with sole_use(out):
                    held = (out / LOCK_FILE).read_text()
                    faults.extend([] if held == f"{os.getpid()}\n" else [held])
            except RecordError as refused:
                faults.extend([] if "is in use by" in str(refused) else [str(refused)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and not any(out.glob("*"))


def test_a_directory_removed_while_it_is_asked_for_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment that the test above meets by chance: mkdir finds the directory, and pathlib then finds nothing."""
    out = tmp_path / "out"
    mkdir, met = os.mkdir, list[str]()

    def meets_one_that_ends(path: str, mode: int = 0o777) -> None:
        if os.fspath(path) == str(out) and not met:
            met.append(path)
            raise FileExistsError(17, "File exists", str(path))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", meets_one_that_ends)
    with sole_use(out):
        assert (out / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert met and not out.exists()
