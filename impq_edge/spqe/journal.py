"""The losses measured so far, on disk: append-only and checksummed, so that a killed run loses nothing finished."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.records import read_text, shown, shown_text, write_error
from impq_edge.spqe.sampling import Coalition

_SCHEMA = "impq-edge.journal/2"


class Journal:
    """Losses by what they were measured of, kept in a file beside the profile until the profile is whole.

    Parameters
    ----------
    path
        The file; created when missing.
    inputs
        Everything the losses depend on (model, text, backend, settings), as plain JSON values.

    Raises
    ------
    SensitivityError
        When the file was started with other inputs.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        self.path = path
        self.losses: dict[str, NDArray[np.float64]] = {}
        self._header: dict[str, Any] | None = {"schema": _SCHEMA, **inputs}  # written with the first losses
        if path.exists():
            self._resume(dict(inputs))

    def add(self, of: str, losses: NDArray[np.float64]) -> None:
        """Keep the losses of a text's windows, shape (windows,); on disk when this returns."""
        if self._header is not None:
            self._append(self._header)
            self._header = None
        self._append({"of": of, "losses": losses.tolist()})
        self.losses[of] = losses

    def _append(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, ensure_ascii=False)
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                whole_bytes = file.tell()
                try:
                    left = memoryview(line)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except OSError:  # what a full disk took of the line is given back
                    file.truncate(whole_bytes)
                    if not whole_bytes:
                        self.path.unlink()
                    raise
        except OSError as error:
            raise write_error(self.path, error, len(line)) from error

    def _resume(self, inputs: dict[str, Any]) -> None:
        intact, lines = _intact_lines(self.path, read_text(self.path))
        with self.path.open("rb+") as file:  # a torn last line would otherwise swallow the next one
            file.truncate(intact)
        if not lines:  # killed while the very first line was written
            return
        self._header = None
        found = lines[0]
        changed = sorted(key for key in {*found, *inputs} - {"schema"} if found.get(key) != inputs.get(key))
        if changed or found.get("schema") != _SCHEMA:
            key = changed[0] if changed else "schema"
            raise SensitivityError(
                f"{self.path} was started with {shown_text(key)} = {shown(found.get(key))}, not "
                f"{shown(inputs.get(key))}; give the same settings, or delete that file to start anew."
            )
        for number, line in enumerate(lines[1:], start=2):
            match line:
                case {"of": str() as of, "losses": [*losses]} if all(type(loss) is float for loss in losses):
                    self.losses[of] = np.array(losses, dtype=np.float64)
                case _:
                    raise _damaged(self.path, number)


def to_text(coalition: Coalition) -> str:
    """Write a coalition as one digit per block, such as ``"4424"``."""
    return "".join(str(bits) for bits in coalition)


def from_text(text: str) -> Coalition:
    """Read what :func:`to_text` wrote."""
    return tuple(4 if digit == "4" else 2 for digit in text)


def _intact_lines(path: Path, text: str) -> tuple[int, list[dict[str, Any]]]:
    """Return the whole lines, and how many bytes they take; only a last one without its end may be torn."""
    lines: list[dict[str, Any]] = []
    intact_bytes = 0
    for found in re.finditer(r"[^\n]*\n|[^\n]+", text):  # splitlines() would also split at U+2028 inside a text
        line = found.group()
        checksum, _, body = line.rstrip("\n").partition(" ")
        torn = not line.endswith("\n")
        if torn and (lines or _may_begin_a_journal(line)):
            break
        if torn or checksum != f"{zlib.crc32(body.encode()):08x}":
            raise _damaged(path, len(lines) + 1)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise _damaged(path, len(lines) + 1) from None
        if not isinstance(value, dict):
            raise _damaged(path, len(lines) + 1)
        lines.append(value)
        intact_bytes += len(line.encode())
    return intact_bytes, lines


def _damaged(path: Path, line: int) -> SensitivityError:
    return SensitivityError(f"Line {line} of {path} is damaged, or the file is no journal; delete it to start anew.")


def _may_begin_a_journal(text: str) -> bool:
    """Whether ``text`` is what a run may have left that was killed while it wrote the first line."""
    opening = f' {{"schema": "{_SCHEMA}"'
    return set(text[:8]) <= set("0123456789abcdef") and opening.startswith(text[8:][: len(opening)])
