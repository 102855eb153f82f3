"""What this machine says of itself; Linux only, elsewhere little is known."""

import re
from pathlib import Path

_SIZE = re.compile(r"(\d+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cpu_name(root: Path = Path("/")) -> str:
    """Return the processor's or the board's name, or an empty text."""
    found = re.search(r"^model name\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    board = _text(root / "proc/device-tree/model").strip("\0\n ")
    return found[1].strip() if found else board


def cache_bytes(root: Path = Path("/")) -> int:
    """Return the size of the last-level cache, 0 where the system does not say."""
    sizes = [0]
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = _SIZE.fullmatch(_text(path).strip())
        if found:
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
