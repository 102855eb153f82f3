"""Records on disk: frozen dataclasses as JSON, checked on the way in, replaced atomically on the way out."""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import pydantic

from impq_edge.errors import ImpqError, RecordError

T = TypeVar("T")

_HASH_CHUNK_BYTES = 1 << 20
_MAX_RECORD_BYTES = 1 << 30  # a profile of 10^5 evaluations stays far below; more is not a record

STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
"""Set as ``__pydantic_config__`` on every dataclass read from a file: a misspelt key is an error."""


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
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")

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
        data = json.loads(text)
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


def parse(kind: type[T], data: object, path: Path) -> T:
    """Check plain values against a dataclass and build it; ``path`` only names the file in messages."""
    try:
        checked: T = _adapter(kind).validate_python(data)
        return checked
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = shown_text(".".join(str(part) for part in first["loc"]) or "the top level")
        value, wrong = shown(first["input"], 60), shown_text(first["msg"])
        raise RecordError(f"{path}: {where} is {value}: {wrong}; correct that field.") from None


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
    try:
        return tomllib.loads(read_text(path))
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


def read_text(path: Path) -> str:
    """Read a text file of bounded size, with one sentence for every way this can fail."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe may never end, and a device has no size
            what = "a directory" if path.is_dir() else "no regular file"
            raise RecordError(f"{path} is {what}; pass a file.")
        if found.st_size > _MAX_RECORD_BYTES:
            raise RecordError(f"{path} is larger than {_MAX_RECORD_BYTES} bytes, which no record is; choose another.")
        return path.read_bytes().decode("utf-8")  # newlines stay as they are: text is tokenised and hashed
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist; check the path.") from None
    except UnicodeDecodeError:
        raise RecordError(f"{path} is not UTF-8 text; check that it is the right file.") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}; check the path.") from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's directory; rename it to ``path`` on success, else remove it.

    A reader therefore sees the old file or the whole new one, also after ``kill -9`` or a full disk.

    Raises
    ------
    RecordError
        When the directory cannot be written or the disk is full.
    """
    if not path.name or path.is_dir():
        raise RecordError(f"{path} is a directory; give the name of a file to write.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _write_error(path, error) from error
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


def _write_error(path: Path, error: OSError) -> ImpqError:
    short_write = error.errno is None and " written" in str(error)  # numpy's tofile gives no number
    if short_write or error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RecordError(f"The disk that holds {path} is full; free some space and run the same command again.")
    return RecordError(f"{path} cannot be written: {error.strerror or error}; choose another output path.")


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
