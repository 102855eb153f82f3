"""Records on disk: frozen dataclasses as JSON, checked on the way in, replaced atomically on the way out."""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import pydantic

from impq_edge.errors import RecordError

T = TypeVar("T")

_HASH_CHUNK_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 30  # a profile of 10^5 evaluations stays far below; more is no text to read as a whole
_MAX_JSON_VALUES = 1 << 22  # twice what the tokenizer of Gemma 3 holds; of the worst kind they take 1.5 GiB
_MAX_FAULTS = 1000  # of one record; pydantic keeps a kilobyte for each
_MAX_TOML_BYTES, _MAX_TOML_DOTS = 1 << 20, 256  # written by hand; tomllib takes the square of a key's parts

_MAX_NAME_BYTES = 128  # half of what file systems take: devices, bits and endings are added

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
"""Set as ``__pydantic_config__`` on every dataclass read from a file: a misspelt key is an error."""


def is_plain_name(name: str) -> bool:
    """Whether a name may become part of a file's: it leads nowhere, hides nothing, and is no option to a program."""
    within = 0 < len(name) <= _MAX_NAME_BYTES and name.isprintable() and len(name.encode()) <= _MAX_NAME_BYTES
    return within and name[0] not in ".-" and not set(name) & {"/", "\\"}


def _plain_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError("that is no name for a file")
    return name


PlainName = Annotated[str, pydantic.AfterValidator(_plain_name)]
"""Of a model, a device or a file, in a record that somebody else may have written."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of everything a stage hands to the next.

    Subclasses are frozen dataclasses that set ``SCHEMA`` to ``"name/version"``. The version grows
    whenever a field changes meaning, and a file of another version is refused by name.
    """

    SCHEMA: ClassVar[str]
    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, the schema first."""
        return {"schema": self.SCHEMA, **_adapter(type(self)).dump_python(self, mode="json")}

    def identity(self) -> str:
        """Hash of the canonical JSON form: the identity by which later records name this one."""
        return sha256_json(self.to_json())

    def save(self, path: Path) -> None:
        """Write the record to ``path``, or leave what was there untouched."""
        text = (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
        with atomic_path(path, len(text)) as temporary:
            temporary.write_bytes(text)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record written by :meth:`save`.

        Raises
        ------
        RecordError
            When the file is missing, is not JSON, has another schema or a field that does not fit.
        """
        loaded: Self = load_one_of(path, cls)
        return loaded


R = TypeVar("R", bound=Record)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def load_one_of(path: Path, *kinds: type[R]) -> R:
    """Read a record of one of several kinds.

    Raises
    ------
    RecordError
        When the file is missing, not JSON, of another schema, or has a wrong field.
    """
    return from_text(read_text(path), path, *kinds)


def from_text(text: str, path: Path, *kinds: type[R]) -> R:
    """Build a record of one of several kinds from its JSON; ``path`` only names the file in messages.

    Raises
    ------
    RecordError
        When the text is not JSON, of another schema, or has a wrong field.
    """
    try:
        data = from_json(text)
        if _HALF_PAIR.search(text):  # an escape can name what no file and no hash can hold
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        told = shown_text(str(error))
        raise RecordError(f"{path} is not JSON ({told}); write it anew with the stage that makes it.") from None
    found = data.pop("schema", None) if isinstance(data, dict) else None
    for kind in kinds:
        if found == kind.SCHEMA:
            return parse(kind, data, path)
    wanted = " or ".join(repr(kind.SCHEMA) for kind in kinds)
    raise RecordError(f"{path} holds schema {shown(found)}, not {wanted}; pass the right file or make it anew.")


def from_json(text: str) -> Any:
    """Read JSON of a bounded number of values: three bytes such as ``[],`` can take seventy of memory.

    Raises
    ------
    ValueError, RecursionError
        When it is none, or holds too many values.
    """
    if text.count(",") + text.count("[") + text.count("{") > _MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {_MAX_JSON_VALUES} values")
    return json.loads(text)


def parse(kind: type[T], data: object, path: Path) -> T:
    """Check plain values against a dataclass and build it; ``path`` only names the file in messages."""
    try:
        checked: T = _adapter(kind).validate_python(data)
        return checked
    except pydantic.ValidationError as error:
        if error.error_count() > _MAX_FAULTS:
            raise RecordError(f"{path} has {error.error_count()} wrong values; write it anew.") from None
        first = error.errors(include_url=False)[0]
        where = shown_text(".".join(str(part) for part in first["loc"]) or "the top level")
        value, wrong = shown(first["input"], 60), shown_text(first["msg"])
        raise RecordError(f"{shown_text(str(path), 300)}: {where} is {value}: {wrong}; correct that field.") from None


def shown(value: object, limit: int = 80) -> str:
    """Return a value from a file for a message: on one line, escaped, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        text = f"a {type(value).__name__} too long to show"
    return shown_text(text, limit)


def shown_text(text: str, limit: int = 200) -> str:
    """Return text that came from a file, or from a library that read one, as part of a sentence."""
    plain = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def has_half_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which JSON can say and UTF-8 cannot."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file a user may have written by hand."""
    text = read_text(path, _MAX_TOML_BYTES)
    try:
        if any(line.count(".") > _MAX_TOML_DOTS for line in text.splitlines()):
            raise ValueError(f"a line of it has more than {_MAX_TOML_DOTS} dots")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not TOML ({shown_text(str(error))}); correct that line.") from None


