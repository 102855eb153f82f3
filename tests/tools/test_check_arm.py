"""The cross-compiled wheel under emulation; needs Debian's cross compilers and QEMU, and minutes."""

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation.process import run_child
from impq_edge.validation.sample import write_sample
from impq_edge.validation.settings import RunSettings

TOOL = Path(__file__).parents[2] / "tools" / "check_arm.py"
NEEDED = ("qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(any(shutil.which(tool) is None for tool in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool as a module: tools are scripts, in no package."""
    spec = importlib.util.spec_from_file_location("check_arm", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_arm"] = module
    spec.loader.exec_module(module)
    return module


def test_a_file_scores_the_same_on_an_emulated_cortex_a76(demo_gguf: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOL, demo_gguf, "--windows", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "DOTPROD = 1" in done.stderr
    assert len(done.stdout.splitlines()) == 2 + 3


def test_a_processor_without_the_dot_product_gets_a_sentence(tool: ModuleType, tmp_path: Path) -> None:
    arm = tool.prepare("armv8.2-a+dotprod", "cortex-a72")  # a Raspberry Pi 4
    write_sample(tmp_path / "sample.gguf")
    settings = dataclasses.asdict(RunSettings(256, 1))
    job = {"kind": "decode", "file": str(tmp_path / "sample.gguf"), "settings": settings}
    command, environment = [*arm.command(), "-m", "impq_edge.validation.child"], arm.environment()
    code = f"import os; os.execvpe({command[0]!r}, {command!r}, {environment!r})"
    with pytest.raises(ValidationError, match=r"instructions this processor does not run \(SIGILL\)"):
        run_child(job, timeout_s=600, arguments=("-c", code))
