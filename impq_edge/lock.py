"""One run at a time in a directory, and one at a time that makes a file: two would write under each other."""

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from impq_edge.errors import RecordError
from impq_edge.records import is_running, write_error

LOCK_FILE = ".impq-edge.lock"
"""Holds the number of the process that works in the directory; gone when that has ended in an orderly way."""

_TRIES = 100  # in each of which another process would have to begin and end between two system calls

P = ParamSpec("P")
T = TypeVar("T")


def alone(run: Callable[P, T]) -> Callable[P, T]:
    """Give a function the sole use of the directory that it takes as ``out``."""
    return _holding(run, sole_use)


def sole_maker(make: Callable[P, T]) -> Callable[P, T]:
    """Let nobody else make the file that a function takes as ``out``, nor what lies beside it until it is whole."""
    return _holding(make, sole_making)


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
    with _held(directory / LOCK_FILE, directory, "choose another directory"):
        yield


@contextlib.contextmanager
def sole_making(path: Path) -> Iterator[None]:
    """Keep others from making the same file; as :func:`sole_use` for one file, whose directory others may use."""
    if not path.name or path.is_dir():
        raise RecordError(f"{path} is a directory; give the name of a file to write.")
    with _held(path.with_name(f".{path.name}.lock"), path, "choose another -o"):
        yield


def _holding(run: Callable[P, T], hold: Callable[[Path], contextlib.AbstractContextManager[None]]) -> Callable[P, T]:
    @functools.wraps(run)
    def locked(*args: P.args, **given: P.kwargs) -> T:
        with hold(Path(cast(Path | str, given["out"]))):
            return run(*args, **given)

    return locked


@contextlib.contextmanager
def _held(lock: Path, what: Path, otherwise: str) -> Iterator[None]:
    made: list[Path] = []
    try:
        held = _locked(lock, made)
        if held is None:
            raise RecordError(_in_use(what, lock, otherwise))
    except OSError as error:
        raise write_error(what, error) from error
    else:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # of a file system that has become read-only: nobody is kept out by it
                lock.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
            os.close(held)
    finally:
        _remove_empty(made)


def _locked(path: Path, made: list[Path]) -> int | None:
    """Return the open lock file, None where somebody else holds it; folders that had to be made join ``made``."""
    for left in reversed(range(_TRIES)):
        made += [folder for folder in path.parents if folder not in made and not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never through a link, which could lead to a file elsewhere.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
            # Somebody who ended just now removed the directory, which was empty: before the file was made in it, or
            # after mkdir met it and before pathlib asked what it had met.
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file):
                _sign(path, file)
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner ended, and removed it, between the two calls
    return None


def _sign(path: Path, file: int) -> None:
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    except OSError:  # a full disk, which would not hold the rest either
        path.unlink(missing_ok=True)
        raise


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _in_use(what: Path, lock: Path, otherwise: str) -> str:
    try:
        owner = lock.read_bytes()[:20].decode("ascii", "replace").strip()
    except OSError:  # it has ended just now
        owner = ""
    known = owner.isdecimal() and is_running(int(owner))
    who = f"process {owner}" if known else "a process that has just started, or on another machine,"
    return f"{what} is in use by {who}; wait until that has ended, or {otherwise}."


def _remove_empty(folders: list[Path]) -> None:
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()
