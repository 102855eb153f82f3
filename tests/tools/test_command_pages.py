"""The pages of the commands are what the command line says, and a stale one is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from typer.main import get_command

from impq_edge.cli import app

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "command_pages.py"
PAGES = ROOT / "docs" / "commands"


def run(*arguments: str | Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_pages_are_up_to_date() -> None:
    done = run("--check")
    assert done.returncode == 0, f"{done.stderr}\nregenerate them with: python tools/command_pages.py"


def test_stale_missing_and_surplus_pages_are_named_and_written_anew(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    shutil.copytree(PAGES, pages)
    text = (pages / "build.md").read_text("utf-8")
    (pages / "build.md").write_text(text.replace("`--windows`", "`--window`"), "utf-8")
    (pages / "plan.md").unlink()
    (pages / "gone.md").write_text("# impq-edge gone\n", "utf-8")
    done = run("--check", "--out", pages)
    assert done.returncode == 1
    assert "build.md, gone.md, plan.md" in done.stderr and "python tools/command_pages.py" in done.stderr
    assert (pages / "gone.md").exists()  # a check writes nothing
    assert run("--out", pages, columns=200).returncode == 0
    found = {path.name: path.read_bytes() for path in pages.iterdir()}
    assert found == {path.name: path.read_bytes() for path in PAGES.iterdir()}


def test_every_option_of_every_command_has_its_row() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *commands}
    for name, command in commands.items():
        rows = [row for row in (PAGES / f"{name}.md").read_text("utf-8").splitlines() if row.startswith("| `-")]
        for found in (command, *getattr(command, "commands", {}).values()):
            for option in (p for p in found.params if p.param_type_name == "option"):
                row = next(row for row in rows if f"`{option.opts[0]}`" in row.split("|")[1])
                assert option.help and " ".join(option.help.split()).replace("|", "\\|") in row
                assert ("required" in row.split("|")[-3]) == option.required
