"""What the other machine is, asked with a POSIX shell alone: it may have no Python, or too old a one."""

import dataclasses
import re
import shlex

from impq_edge.errors import ValidationError
from impq_edge.validation.remote.ssh import Connection, plain

LEAST_PYTHON = (3, 11)
_NUMBER = re.compile(r"[0-9]{1,18}")
_NAMES = ("python3", "python3.15", "python3.14", "python3.13", "python3.12", "python3.11", "python")

# Every command's stdin is closed: it would otherwise eat the rest of the script.
_PROBE = r"""
echo impq:begin
echo "impq:machine $(uname -m </dev/null)"
echo "impq:system $(uname -s </dev/null)"
if [ -r /proc/meminfo ]; then
    while read -r key value rest; do
        case $key in MemTotal: | MemAvailable:) echo "impq:$key $value" ;; esac
    done </proc/meminfo
fi
if [ -r /sys/fs/cgroup/memory.max ]; then read -r limit </sys/fs/cgroup/memory.max; echo "impq:limit $limit"; fi
for name in @NAMES@; do
    case $name in '~/'*) name=$HOME/${name#'~/'} ;; esac
    path=$(command -v "$name" 2>/dev/null </dev/null) || continue
    version=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || continue
    echo "impq:python $version $path"
done
echo impq:end
"""


@dataclasses.dataclass(frozen=True)
class Host:
    """The other machine before anything has been put there."""

    name: str  # as ssh is told
    machine: str  # as "uname -m" says, such as aarch64
    system: str
    python: str  # path of the Python that is used
    python_version: tuple[int, int]
    memory_bytes: int | None  # None: it does not say
    available_bytes: int | None

    def __str__(self) -> str:
        version = ".".join(map(str, self.python_version))
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:.1f} GiB of memory"
        free = "" if self.available_bytes is None else f" ({self.available_bytes / 2**30:.1f} free)"
        return f"{self.name}: {self.system} on {self.machine}, Python {version}{memory}{free}."


def ask_host(connection: Connection, python: str | None = None) -> Host:
    """Ask a machine what it is and choose its Python.

    Parameters
    ----------
    python
        The one to use there, a name or path; None: the first that is new enough.

    Raises
    ------
    ValidationError
        When it cannot be reached, gives no shell, or has no Python that will do.
    """
    names = (python,) if python else _NAMES
    said = connection.shell(_PROBE.replace("@NAMES@", " ".join(map(shlex.quote, names))))
    facts = re.findall(r"^impq:(\S+)[ \t]*(.*)$", said, re.MULTILINE)
    if ("end", "") not in facts:
        raise ValidationError(
            f"{connection.host} lets you in but gives no shell ({_first(said)}); it needs a user with a POSIX shell."
        )
    path, version = _choose(connection.host, [value for key, value in facts if key == "python"], python)
    known = dict(facts)
    total = _bytes(known.get("MemTotal:"))
    limit = known.get("limit", "")
    if total is not None and _NUMBER.fullmatch(limit):  # a container's share
        total = min(total, int(limit))
    return Host(
        name=connection.host, machine=plain(known.get("machine", "")), system=plain(known.get("system", "")),
        python=path, python_version=version, memory_bytes=total, available_bytes=_bytes(known.get("MemAvailable:")),
    )  # fmt: skip


def _choose(host: str, found: list[str], asked: str | None) -> tuple[str, tuple[int, int]]:
    pythons = []
    for line in found:
        match = re.fullmatch(r"(\d{1,3})\.(\d{1,3}) (.+)", line)
        if match:
            pythons.append((match[3], (int(match[1]), int(match[2]))))
    for path, version in pythons:
        if version >= LEAST_PYTHON:
            return path, version
    least = ".".join(map(str, LEAST_PYTHON))
    if pythons:
        path, version = max(pythons, key=lambda each: each[1])
        raise ValidationError(
            f"{host} has Python {version[0]}.{version[1]} ({plain(path)}), and {least} is the least; install a newer "
            "one there, and name it with --remote-python."
        )
    what = f"no {plain(asked)!r} that runs" if asked else "no Python on its path"
    raise ValidationError(
        f"{host} has {what}; install Python {least} or newer there (Debian: apt-get install python3-venv), or name "
        "one with --remote-python PATH."
    )


def _bytes(kib: str | None) -> int | None:
    return int(kib) * 1024 if kib and _NUMBER.fullmatch(kib) else None


def _first(said: str) -> str:
    lines = said.strip().splitlines()
    return plain(lines[0]) if lines else "it says nothing"
