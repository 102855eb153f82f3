"""The wheel of this very package, from a checkout or as installed, made without a build tool or the network.

It holds what validation needs: the code, the devices and the texts, not the demo model. Its version carries a
hash of its content, so that a changed checkout is another version; the same content gives the same bytes.

Run as ``python -m impq_edge.validation.remote.wheel DIR``, it prints the path of the wheel it wrote.
"""

import base64
import hashlib
import re
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import impq_edge
from impq_edge.validation.remote.agent import content_sha256, package_files

PACKAGE = Path(impq_edge.__file__).parent
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first time a zip file knows
_HASH_CHARACTERS = 12


def build_wheel(folder: Path) -> Path:
    """Write the wheel into a directory and return its path."""
    content = content_sha256(PACKAGE)
    version = f"{impq_edge.__version__}+{content[:_HASH_CHARACTERS]}"
    info = f"impq_edge-{version}.dist-info"
    members = {f"impq_edge/{name}": path.read_bytes() for name, path in package_files(PACKAGE).items()}
    members |= {
        f"{info}/METADATA": _metadata(version).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: impq-edge\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nimpq-edge = impq_edge.cli:main\n",
    }
    rows = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in members.items()]
    members[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    path = folder / f"impq_edge-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in members.items():
            wheel.writestr(zipfile.ZipInfo(name, _EARLIEST), data, zipfile.ZIP_DEFLATED)
    return path


def _metadata(version: str) -> str:
    lines = ["Metadata-Version: 2.1", "Name: impq-edge", f"Version: {version}", "Requires-Python: >=3.11"]
    return "\n".join([*lines, *(f"Requires-Dist: {requirement}" for requirement in base_requirements()), ""])


def base_requirements() -> list[str]:
    """Return what the base install depends on, from the checkout's own file or the installed package's."""
    project = PACKAGE.parent / "pyproject.toml"
    if project.exists():
        found = tomllib.loads(project.read_text("utf-8"))["project"]
        if found.get("name") == "impq-edge":
            return list(found["dependencies"])
    return [line for line in metadata.requires("impq-edge") or [] if not re.search(r"\bextra\b", line)]


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


if __name__ == "__main__":
    print(build_wheel(Path(sys.argv[1])))
