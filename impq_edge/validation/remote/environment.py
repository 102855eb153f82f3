"""The environment on the other machine: this very package and what it needs, installed once and renewed by content."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from impq_edge.errors import ValidationError
from impq_edge.records import STRICT, parse
from impq_edge.validation.process import Progress
from impq_edge.validation.remote.agent import content_sha256
from impq_edge.validation.remote.files import Item, copy_items, hash_items, mib
from impq_edge.validation.remote.host import Host
from impq_edge.validation.remote.jobs import follow
from impq_edge.validation.remote.ssh import Connection, Say
from impq_edge.validation.remote.wheel import PACKAGE, build_wheel

Agree = Callable[[str], bool]
"""Called with a question; returns whether the answer is yes."""

_INDEX_PACKAGES = 22  # what the base install takes from the index today; only the progress counts on it
Size = Annotated[int, pydantic.Field(ge=0, lt=2**62)]
_LLAMA = re.compile(r"llama_cpp_python-", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Environment:
    """What is to be installed there."""

    content: str  # hash of this package
    own: Item  # its wheel
    carried: tuple[Item, ...] | None  # everything else; None: from the package index

    @property
    def carried_sha256(self) -> list[str] | None:
        """What the other side compares with what it has."""
        return None if self.carried is None else sorted(item.sha256 for item in self.carried)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the agent says is there already, as :func:`impq_edge.validation.remote.agent.prepare` gives it."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    cache: str
    free_bytes: Size
    present: dict[str, Size]  # bytes of files by their hash
    python: str | None  # that has this very package
    renewable: bool
    cores: int
    compiler: str | None


def read_prepared(answer: object, host: Host) -> Prepared:
    """Check what another machine answered.

    Raises
    ------
    RecordError
        When it is nothing that the agent says.
    """
    return parse(Prepared, answer, Path(f"the answer of {host.name}"))


def wanted_environment(host: Host, wheels: Path | None, folder: Path) -> Environment:
    """Build this package's wheel and choose among the wheels to carry those that fit the machine.

    Parameters
    ----------
    wheels
        A directory of wheels; None: the other machine asks its package index.
    folder
        Where to put our wheel.

    Raises
    ------
    ValidationError
        When the directory holds no wheel of llama-cpp-python for that machine.
    """
    own = _items([build_wheel(folder)])[0]
    if wheels is None:
        return Environment(content_sha256(PACKAGE), own, None)
    fitting = [path for path in sorted(wheels.glob("*.whl")) if fits(path.name, host.machine, host.python_version)]
    others = [path for path in fitting if not path.name.startswith("impq_edge-")]
    if not any(_LLAMA.match(path.name) for path in others):
        version = ".".join(map(str, host.python_version))
        raise ValidationError(
            f"{wheels} holds no wheel of llama-cpp-python for Python {version} on {host.machine}; collect them with "
            f"scripts/carry-wheels --python {version} {host.machine} DIR."
        )
    return Environment(content_sha256(PACKAGE), own, tuple(_items(others)))


def _items(paths: Sequence[Path]) -> list[Item]:
    return [item for path in paths for item in hash_items("wheels", [path], lambda *_: None)[1]]


def fits(wheel: str, machine: str, python: tuple[int, int]) -> bool:
    """Tell by the tags in a wheel's name (PEP 425) whether it is for a machine and Python; libc is pip's concern.

    Parameters
    ----------
    wheel
        Its file name.
    machine
        As ``uname -m`` says.
    """
    parts = wheel.removesuffix(".whl").split("-")
    if len(parts) < 5:
        return False
    pythons, abis, platforms = (part.split(".") for part in parts[-3:])
    exact = f"cp{python[0]}{python[1]}"
    older = {f"cp{python[0]}{minor}" for minor in range(python[1] + 1)}
    right_python = exact in pythons or "py3" in pythons or ("abi3" in abis and bool(older & set(pythons)))
    return right_python and any(tag == "any" or tag.endswith(f"_{machine}") for tag in platforms)


def ensure_environment(
    connection: Connection,
    host: Host,
    environment: Environment,
    prepared: Prepared,
    agree: Agree,
    progress: Progress,
    say: Say,
) -> str:
    """Install what is not there yet and return the path of the Python that has it.

    Parameters
    ----------
    prepared
        What the other side said it has.
    agree
        Asked before llama.cpp is compiled there.

    Raises
    ------
    ValidationError
        When something cannot be installed, or would have to be compiled and is not to be.
    """
    if prepared.python:
        return prepared.python

    def install(items: tuple[Item, ...], **how: bool) -> dict[str, Any]:
        size_bytes = sum(item.size_bytes for item in items)
        say(f"Installing impq-edge on {host.name}, from {mib(size_bytes)} MiB of wheels to copy.")
        copy_items(connection, host.python, items, progress, say)
        return _install(connection, host, environment, items, how, progress, say)

    everything = (environment.own, *(environment.carried or ()))
    answer = install((environment.own,), renew=True) if prepared.renewable else {"again": "whole"}
    if answer.get("again") == "whole":
        answer = install(everything)
    if answer.get("again") == "compile":
        _ask_to_compile(host, prepared, agree)
        answer = install(everything, compile=True)
    if not isinstance(answer.get("python"), str):
        raise ValidationError(f"{host.name} names no Python for what was installed there; use --remote-clean all.")
    return str(answer["python"])


def _install(
    connection: Connection,
    host: Host,
    environment: Environment,
    items: tuple[Item, ...],
    how: dict[str, bool],
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    request = {
        "kind": "install",
        "inputs": {item.name: item.sha256 for item in items},
        "wheel": environment.own.path.name,
        "wheels": environment.carried_sha256,
        "content": environment.content,
        "expected": _INDEX_PACKAGES if environment.carried is None else len(items),
        "renew": False,
        "compile": False,
        **how,
    }
    answer = follow(connection, host.python, request, progress, say)
    return answer if isinstance(answer, dict) else {}


def _ask_to_compile(host: Host, prepared: Prepared, agree: Agree) -> None:
    carry = f"collect wheels with scripts/carry-wheels {host.machine} DIR and pass --wheels DIR"
    if not prepared.compiler:
        raise ValidationError(
            f"The package index has no wheel of llama-cpp-python for {host.name}, which has no C++ compiler either; "
            f"{carry}, or install one there (Debian: apt-get install g++ make python3-dev)."
        )
    question = (
        f"llama-cpp-python must be compiled on {host.name}, which took 12 minutes on two cores of a server and can "
        f"take an hour on a small board; it has {prepared.cores} cores. Compile it?"
    )
    if not agree(question):
        raise ValidationError(
            f"llama-cpp-python would have to be compiled on {host.name}, which took 12 minutes on two cores of a "
            f"server and can take an hour on a small board: agree with --yes, or {carry}."
        )
