"""What Linux tells of a process's memory (``/proc/PID/status``)."""

import re
from pathlib import Path


def status_bytes(key: str, pid: int | str = "self") -> int | None:
    """Return a field such as ``VmHWM`` in bytes; None where the system or the process does not have it.

    Parameters
    ----------
    key
        ``VmHWM``: the most it has held, mapped files included. ``RssAnon``: what it holds and no file backs.
        ``VmData``: what it has set aside for data, used or not.
    pid
        Another process's number.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text("utf-8", errors="replace")
    except (OSError, ValueError):  # no such file system, or no such process
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
