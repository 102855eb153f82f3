"""What the documentation says exists: links, anchors, commands, options, fields, symbols and errors."""

import ast
import dataclasses
import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.main import get_command

from impq_edge import errors
from impq_edge.cli import app
from impq_edge.devices.profile import DeviceProfile, Identity, load_device
from impq_edge.releases.order import load_order

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
WORKFLOW = DOCS / "github-actions" / "release.yml"
SOURCES = sorted((ROOT / "impq_edge").rglob("*.py"))
PROGRAM = "impq-edge"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))


def inline(path: Path) -> Iterator[Token]:
    for token in tokens(path):
        yield from token.children or ()


def links(path: Path) -> list[str]:
    found = [token.attrGet("href") or token.attrGet("src") for token in inline(path)]
    return [str(link) for link in found if link]


def anchors(path: Path) -> set[str]:
    """Return the ids that GitHub gives to a page's headings."""
    found: dict[str, int] = {}
    listed: set[str] = set()
    read = tokens(path)
    for opening, heading in itertools.pairwise(read):
        if opening.type != "heading_open":
            continue
        text = "".join(part.content for part in heading.children or () if part.type in {"text", "code_inline"})
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        listed.add(f"{slug}-{count}" if count else slug)
    return listed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / unquote(place)).resolve() if place else page
        assert target.exists() and target.is_relative_to(ROOT), f"{link} leads nowhere"
        if anchor:
            assert unquote(anchor) in anchors(target), f"{link} names no heading; there are {sorted(anchors(target))}"


def test_every_page_is_reached_from_the_index() -> None:
    reached, to_read = set(), [DOCS / "index.md"]
    while to_read:
        page = to_read.pop()
        if page in reached:
            continue
        reached.add(page)
        inside = ((page.parent / unquote(link.partition("#")[0])).resolve() for link in links(page) if ":" not in link)
        to_read += [path for path in inside if path.suffix == ".md" and path.is_relative_to(DOCS)]
    lost = set(DOCS.rglob("*.md")) - reached
    assert not lost, f"no link from docs/index.md leads to {sorted(map(name_of, lost))}"


# The commands.


def lines_of(code: str) -> Iterator[str]:
    """Yield the lines of a block of code, those that end with a backslash joined to the next."""
    yield from re.sub(r"\\\n\s*", " ", code).splitlines()


