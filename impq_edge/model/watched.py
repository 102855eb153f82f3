"""Whether the files of a checkpoint are still those that were hashed: a build reads them for hours.

What a record says of a checkpoint, its hash, is only true of bytes that were read while the file was as it was then. A
file's state (device, inode, size, time of change) tells at no cost that nothing wrote to it; that time cannot be set
back as the time of modification can. A file whose state is another is hashed again.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from impq_edge.errors import ModelError
from impq_edge.records import sha256_file

State = tuple[int, int, int, int, int]

_hashed: dict[str, tuple[State, str]] = {}  # path → its state when it was hashed, and the hash
_lock = threading.Lock()


def file_sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Hash a file once per process and state: stages of one build read the same gigabytes.

    Raises
    ------
    ModelError
        When it cannot be read, or something writes to it meanwhile.
    """
    key, before = _key(path), state_of(path)
    known = _hashed.get(key)
    if known is None or known[0] != before:
        found = _sha256(path, advance)
        if state_of(path) != before:
            raise changed(path)
        known = _hashed[key] = (before, found)
    return known[1]


def require_as_hashed(path: Path) -> None:
    """Refuse what was just read from a file that is no longer as :func:`file_sha256` found it; call it afterwards.

    Raises
    ------
    ModelError
        Naming the file.
    """
    key = _key(path)
    known = _hashed.get(key)
    if known is None or known[0] == state_of(path):
        return
    with _lock:  # threads that read the same file notice at once, and one hashes it
        now = state_of(path)
        if _hashed[key][0] != now:
            if _sha256(path) != known[1] or state_of(path) != now:
                raise changed(path)
            _hashed[key] = (now, known[1])  # touched, linked or copied onto itself


def state_of(path: Path) -> State:
    """Return what changes when anything writes to a file, or another takes its name.

    Raises
    ------
    ModelError
        When there is no such file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def changed(*paths: Path) -> ModelError:
    """Return the error for files that are others than when they were hashed."""
    names = ", ".join(str(path) for path in paths)
    verb = "files of the checkpoint that" if len(paths) > 1 else "a file of the checkpoint, which"
    return ModelError(
        f"{names}: {verb} changed while this command read {'them' if len(paths) > 1 else 'it'}; "
        "let the checkpoint rest and run the same command again."
    )


def _sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    try:
        return sha256_file(path, advance)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path} cannot be read ({error.strerror}); check that the checkpoint is whole.")


def _key(path: Path) -> str:
    return os.path.realpath(path.parent) + os.sep + path.name  # a link to a blob of the hub's cache may lead elsewhere
