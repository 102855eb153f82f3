"""Write docs/commands from the command line's own help: a page per command, and an index.

    python tools/command_pages.py            # write them anew
    python tools/command_pages.py --check    # 1 if a page is stale, missing, or of no command

Pages follow from the options as typer knows them, never from printed help, so that terminals do not matter.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.main import get_command

from impq_edge import console
from impq_edge.cli import app
from impq_edge.errors import EXIT_CHECK_FAILED
from impq_edge.records import atomic_path

ROOT = Path(__file__).parents[1]
PROGRAM = "impq-edge"
COMMAND = "python tools/command_pages.py"
NOTE = f"<!-- Written by `{COMMAND}` from impq_edge/cli.py: change that, and run it again. -->"
_EXAMPLE = re.compile(r"Examples?: `(.+?)`", re.DOTALL)
_PLAIN = {str: "text", int: "whole number", float: "number", Path: "path"}


@dataclass(frozen=True)
class Takes:
    """What one argument or option takes."""

    kind: Any
    low: float | None
    high: float | None

    @classmethod
    def of(cls, parameter: Parameter) -> "Takes":
        """Read the annotation of a command's parameter."""
        kind, low, high = parameter.annotation, None, None
        if get_origin(kind) is Annotated:
            kind, *infos = get_args(kind)
            for info in infos:
                low, high = getattr(info, "min", None), getattr(info, "max", None)
        some = [part for part in get_args(kind) if part is not type(None)]
        if get_origin(kind) is not Literal and len(some) == 1 and type(None) in get_args(kind):
            kind = some[0]
        return cls(kind, low, high)

    def told(self) -> str:
        """Return it in words."""
        if get_origin(self.kind) is Literal:
            return ", ".join(f"`{choice}`" for choice in get_args(self.kind))
        if get_origin(self.kind) is list:
            return f"{_PLAIN[get_args(self.kind)[0]]}, repeatable"
        if self.kind is bool:
            return ""
        limits = [f"from {self.low:g}"] if self.low is not None else []
        limits += [f"to {self.high:g}"] if self.high is not None else []
        return _PLAIN[self.kind] + (f" {' '.join(limits)}" if limits else "")


def pages() -> dict[str, str]:
    """Return every page's text by its file name."""
    root: Any = get_command(app)
    commands: dict[str, Any] = dict(sorted(root.commands.items()))
    made = {f"{name}.md": "\n".join(_page(f"{PROGRAM} {name}", found)) for name, found in commands.items()}
    assert "index.md" not in made
    return {"index.md": "\n".join(_index(root, commands)), **made}


def _index(root: Any, commands: dict[str, Any]) -> Iterator[str]:
    yield from (NOTE, "", "# Commands", "", root.help, "")
    yield "| command | what it does |"
    yield "|---|---|"
    for name, found in commands.items():
        yield f"| [`{PROGRAM} {name}`]({name}.md) | {_cell(_prose(found.help)[0])} |"
    yield from ("", *_exit_codes(root.epilog), "")
    yield "Results go to stdout, everything else to stderr; `--json` prints one object. What to do about an error is in"
    yield "[troubleshooting](../troubleshooting.md). The pages are also in the program: `impq-edge COMMAND --help`."
    yield ""


def _page(name: str, command: Any) -> Iterator[str]:
    yield from (NOTE, "", f"# {name}", "", *_body(name, command, "##"))
    for inner, found in getattr(command, "commands", {}).items():
        yield from ("", f"## {name} {inner}", "", *_body(f"{name} {inner}", found, "###"))
    yield from ("", *_exit_codes(command.epilog), "", "All commands: [index](index.md).", "")


def _body(name: str, command: Any, heading: str) -> Iterator[str]:
    # The docstring as it stands: typer's copy of a group's help leaves out that of its callback.
    told = "\n\n".join(dict.fromkeys([command.help, _docstring(command)]))
    yield "\n\n".join(_prose(told))
    yield from ("", "```text", _usage(name, command), "```")
    examples = [" ".join(found.split()) for found in _EXAMPLE.findall(told)]
    if examples:
        yield from ("", f"{heading} Examples", "", "```sh", *examples, "```")
    takes = {key: Takes.of(found) for key, found in signature(command.callback).parameters.items()}
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    if arguments:
        yield from ("", f"{heading} Arguments", "", "| argument | takes | |", "|---|---|---|")
        for p in arguments:
            yield f"| `{p.metavar or p.name.upper()}` | {takes[p.name].told()} | {_cell(p.help)} |"
    if options:
        yield from ("", f"{heading} Options", "", "| option | takes | default | |", "|---|---|---|---|")
        for p in options:
            yield f"| {_names(p)} | {_taken(p, takes[p.name])} | {_default(p)} | {_cell(p.help)} |"


def _docstring(command: Any) -> str:
    return "\n".join(line.strip() for line in (command.callback.__doc__ or "").strip().splitlines())


def _prose(told: str) -> list[str]:
    """Return the paragraphs of a help text that are no examples."""
    paragraphs = [" ".join(_EXAMPLE.sub("", part).strip(" .").split()) for part in told.split("\n\n")]
    found = [part if part.endswith(".") else f"{part}." for part in paragraphs if part]
    return list(dict.fromkeys(found))


def _usage(name: str, command: Any) -> str:
    shown = [(p, p.metavar or p.name.upper()) for p in command.params]
    wanted = [f"{p.opts[0]} {word}" for p, word in shown if p.required and p.param_type_name == "option"]
    words = [word if p.required else f"[{word}]" for p, word in shown if p.param_type_name == "argument"]
    return " ".join([name, *words, *wanted, "[OPTIONS]"])


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _taken(option: Any, takes: Takes) -> str:
    return f"`{option.metavar}`" if option.metavar else takes.told()


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default == [] or option.default is False:
        return ""
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _exit_codes(epilog: str | None) -> Iterator[str]:
    if epilog is None:
        return
    told = epilog.partition(":")[2].strip().rstrip(".")
    codes = [part.strip().partition(" ") for part in told.split(",")]
    yield from ("**Exit codes:** " + ", ".join(f"`{code}` {meaning}" for code, _, meaning in codes) + ".",)


def stale(folder: Path) -> list[str]:
    """Return the names of the pages that are not what they should be, sorted."""
    wanted = pages()
    there = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the pages are.")] = ROOT / "docs" / "commands",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; 1 if a page is not up to date.")] = False,
) -> None:
    """Write the pages of all commands, and remove those of commands that are gone."""
    wrong = stale(out)
    if check:
        if wrong:
            console.fail(f"{', '.join(wrong)} in {out} are not what the command line says; run: {COMMAND}")
            sys.exit(EXIT_CHECK_FAILED)
        return
    made = pages()
    for name in wrong:
        if name not in made:
            (out / name).unlink()
            continue
        with atomic_path(out / name) as path:
            path.write_text(made[name], "utf-8")
    console.say(f"{len(wrong)} of {len(made)} pages written to {out}")


if __name__ == "__main__":
    typer.run(main)