def words_of(line: str) -> list[str]:
    """Return the arguments of the program that a line of shell runs, or nothing."""
    found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S* )*(?:scripts/with-venv |env |nice )*impq-edge (.+)", line)
    if found is None:
        return []
    command = re.split(r"\s(?:&&|\|\||\||;|>|2>)\s", found[1])[0]
    command = re.sub(r"\$\{\{.*?\}\}", "VALUE", command)  # GitHub's expressions
    return shlex.split(command, comments=True)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words name, and the words that are left."""
    found: Any = get_command(app)
    rest = list(words)
    while rest and rest[0] in getattr(found, "commands", {}):
        found = found.commands[rest.pop(0)]
    return found, rest


def why_not(words: list[str]) -> str:
    """Return why the command line refuses words, or nothing."""
    command, rest = command_of(words)
    if "--help" in rest:
        return ""
    if not words or (command.name not in words and rest[:1] != ["--help"]):
        return f"there is no command {rest[:1]}"
    try:
        command.make_context(command.name, rest)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    return ""


def code_in(page: Path) -> list[str]:
    """Return blocks of code; what is no shell, such as a usage, says so."""
    return [t.content for t in tokens(page) if t.type == "code_block" or (t.type == "fence" and t.info != "text")]


def commands_in(page: Path) -> list[list[str]]:
    found = [words_of(line) for block in code_in(page) for line in lines_of(block)]
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_blocks_of_code_parse(page: Path) -> None:
    for words in commands_in(page):
        assert not (wrong := why_not(words)), f"{PROGRAM} {shlex.join(words)}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_sentences_exist(page: Path) -> None:
    spans = [" ".join(t.content.split()) for t in inline(page) if t.type == "code_inline"]
    for span in (span for span in spans if span.startswith(f"{PROGRAM} ")):
        words = [word for word in span.split()[1:] if word not in {"…", "..."}]
        if not words or words[0].isupper() or words[0] == "--help":
            continue
        command, rest = command_of(words)
        assert command.name == words[0] or words[0] in {"devices"}, f"{span}: there is no such command"
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= known, f"{span}: there is no such option"


def test_a_wrong_command_is_noticed() -> None:
    assert not why_not(["build", "--device", "raspberry-pi-5", "-o", "out"])
    assert "--deice" in why_not(["build", "--deice", "raspberry-pi-5", "-o", "out"])
    assert "--device" in why_not(["build", "-o", "out"])
    assert "bulid" in why_not(["bulid", "-o", "out"])
    assert words_of("IMPQ_EXTRAS= scripts/with-venv impq-edge plan --model demo  # a remark") == [
        "plan",
        "--model",
        "demo",
    ]
    assert not why_not(["--help"]) and not why_not(["devices", "show", "raspberry-pi-5"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_commands_name_are_there(page: Path) -> None:
    spans = [token.content for token in inline(page) if token.type == "code_inline"]
    rooms = "tools|scripts|tests|impq_edge|docs|devices|profiles"
    for text in (*code_in(page), *spans):
        for path in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./-]*\w", text):
            # Pages on the code name its files within their room.
            assert (ROOT / path).exists() or (ROOT / "impq_edge" / path).exists(), f"{path} is not there"


# The workflow.


def steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_commands_that_exist() -> None:
    found = [words for step in steps() for line in lines_of(step.get("run", "")) if (words := words_of(line))]
    assert {words[0] for words in found} >= {"release", "verify"}
    for words in found:
        assert not (wrong := why_not(words)), f"{PROGRAM} {shlex.join(words)}: {wrong}"


def test_the_workflow_is_one_and_its_parts_belong_together() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    assert set(workflow[True]) & {"push", "workflow_dispatch"}  # YAML reads `on` as true
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", step.get("uses", "a/b@v1")), "pin an action's major version"
    used = [step.get("uses", "") for step in steps()]
    for action in ("actions/checkout", "actions/setup-python", "actions/cache", "actions/upload-artifact"):
        assert any(name.startswith(action) for name in used), f"{action} is missing"


def test_the_release_of_the_example_is_one(tmp_path: Path) -> None:
    [block] = [t.content for t in tokens(WORKFLOW.parent / "README.md") if t.info == "toml"]
    (tmp_path / "release.toml").write_text(block, "utf-8")
    asked = load_order(tmp_path / "release.toml")
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))["env"]
    assert [(m.model, m.revision, m.profile) for m in asked.models] == [
        (workflow["MODEL"], workflow["REVISION"], workflow["PROFILE"])
    ]


# Devices.


def fields_in(page: Path) -> set[str]:
    """Return what stands as code in the first column of a page's tables."""
    return {found[1] for found in re.finditer(r"^\| `([\w.]+)`", page.read_text("utf-8"), re.MULTILINE)}


def test_every_field_of_a_device_is_told() -> None:
    wanted = {field.name for field in dataclasses.fields(DeviceProfile)} - {"identify"}
    wanted |= {f"identify.{field.name}" for field in dataclasses.fields(Identity)}
    assert fields_in(DOCS / "devices.md") == wanted


def test_the_example_of_a_device_loads(tmp_path: Path) -> None:
    blocks = [t.content for t in tokens(DOCS / "devices.md") if t.type == "fence" and t.info == "toml"]
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block, "utf-8")
        load_device(str(path))


# Guides.


@pytest.mark.parametrize("page", ["adding-a-backend.md", "adding-an-architecture.md", "../CONTRIBUTING.md"])
def test_named_symbols_exist(page: str) -> None:
    """`room.module.symbol` in a guide is a name of the package, and `tests/…::test` a test."""
    spans = [token.content for token in inline(DOCS / page) if token.type == "code_inline"]
    dotted = [span for span in spans if re.fullmatch(r"impq_edge(\.\w+)+", span)]
    assert dotted or page == "../CONTRIBUTING.md"
    for span in dotted:
        assert symbol_exists(span), f"{span} is not there"
    for span in spans:
        if match := re.fullmatch(r"(tests/\S+\.py)::(\w+)", span):
            assert f"def {match[2]}(" in (ROOT / match[1]).read_text("utf-8"), f"{span} is not there"