def to_toml(data: Mapping[str, Any]) -> str:
    """Return nested tables of texts, numbers and truth values as TOML; there is no TOML writer in Python itself."""
    return "\n".join(_toml_lines(data, ()))


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in inner:
            assert isinstance(value, str | int | float), f"{key} is a {type(value).__name__}"
            yield f"{_toml_key(key)} = {_toml_text(value)}"
    for key, value in inner.items():
        name = (*path, key)
        yield f"\n[{'.'.join(map(_toml_key, name))}]"
        yield from _toml_lines(value, name)
    if not path:
        yield ""


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_text(key)


def _toml_text(value: str | int | float) -> str:
    """JSON's texts and numbers are TOML's too, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def is_there(path: Path) -> bool:
    """Tell whether something lies at a path; a name that no file can have, from an input, is nowhere."""
    try:
        return path.exists()
    except OSError:  # too long
        return False


def read_text(path: Path, limit_bytes: int = _MAX_TEXT_BYTES) -> str:
    """Read a text file of bounded size, with one sentence for every way this can fail."""
    named = shown_text(str(path), 300)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe may never end, and a device has no size
            what = "a directory" if path.is_dir() else "no regular file"
            raise RecordError(f"{named} is {what}; pass a file.")
        if found.st_size > limit_bytes:
            raise RecordError(f"{named} is larger than {limit_bytes} bytes, which no such file is; choose another.")
        return path.read_bytes().decode("utf-8")  # newlines stay as they are: text is tokenised and hashed
    except FileNotFoundError:
        raise RecordError(f"{named} does not exist; check the path.") from None
    except UnicodeDecodeError:
        raise RecordError(f"{named} is not UTF-8 text; check that it is the right file.") from None
    except OSError as error:
        raise RecordError(f"{named} cannot be read: {error.strerror}; check the path.") from None
    except ValueError:  # a NUL or half of a surrogate pair, which JSON and TOML can hold
        raise RecordError(f"{named} is no path; check it.") from None


@contextlib.contextmanager
def atomic_path(path: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the target's directory; rename it to ``path`` on success, else remove it.

    A reader therefore sees the old file or the whole new one, also after ``kill -9`` or a full disk. Where the size of
    the file is known, ``needed_bytes``, a disk that has less is refused before anything is written.

    Raises
    ------
    RecordError
        When the directory cannot be written or the disk is full.
    """
    if not path.name or path.is_dir():
        raise RecordError(f"{path} is a directory; give the name of a file to write.")
    if needed_bytes is not None:
        require_free(path, needed_bytes)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary.unlink(missing_ok=True)  # nothing of this name is ours; a link would lead the bytes elsewhere
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # before free space is looked at
            temporary.unlink(missing_ok=True)
        raise write_error(path, error, needed_bytes) from error
    finally:
        with contextlib.suppress(OSError):  # the name itself may be what is wrong
            temporary.unlink(missing_ok=True)
        for folder in made:  # those that stayed empty
            with contextlib.suppress(OSError):
                folder.rmdir()


def _remove_stale(path: Path) -> None:
    """Remove temporaries that killed processes left for this path."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.suffixes[-2].lstrip(".") if len(stale.suffixes) >= 2 else ""
        if pid.isdecimal() and not is_running(int(pid)):
            stale.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Tell whether a process has this number, whosever it is."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no such process, or more than any number of one
        return False
    except OSError:  # it runs, and belongs to somebody else
        return True
    return True


def write_error(path: Path, error: OSError, needed_bytes: int | None = None) -> RecordError:
    """Return the sentence for a path that could not be written; ``needed_bytes`` is what it takes, where known."""
    short_write = error.errno is None and " written" in str(error)  # numpy's tofile gives no number
    if short_write or error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return _full(path, needed_bytes)
    why = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        why = "a file stands where a directory is needed"
    return RecordError(f"{path} cannot be written: {why}; choose another output path.")


def require_free(path: Path, needed_bytes: int) -> None:
    """Refuse to begin a file that its disk has no room for.

    Raises
    ------
    RecordError
        With what is needed and what is free.
    """
    with contextlib.suppress(OSError):  # what cannot be asked, such as a name too long, is told by who writes
        if shutil.disk_usage(_existing(path)).free < needed_bytes:
            raise _full(path, needed_bytes)


def _full(path: Path, needed_bytes: int | None) -> RecordError:
    needs = "" if needed_bytes is None else f"{needed_bytes:,} bytes are needed and "
    try:
        found = os.statvfs(_existing(path))
    except OSError:
        free = "how many are free cannot be told"
    else:
        free = f"{found.f_bavail * found.f_frsize:,} bytes are free"
        if found.f_files and not found.f_favail:
            free += ", and no room for another file"
    return RecordError(
        f"The disk that holds {path} is full: {needs}{free}; free some space and run the same command again."
    )


def _existing(path: Path) -> Path:
    """Return the nearest folder around a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a directory for what is small and needed for a moment, where the system keeps such things.

    Raises
    ------
    RecordError
        When it cannot be made, or is full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="impq-edge-") as folder:
            yield Path(folder)
    except OSError as error:
        raise scratch_error(error) from error


def scratch_error(error: OSError) -> RecordError:
    """Return the sentence for a temporary file or directory that could not be written."""
    return RecordError(
        f"The directory for temporary files cannot be written ({error.strerror or error}); free some space there, or "
        "set TMPDIR to a directory on another disk, and run the same command again."
    )


def sha256_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Hash a file; ``advance`` is told the number of bytes of each step."""
    return sha256_files([path], advance)


def sha256_files(paths: Iterable[Path], advance: Callable[[int], None] = lambda _: None) -> str:
    """Hash the bytes of files, one after the other, as ``cat`` would join them."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """Hash plain JSON values in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


_adapters: dict[type[Any], pydantic.TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> pydantic.TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = pydantic.TypeAdapter(kind)
    return _adapters[kind]
