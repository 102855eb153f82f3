"""The stage: a GGUF here → a :class:`ValidationReport` from another machine."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import ImpqError, RecordError, ValidationError
from impq_edge.records import parse, shown
from impq_edge.validation.file import read_facts
from impq_edge.validation.process import Progress
from impq_edge.validation.remote.environment import (
    Agree,
    Prepared,
    ensure_environment,
    read_prepared,
    wanted_environment,
)
from impq_edge.validation.remote.files import Item, copy_items, hash_items, mib
from impq_edge.validation.remote.host import Host, ask_host
from impq_edge.validation.remote.jobs import follow
from impq_edge.validation.remote.room import check_disk, check_memory
from impq_edge.validation.remote.ssh import Connection, ConnectionLostError, Say
from impq_edge.validation.report import ValidationReport

Clean = Literal["nothing", "files", "all"]
"""What to remove there afterwards: nothing, the files of this validation, or the environment too."""


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be measured there."""

    file_sha256: str
    items: tuple[Item, ...]
    request: dict[str, Any]


def validate_on(
    host: str,
    path: Path,
    *,
    device: str | None = None,
    text: Path | None = None,
    reference: Path | None = None,
    options: Mapping[str, Any] | None = None,
    wheels: Path | None = None,
    python: str | None = None,
    ssh: str = "ssh",
    clean: Clean = "nothing",
    agree: Agree = lambda _question: False,
    say: Say = lambda _sentence: None,
    progress: Progress = lambda _stage, _done, _total: None,
) -> ValidationReport:
    """Do on another machine what :func:`impq_edge.validate` does on this one.

    Parameters
    ----------
    host
        As ssh takes it: ``user@host``, or a name of the user's configuration.
    path, text, reference
        Files here; they are copied there, once each.
    device
        A device's name, or the path of a TOML here.
    options
        Further arguments of :func:`impq_edge.validate` by name, such as ``windows`` and ``context_tokens``.
    wheels
        A directory of wheels to install there; None: from the package index, which the machine asks itself.
    python
        The Python to use there; None: the first that is new enough.
    ssh
        The ssh to use, with options, such as ``ssh -p 2222``.
    clean
        What to remove there afterwards. After a broken connection or Ctrl-C everything stays, to go on from.
    agree
        Asked before llama.cpp is compiled there.
    say
        Hears sentences about what is being done.
    progress
        Called with the stage, what is done and what there is.

    Raises
    ------
    ValidationError
        As :func:`impq_edge.validate`; and when the machine cannot be reached, has no Python that will do, too
        little memory or disk, or the environment cannot be made; ConnectionLostError when the connection breaks.
    DeviceError
        When the device is unknown or malformed.
    """
    facts = read_facts(path)
    reference_files = () if reference is None else read_facts(reference).files
    profile = None if device is None else load_device(device)
    options = dict(options or {})
    with Connection(host, ssh) as connection, tempfile.TemporaryDirectory() as folder:
        there = ask_host(connection, python)
        say(str(there))
        check_memory(there, path, facts, profile, options.get("context_tokens"), options.get("kv_type"), say)
        environment = wanted_environment(there, wheels, Path(folder))
        task = _task(facts.files, reference_files, text, _device(device, profile), options, progress)
        prepared = _prepare(connection, there, environment.content, environment.carried_sha256, task.items)
        try:
            chosen = ensure_environment(connection, there, environment, prepared, agree, progress, say)
            _copy(connection, there, task, prepared.present, progress, say)
            request = {**task.request, "python": chosen, "content": environment.content}
            answer = follow(connection, there.python, request, progress, say)
            report = _report(there, answer)
            damaged = report.sha256 != task.file_sha256
        except ConnectionLostError:
            raise
        except ImpqError:
            _clean(connection, there, clean, task, prepared.cache, say)
            raise
        _clean(connection, there, "files" if damaged and clean == "nothing" else clean, task, prepared.cache, say)
    if damaged:
        raise ValidationError(
            f"The copy of {path.name} on {host} has sha256 {report.sha256}, not {task.file_sha256}; its disk may be "
            "failing. The copy was removed; run the same command again."
        )
    return report


def _device(name: str | None, profile: DeviceProfile | None) -> str | Path | None:
    """Return a device of one's own as its path, a shipped one by its name: the other side has it too."""
    return None if profile is None or name is None else (name if name == profile.name else Path(name))


def _task(
    files: tuple[Path, ...],
    reference: tuple[Path, ...],
    text: Path | None,
    device: str | Path | None,
    options: dict[str, Any],
    progress: Progress,
) -> _Task:
    """Hash all inputs and name them as they will lie there."""
    own_device = [device] if isinstance(device, Path) else []
    kinds = {"file": files, "reference": reference, "text": [text] if text else [], "device": own_device}
    hashed = {kind: hash_items(kind, paths, progress) for kind, paths in kinds.items() if paths}
    first = {kind: items[0].name for kind, (_, items) in hashed.items()}
    all_items = tuple(item for _, items in hashed.values() for item in items)
    request = {
        "kind": "validate",
        "inputs": {item.name: item.sha256 for item in all_items},
        "file": first["file"],
        "reference": first.get("reference"),
        "text": first.get("text"),
        "device": first.get("device", device),
        "options": options,
    }
    return _Task(hashed["file"][0], all_items, request)


def _prepare(
    connection: Connection, there: Host, content: str, wheels: list[str] | None, items: tuple[Item, ...]
) -> Prepared:
    """Ask what is there already, and refuse a disk that is too small for the rest."""
    request = {"op": "prepare", "content": content, "wheels": wheels, "objects": [item.sha256 for item in items]}
    found = read_prepared(connection.ask(there.python, request, lambda *_: None, lambda _: None), there)
    missing_bytes = sum(max(0, item.size_bytes - found.present.get(item.sha256, 0)) for item in items)
    check_disk(there.name, found.free_bytes, missing_bytes, not found.python and not found.renewable, found.cache)
    return found


def _copy(
    connection: Connection, there: Host, task: _Task, present: dict[str, int], progress: Progress, say: Say
) -> None:
    missing = [item for item in task.items if present.get(item.sha256, 0) < item.size_bytes]
    held_bytes = sum(present.get(item.sha256, 0) for item in missing)
    if missing:
        names = ", ".join(item.path.name for item in missing)
        kept = f"; {mib(held_bytes)} MiB of that are there from before" if held_bytes else ""
        say(f"Copying {names} to {there.name}, {mib(sum(item.size_bytes for item in missing))} MiB{kept}.")
    copy_items(connection, there.python, task.items, progress, say)


def _report(there: Host, answer: Any) -> ValidationReport:
    """Check what came back as what any file holds is checked."""
    data = dict(answer) if isinstance(answer, dict) else {}
    schema = data.pop("schema", None)
    if schema != ValidationReport.SCHEMA:
        raise RecordError(
            f"{there.name} sent {shown(schema)}, not {ValidationReport.SCHEMA!r}; use --remote-clean all."
        )
    return parse(ValidationReport, data, Path(f"the report of {there.name}"))


def _clean(connection: Connection, there: Host, what: Clean, task: _Task, where: str, say: Say) -> None:
    if what == "nothing":
        say(f"{there.name}:{where} keeps the environment and the files for the next time; see --remote-clean.")
        return
    request = {"op": "clean", "what": what, "objects": [item.sha256 for item in task.items]}
    if connection.ask(there.python, request, lambda *_: None, say) == "in use":
        say(f"{there.name}:{where} was not removed: another job is running there.")