def test_the_backend_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from impq_edge import backends

    [code] = [token.content for token in tokens(DOCS / "adding-a-backend.md") if token.info == "python"]
    (tmp_path / "extremes_of_the_guide.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backends._CLASSES, "extremes", ("extremes_of_the_guide", "Extremes"))
    backend = backends.load_backend("extremes", shrink=0.9)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    coarse, fine = (backend.quantise(weight, bits) for bits in backends.BITS)
    assert 0 < (fine.weight - weight).square().mean() < (coarse.weight - weight).square().mean() < 0.5
    assert (coarse.bits_per_weight, fine.bits_per_weight) == (3, 5)
    assert all(len(row.unique()) <= 4 for row in coarse.weight)
    assert backends.describe("extremes", backend)["shrink"] == 0.9
    with pytest.raises(errors.BackendError, match="shrink is 0"):
        backends.load_backend("extremes", shrink=0)


def test_formats_in_concepts_are_those_of_files() -> None:
    from impq_edge.ggml.types import LADDER

    page = (DOCS / "concepts.md").read_text("utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| Q")]
    told = {int(row[1]): (row[0].lower(), int(row[4]), float(row[5])) for row in rows}
    assert told == {bits: (str(kind), kind.block_bytes, kind.bits_per_weight) for bits, kind in LADDER.items()}


def symbol_exists(dotted: str) -> bool:
    """Look a module, or a name at the top of one or of a class, up in the source; nothing is imported for it."""
    place, names = ROOT, dotted.split(".")
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    file = place / "__init__.py"
    if names and (place / f"{names[0]}.py").is_file():
        file = place / f"{names.pop(0)}.py"
    body = ast.parse(file.read_text("utf-8")).body
    for name in names:
        found = [node for node in body if name in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_a_symbol_that_is_gone_is_noticed() -> None:
    for there in ("impq_edge.backends.hqq.Hqq", "impq_edge.model.config.HyperParameters.expected_shapes", "impq_edge"):
        assert symbol_exists(there)
    for gone in ("impq_edge.backends.hqq.Hqqq", "impq_edge.model.config.HyperParameters.shapes", "impq_edge.no.such"):
        assert not symbol_exists(gone)


# Errors.


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Return every node of the package's source with its file."""
    return [(name_of(path), node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))]


@functools.cache
def error_names() -> set[str]:
    """Return the names of all classes of errors, also of those that are beside the code that raises them."""
    names = {"ImpqError"}
    found = [node for _, node in nodes() if isinstance(node, ast.ClassDef)]
    while more := {n.name for n in found if names & {ast.unparse(base) for base in n.bases}} - names:
        names |= more
    return names


@functools.cache
def messages() -> dict[str, list[tuple[str, str]]]:
    """Return class → (file, message) of every error that the package makes; `…` where a value goes."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in error_names()}
    for path, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found and node.args:
            found[node.func.id].append((path, template(node.args[0])))
    return found


def template(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def strings() -> str:
    """Return every text of the package, where messages are put together from parts."""
    return "\n".join(template(node) for _, node in nodes() if isinstance(node, ast.Constant | ast.JoinedStr))


def quoted() -> list[str]:
    """Return the messages that troubleshooting quotes: the first column of its tables."""
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    return [match[1] for match in re.finditer(r"^\| `([^`]+)`", page, re.MULTILINE)]


def test_every_message_that_troubleshooting_quotes_can_be_raised() -> None:
    texts = strings()
    assert len(quoted()) > 50
    unsaid = [message for message in quoted() if not re.search(pattern_of(message), texts)]
    assert not unsaid, f"nothing says {unsaid}"


def pattern_of(message: str) -> str:
    return r"[^\n]*?".join(re.escape(part.strip()) for part in message.split("…") if part.strip())


def is_told(message: str) -> bool:
    return any(re.search(pattern_of(told), message) for told in quoted())


@pytest.mark.parametrize("kind", sorted(error_names() - {"ImpqError"}))
def test_every_class_of_error_is_told(kind: str) -> None:
    assert any(is_told(message) for _, message in messages()[kind]), f"no {kind} is in docs/troubleshooting.md"
    assert f"`{kind}`" in (DOCS / "troubleshooting.md").read_text("utf-8")


def test_every_room_that_raises_a_class_of_errors_is_told() -> None:
    """One message each at least, of those whose text stands where they are raised; the study's are for maintainers."""
    told: dict[tuple[str, str], bool] = {}
    for kind, found in messages().items():
        for path, message in found:
            room = Path(path).parts[1]
            if len(re.findall(r"\w+", message)) > 1 and room != "study":  # more than "… for …: …"
                told[room, kind] = told.get((room, kind), False) or is_told(message)
    lost = sorted(" of ".join(reversed(key)) for key, is_there in told.items() if not is_there)
    assert not lost, f"docs/troubleshooting.md tells no {', no '.join(lost)}"


def test_exit_codes_are_told() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    for code in (0, errors.EXIT_CHECK_FAILED, 2, errors.EXIT_BAD_INPUT, 130):
        assert f"| {code} |" in page
