"""Name a cross-compiled wheel after the machines that can load it.

Usage: retag_wheel.py WHEEL FOLDER OBJDUMP

The new wheel in FOLDER holds the Python package and its libraries; the second copy of these that llama.cpp's
own installation adds, and its headers, are left out. Its tag, ``manylinux_2_N_aarch64`` (PEP 600), tells pip the
oldest C library with every symbol version that the libraries ask for.
"""

import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = ("llama_cpp/", "llama_cpp_python-")
GLIBCXX_SINCE = {28: 27, 29: 34, 30: 35, 31: 37, 32: 38, 33: 39}
"""Last number of GLIBCXX_3.4.N → the glibc (2.N) of the first distributions with it, as auditwheel's policies pair
them; older ones go with any glibc that Python 3.11 runs on."""

AARCH64_SINCE = 17  # the first glibc that has the architecture


def newest(library: bytes, objdump: str, family: str) -> int:
    """Return the last number of the newest symbol version of a family that an ELF library asks for."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        told = subprocess.run([objdump, "-T", file.name], check=True, capture_output=True, text=True).stdout
    return max((int(found) for found in re.findall(rf"\*UND\*.*\({re.escape(family)}\.(\d+)", told)), default=0)


def entry(name: str, data: bytes) -> str:
    """Return a line of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def main(wheel: Path, folder: Path, objdump: str) -> None:
    """Write the wheel under its right name and say what it needs."""
    with zipfile.ZipFile(wheel) as old:
        files = {name: old.read(name) for name in old.namelist() if name.startswith(PARTS) and not name.endswith("/")}
    libraries = [data for name, data in files.items() if name.endswith(".so")]
    glibc = max(newest(data, objdump, "GLIBC_2") for data in libraries)
    glibcxx = max(newest(data, objdump, "GLIBCXX_3.4") for data in libraries)
    tag = f"py3-none-manylinux_2_{max(glibc, GLIBCXX_SINCE.get(glibcxx, 0), AARCH64_SINCE)}_aarch64"
    info = next(name.removesuffix("WHEEL") for name in files if name.endswith(".dist-info/WHEEL"))
    files[info + "WHEEL"] = re.sub(rb"(?m)^Tag: .*$", b"Tag: " + tag.encode(), files[info + "WHEEL"])
    del files[info + "RECORD"]
    record = "\n".join([*(entry(name, data) for name, data in files.items()), f"{info}RECORD,,", ""])
    target = folder / f"{wheel.name.split('-py3-')[0]}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in [*files.items(), (info + "RECORD", record.encode())]:
            new.writestr(name, data)
    print(f"{target.name} needs glibc 2.{glibc} and libstdc++ with GLIBCXX_3.4.{glibcxx} or newer")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
