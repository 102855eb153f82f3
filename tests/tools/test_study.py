"""The tool that plays the study's cells: what is there is not played again, and one bad cell ends no other."""

import subprocess
import sys
from pathlib import Path

from impq_edge.study.cells import load_cells
from impq_edge.study.transfer import LENT

TOOL = Path(__file__).parents[2] / "tools" / "study.py"


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_cells_are_played_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number} and" for number in range(2000)))
    arguments = [
        *("--models", f"small={checkpoints['llama']}", "--models", f"broken={tmp_path}", "--texts", f"words={text}"),
        *("--held-out", f"words={text}", "--backends", "quanto", "--seeds", "0", "--compute", "cpu"),
        *("--tokens", "64", "--calibration-tokens", "64", "--window-tokens", "32", "--exam-windows", "2"),
        *("--permutations", "2"),
    ]
    first = study(tmp_path / "cells", *arguments)
    assert first.returncode == 1
    assert "1 of 2 cells are there" in first.stderr
    assert "config.json" in first.stderr and "Traceback" not in first.stderr
    (cell,) = load_cells(tmp_path / "cells")
    assert cell.name == "small-quanto-blocks-words-0"
    assert {"rounds", "impq-0.5", "lim"} <= {answer.method for answer in cell.answers}
    path = tmp_path / "cells" / f"{cell.name}.json.bz2"
    before = path.stat().st_mtime_ns
    again = study(tmp_path / "cells", *arguments[:2], *arguments[4:])
    assert again.returncode == 0
    assert path.stat().st_mtime_ns == before
    lending = [*arguments[:2], *arguments[4:], "--lend", "quanto", "--backends", "hqq", "--skip", "rounds,evolution"]
    assert study(tmp_path / "cells", *lending).returncode == 0
    (borrower,) = (other for other in load_cells(tmp_path / "cells") if other.backend == "hqq")
    assert {answer.coalition for answer in cell.answers if answer.method in LENT} <= borrower.exams.keys()


def test_what_is_no_name_and_path_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    common = ("--texts", f"a={TOOL}", "--held-out", f"a={TOOL}")
    for arguments, sentence in (
        (("--models", "small", *common), "--models small is not NAME=PATH"),
        (("--models", f"small={tmp_path / 'none'}", *common), "is not NAME=PATH of something that exists"),
        (("--models", f"small={tmp_path}", *common, "--backends", "awq"), "--backends awq is unknown"),
        (("--models", f"small={tmp_path}", *common, "--lend", "hqq,awq"), "--lend awq is unknown"),
    ):
        done = study(tmp_path / "cells", *arguments)
        assert done.returncode == 1
        assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "cells").exists()
