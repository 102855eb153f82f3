"""A control group of one's own: the kernel then holds a process and its children to a limit of memory.

What counts is what they use and the pages of files that they were the first to read; the kernel drops such pages to
stay within the limit, and kills the process when nothing is left to drop (Linux, Documentation/admin-guide:
cgroup-v2.rst and cgroup-v1/memory.rst).
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from impq_edge.records import is_running

_PREFIX = "impq-edge"
_MARKS = ("user.delegate", "trusted.delegate")  # what systemd sets on a group whose inside it leaves to others
_REMOVAL_S = 1.0
_NO_LIMIT = "max"


@dataclass(frozen=True)
class Place:
    """A group in which others may be made."""

    directory: Path
    version: int  # of the interface: 1 or 2


@dataclass(frozen=True)
class Group:
    """A group with a limit."""

    directory: Path
    version: int

    def add(self, pid: int) -> None:
        """Put a process into the group; what it has used so far stays where it was counted."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed for the limit."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        found = re.search(r"^oom_kill (\d+)$", _text(self.directory / name), re.MULTILINE)
        return int(found[1]) if found else 0

    def remove(self) -> None:
        """Kill what is still in the group, and remove it."""
        deadline = time.monotonic() + _REMOVAL_S
        while True:
            for pid in _text(self.directory / "cgroup.procs").split():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.directory.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # busy until the last process is gone
                if time.monotonic() > deadline:
                    return  # an empty group does no harm; a later one removes it
                time.sleep(0.01)
            else:
                return


def find_place(root: Path = Path("/")) -> Place | None:
    """Return where this process may make groups; None: nowhere.

    A place must be its own to divide. To an ordinary user it is where the directory may be written, which is how
    control groups are delegated. root may write every directory, also those that a service manager or a container
    engine keeps its own processes in, so for root it must bear systemd's mark of delegation.

    Parameters
    ----------
    root
        Where ``proc`` is.
    """
    if sys.platform != "linux":
        return None
    groups = _own_groups(_text(root / "proc/self/cgroup"))
    mounts = _mounts(_text(root / "proc/self/mountinfo"))
    for version in (2, 1):
        if version in groups and version in mounts:
            inside, mounted = mounts[version]
            own = _directory(groups[version], inside, mounted)
            place = own and (_place_v2(own, mounted) if version == 2 else _place_v1(own))
            if place:
                return place
    return None


@contextlib.contextmanager
def group(place: Place, limit_bytes: int) -> Iterator[Group]:
    """Make a group with a limit of memory and none of swap, and remove it with all that is in it.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    _remove_stale(place.directory)
    made = Group(place.directory / f"{_PREFIX}.{os.getpid()}.{time.monotonic_ns()}", place.version)
    made.directory.mkdir()
    try:
        _limit(made, limit_bytes)
        yield made
    finally:
        made.remove()


def _limit(made: Group, limit_bytes: int) -> None:
    # Swap would let a process hold more than the device has. Kernels without swap accounting have no such file.
    if made.version == 2:
        (made.directory / "memory.max").write_text(str(limit_bytes))
        swap, allowed = made.directory / "memory.swap.max", 0
    else:
        (made.directory / "memory.limit_in_bytes").write_text(str(limit_bytes))
        swap, allowed = made.directory / "memory.memsw.limit_in_bytes", limit_bytes
    if swap.exists():
        swap.write_text(str(allowed))


def _own_groups(text: str) -> dict[int, str]:
    """Return this process's group in version 2 and in version 1's memory hierarchy."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            found[2] = path
        elif "memory" in controllers.split(","):
            found[1] = path
    return found


def _mounts(text: str) -> dict[int, tuple[str, Path]]:
    """Return, for each version, what of the hierarchy is mounted and where (proc_pid_mountinfo(5))."""
    found: dict[int, tuple[str, Path]] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version == 2 or (version == 1 and "memory" in kind[2].split(",")):
            found[version] = (_unescaped(fields[3]), Path(_unescaped(fields[4])))
    return found


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _directory(group_path: str, inside: str, mounted: Path) -> Path | None:
    """Return the directory of a group; None where the mount does not show it."""
    if ".." in group_path.split("/"):  # a group outside this name space
        return None
    shown = "" if inside == "/" else inside
    if shown and not (group_path + "/").startswith(shown + "/"):
        return None
    return mounted / group_path[len(shown) :].lstrip("/")


def _place_v1(own: Path) -> Place | None:
    return Place(own, 1) if _may_divide(own) else None


def _place_v2(own: Path, mounted: Path) -> Place | None:
    """Return a group that hands the memory controller on: a group with processes in it cannot, so it is the parent."""
    if "memory" in _text(own / "cgroup.subtree_control").split():
        return Place(own, 2) if _may_divide(own) else None
    parent = own.parent
    if own == mounted or "memory" not in _text(parent / "cgroup.subtree_control").split():
        return None
    limited = _text(own / "memory.max").strip() not in {"", _NO_LIMIT}  # beside it, that limit would not hold
    return Place(parent, 2) if _may_divide(parent) and not limited else None


def _may_divide(directory: Path) -> bool:
    if not os.access(directory, os.W_OK | os.X_OK) or not os.access(directory / "cgroup.procs", os.W_OK):
        return False
    return os.geteuid() != 0 or any(_mark(directory, name) == b"1" for name in _MARKS)


def _mark(directory: Path, name: str) -> bytes:
    try:
        return os.getxattr(directory, name)
    except OSError:
        return b""


def _remove_stale(directory: Path) -> None:
    """Remove the groups of processes that were killed before they could."""
    for stale in directory.glob(f"{_PREFIX}.*.*"):
        pid = stale.name.split(".")[1]
        if pid.isdecimal() and not is_running(int(pid)):
            with contextlib.suppress(OSError):
                stale.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
