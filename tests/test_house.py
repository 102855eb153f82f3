"""The house rules that a machine can check: imports point one way, and the base install needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "impq_edge"

ROOMS = [
    "errors", "records", "lock", "data", "ggml", "model", "devices", "backends", "impq", "spqe", "study", "conversion",
    "validation", "stages", "releases", "console", "cli",
]  # fmt: skip
HEAVY = {"torch": {"model/load.py", "backends", "spqe", "study", "conversion/calibrated.py",
                   "releases/preview.py", "releases/build.py", "stages"},
         "transformers": {"model/load.py"}, "llama_cpp": {"validation"}, "rich": {"console.py"},
         "typer": {"cli.py"}, "click": set()}  # fmt: skip
BASE = ["impq_edge", "impq_edge.cli", "impq_edge.devices.memory", "impq_edge.model.spec", "impq_edge.model.recipe",
        "impq_edge.stages.planning", "impq_edge.validation.validate", "impq_edge.validation.doctor",
        "impq_edge.validation.calibration", "impq_edge.validation.shapes",
        "impq_edge.validation.remote.run"]  # fmt: skip


def imports(path: Path, *, of_types: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = set()
    if not of_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {id(child) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "impq_edge" else {f"impq_edge.{a.name}" for a in node.names}
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "impq_edge" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    place = path.relative_to(PACKAGE)
    for name in imports(path, of_types=False):
        allowed = HEAVY.get(name.split(".")[0])
        assert allowed is None or str(place) in allowed or place.parts[0] in allowed, f"{place} imports {name}"


RUNS_CODE = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "imp", "eval", "exec",
    "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec",
}  # fmt: skip
JUSTIFIED = {
    # The package's own modules by names written beside the call, so that heavy ones are imported late.
    ("__init__.py", "import_module"), ("stages/__init__.py", "import_module"),
    ("backends/__init__.py", "import_module"),
    # The other machine's process becomes the Python that was asked for.
    ("validation/remote/agent.py", "execve"),
    # A loader that makes texts of everything and knows no tags; see the class.
    ("conversion/card.py", "yaml.load"),
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [*modules(), PACKAGE / "__init__.py", *sorted((PACKAGE.parent / "tools").glob("*.py"))],
    ids=lambda p: str(p.relative_to(PACKAGE.parent)),
)
def test_nothing_that_is_read_can_run(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else path.name
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(path)} & RUNS_CODE
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in RUNS_CODE, f"{place}: {name}"
        for setting, wanted in (("shell", "False"), ("trust_remote_code", "False"), ("allow_pickle", "False")):
            assert given.get(setting, wanted) == wanted, f"{place}: {name}({setting}=…)"
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{place}: {name}"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") or last in ("import_module", "execve"):
            known = name if name.startswith("yaml") else last
            assert (place, known) in JUSTIFIED, f"{place}: {name} is not justified"


def test_the_base_install_needs_no_workstation_library() -> None:
    blocked = ["torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "scipy", "qpsolvers", "hqq"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); " + "; ".join(f"import {name}" for name in BASE)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_nothing() -> None:
    code = "import sys, impq_edge; print([m for m in ('numpy', 'rich', 'torch', 'llama_cpp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
