"""What goes to the other machine: files by their content, each copied once, and on from where a copy stopped."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from impq_edge.errors import ValidationError
from impq_edge.validation.process import Progress
from impq_edge.validation.remote.agent import PART_BYTES
from impq_edge.validation.remote.ssh import Connection, ConnectionLostError, Say

_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Item:
    """One file to be there."""

    name: str  # its place among a job's inputs, such as "file/llama.gguf"
    path: Path
    sha256: str
    size_bytes: int


def hash_items(kind: str, paths: Sequence[Path], progress: Progress) -> tuple[str, tuple[Item, ...]]:
    """Hash the pieces of one file, each by itself and, as a report names it, all together.

    Parameters
    ----------
    kind
        The directory of a job's inputs that they are to lie in, under their own names.

    Raises
    ------
    ValidationError
        When a file cannot be read.
    """
    whole, items, done = hashlib.sha256(), [], 0
    try:
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            piece, before = hashlib.sha256(), done
            with path.open("rb") as file:
                while data := file.read(_CHUNK_BYTES):
                    piece.update(data)
                    whole.update(data)
                    done += len(data)
                    progress("hash", done, max(total, done))
            items.append(Item(f"{kind}/{path.name}", path, piece.hexdigest(), done - before))
    except OSError as error:
        raise ValidationError(f"{error.filename} cannot be read: {error.strerror}; check the file.") from None
    return whole.hexdigest(), tuple(items)


def copy_items(connection: Connection, python: str, items: Iterable[Item], progress: Progress, say: Say) -> None:
    """Bring all files there that are not there yet.

    Raises
    ------
    ConnectionLostError
        With how much is there, and how to go on.
    ValidationError
        When the disk there is full, or a file changed while it was copied.
    """
    done_bytes = 0

    def advance(phase: str, done: int, total: int) -> None:
        nonlocal done_bytes
        done_bytes = done
        progress(phase, done, total)

    for item in {item.sha256: item for item in items}.values():
        done_bytes = 0
        try:
            _copy(connection, python, item, advance, say)
        except ConnectionLostError:
            raise ConnectionLostError(
                f"The connection to {connection.host} was lost with {mib(done_bytes)} of {mib(item.size_bytes)} MiB of "
                f"{item.path.name} copied; run the same command again, which copies only the rest."
            ) from None


def _copy(connection: Connection, python: str, item: Item, progress: Progress, say: Say) -> None:
    request = {"op": "receive", "sha256": item.sha256, "size_bytes": item.size_bytes}
    with connection.talk(python, request) as conversation:
        kind, parts = conversation.expect({"parts", "result"}, progress, say)
        if kind == "result":  # it is there
            return
        if not isinstance(parts, list):
            raise conversation.nonsense()
        with item.path.open("rb") as file:
            kept = _same_parts(file, parts)
            conversation.write(f"{kept}\n".encode())
            file.seek(kept * PART_BYTES)
            left = item.size_bytes - kept * PART_BYTES
            while left > 0:
                data = file.read(min(_CHUNK_BYTES, left))
                if not data:
                    raise ValidationError(
                        f"{item.path} became shorter while it was copied; run the same command again."
                    )
                conversation.write(data)
                conversation.heed(progress, say)
                left -= len(data)
        conversation.result(progress, say)


def _same_parts(file: BinaryIO, parts: Sequence[object]) -> int:
    """Return how many parts from the start are there as they are here."""
    for index, theirs in enumerate(parts):
        data = file.read(PART_BYTES)
        if len(data) < PART_BYTES or hashlib.sha256(data).hexdigest() != theirs:
            return index
    return len(parts)


def mib(size_bytes: int) -> str:
    """Return a size for people, in MiB."""
    return f"{size_bytes / 2**20:,.1f}"
