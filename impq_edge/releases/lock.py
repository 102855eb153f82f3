"""One run at a time in a directory: two would rename files under each other."""

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from impq_edge.errors import RecordError
from impq_edge.records import is_running

LOCK_FILE = ".impq-edge.lock"
"""Holds the number of the process that works in the directory; gone when that has ended in an orderly way."""

P = ParamSpec("P")
T = TypeVar("T")


def alone(run: Callable[P, T]) -> Callable[P, T]:
    """Give a function the sole use of the directory that it takes as ``out``."""

    @functools.wraps(run)
    def locked(*args: P.args, **given: P.kwargs) -> T:
        with sole_use(cast(Path, given["out"])):
            return run(*args, **given)

    return locked


@contextlib.contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made where there is none.

    The kernel gives the lock up with the process that holds it, however that ends, so that the file a killed one left
    keeps nobody out. Folders that were made and stayed empty are removed again.

    Raises
    ------
    RecordError
        When another process works there, or nothing can be written there.
    """
    path = directory / LOCK_FILE
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = _locked(path)
    except OSError as error:
        _remove_empty(made)
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise RecordError(f"{directory} cannot be written: {why}; choose another output path.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
        os.close(held)
        _remove_empty(made)


def _locked(path: Path) -> int:
    """Return the open lock file."""
    while True:
        # Never through a link, which could lead to a file elsewhere.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 20, 0).decode("ascii", "replace").strip()
            os.close(file)
            raise RecordError(_in_use(path.parent, owner)) from None
        except BaseException:
            os.close(file)
            raise
        if _is_still(path, file):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            return file
        os.close(file)  # its owner ended, and removed it, between the two calls


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _in_use(directory: Path, owner: str) -> str:
    known = owner.isdecimal() and is_running(int(owner))
    who = f"process {owner}" if known else "a process that has just started, or on another machine,"
    return f"{directory} is in use by {who}; wait until that has ended, or choose another directory."


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
