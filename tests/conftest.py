"""What many tests share: random checkpoints and their files, and the trained models."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import ARCHITECTURES, TINY, make_checkpoint
from hypothesis import settings

# The same examples every time, however slow the machine: what passes here passes elsewhere.
# `--hypothesis-profile search` looks for others.
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("repeat")

TRAINED = Path(__file__).parents[2] / "shared" / "models"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture → directory of a random checkpoint with 3 blocks of hidden size 256."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / f"random-{name}", name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained model that ships with the package."""
    from impq_edge.data import data_path

    return data_path("demo", "tiny-llama3")


@pytest.fixture(scope="session")
def trained(demo: Path) -> Callable[[str], Path]:
    """Architecture → directory of a trained tiny model, skipping where it is not there."""

    def find(architecture: str) -> Path:
        path = demo if architecture == "llama" else TRAINED / TINY[architecture]
        if not path.is_dir():
            pytest.skip(f"the trained {TINY[architecture]} is not at {path}")
        return path

    return find


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty disk with the options given, such as ``size=1m``; called again, it changes them."""
    place = tmp_path / "small"

    def mount(options: str) -> Path:
        options = f"remount,{options}" if place.exists() else options
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let us mount a small file system")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="session")
def tiny_ggufs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture → F16 GGUF of the random checkpoint."""
    root = tmp_path_factory.mktemp("ggufs")
    return {name: _converted(path, root / f"{name}.gguf", "f16") for name, path in checkpoints.items()}


@pytest.fixture(scope="session")
def demo_gguf(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with every block at 4 bit."""
    return _converted(demo, tmp_path_factory.mktemp("demo") / "demo-q4_k.gguf", "q4_k")


def _converted(directory: Path, out: Path, kind: str) -> Path:
    import impq_edge
    from impq_edge.conversion.encoder import EncodeOptions

    impq_edge.convert(str(directory), type=kind, out=out, encode=EncodeOptions("rtn"))  # which takes no calibration
    return out
