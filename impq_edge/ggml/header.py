"""The header of a GGUF, read without trusting it.

Layout: ``magic | version | tensor count | key count | keys and values | tensor infos | padding | data``
(ggml/include/gguf.h). The rules are those of llama.cpp's own reader (ggml/src/gguf.cpp), so that a bad
file gets a sentence here rather than an abort there.
"""

import dataclasses
import math
import stat
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from impq_edge.errors import ImpqError
from impq_edge.records import shown

Scalar = str | int | float | bool

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT_BYTES = 32  # GGUF_DEFAULT_ALIGNMENT
MAX_NAME_BYTES = 63
"""Of a tensor: GGML_MAX_NAME without its terminator."""

_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_WEIGHTS = (1 << 63) - 1  # ggml counts elements in an int64
_MAX_STRING_BYTES = 1 << 24  # no key, name, token or template comes near
_MAX_ARRAY_ITEMS = 1 << 24  # the largest vocabularies stay below 2^19
_MAX_LIST_ITEMS, _MAX_ITEM_BYTES = 1 << 14, 1 << 16  # of lists that are kept: tags, languages, data sets
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one character, rank, one size, type, offset
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT_KEY = "general.alignment"


@dataclasses.dataclass(frozen=True)
class TensorFact:
    """One tensor as the header describes it."""

    name: str
    type: str  # as llama.cpp names it, in lower case
    shape: tuple[int, ...]  # (out, in) for a matrix: the reverse of ggml's order
    offset_bytes: int  # from the start of the file
    size_bytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything before the data; of the arrays among the keys only those asked for."""

    file_bytes: int
    version: int
    keys: dict[str, Scalar]
    lists: dict[str, tuple[str, ...]]
    tensors: tuple[TensorFact, ...]  # in the order of their data


def read_header(path: Path, error: type[ImpqError], *, lists: Collection[str] = ()) -> Header:
    """Read and check the header of a GGUF; no tensor data is read, and none need be there.

    Parameters
    ----------
    path
        The file.
    error
        What the caller's stage raises.
    lists
        Arrays of strings to keep where the file has them; other arrays are checked and passed over.

    Raises
    ------
    ImpqError
        Of the kind asked for, when the path is no regular file, the file is no GGUF, is cut short, or its
        header claims what cannot be.
    """
    if path.is_dir():
        raise error(f"{path} is a directory; pass the .gguf file in it.")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise error(f"{path} is no regular file; pass a .gguf file.")
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            return _read(_Reader(path, file, file_bytes, error), lists)
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the path.") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror or failure}; check the file.") from None


class _Reader:
    """Reads forward through the header and turns every impossibility into one sentence."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int, error: type[ImpqError]) -> None:
        self.path, self.file, self.file_bytes, self.error = path, file, file_bytes, error
        self.position = 0

    def bad(self, what: str) -> ImpqError:
        return self.error(f"{self.path} is not a sound GGUF: {what}; build or download it again.")

    @property
    def remaining_bytes(self) -> int:
        return self.file_bytes - self.position

    def take(self, size_bytes: int) -> bytes:
        self._claim(size_bytes)
        data = self.file.read(size_bytes)
        if len(data) != size_bytes:  # it shrank since we looked
            raise self.bad(f"it ends at byte {self.position - size_bytes + len(data)}, inside its header")
        return data

    def skip(self, size_bytes: int) -> None:
        self._claim(size_bytes)
        self.file.seek(size_bytes, 1)

    def _claim(self, size_bytes: int) -> None:
        if size_bytes > self.remaining_bytes:
            missing = size_bytes - self.remaining_bytes
            raise self.bad(f"it is cut short inside its header, by at least {missing} bytes")
        self.position += size_bytes

    def number(self, code: str) -> int | float | bool:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value  # type: ignore[no-any-return]

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def count(self, what: str, least_bytes: int) -> int:
        value = self.integer("Q")
        if value * least_bytes > self.remaining_bytes:
            raise self.bad(f"it claims {value} {what}, more than its {self.file_bytes} bytes can hold")
        return value

    def text(self, what: str, limit_bytes: int = _MAX_STRING_BYTES) -> str:
        data = self.take(self._length(what, limit_bytes))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8 text") from None

    def skip_text(self, what: str) -> None:
        self.skip(self._length(what, _MAX_STRING_BYTES))

    def _length(self, what: str, limit_bytes: int) -> int:
        size = self.integer("Q")
        if size > limit_bytes:
            raise self.bad(f"{what} claims {size} bytes of text, more than {limit_bytes}")
        return size


def _read(header: _Reader, lists: Collection[str]) -> Header:
    version = _read_version(header)
    n_tensors = header.count("tensors", _MIN_TENSOR_BYTES)
    n_keys = header.count("keys", _MIN_KEY_BYTES)
    keys, kept = _read_keys(header, n_keys, lists)
    infos = [_read_tensor_info(header) for _ in range(n_tensors)]
    tensors = _place_tensors(header, infos, _alignment_bytes(header, keys))
    return Header(header.file_bytes, version, keys, kept, tensors)


def _read_version(header: _Reader) -> int:
    if header.file_bytes == 0:
        raise header.error(f"{header.path} is empty; build or download it again.")
    magic = header.take(min(len(_MAGIC), header.file_bytes))
    if magic != _MAGIC:
        raise header.error(f"{header.path} is not a GGUF: it begins with {shown(magic)}; pass a .gguf file.")
    version = header.integer("I")
    if version & 0xFFFF == 0:
        raise header.error(f"{header.path} is a GGUF of the other byte order; convert it with gguf-convert-endian.")
    if version not in _VERSIONS:
        raise header.error(f"{header.path} is GGUF version {version}, not 2 or 3; convert the model again.")
    return version


def _read_keys(
    header: _Reader, count: int, lists: Collection[str]
) -> tuple[dict[str, Scalar], dict[str, tuple[str, ...]]]:
    keys: dict[str, Scalar] = {}
    kept: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for index in range(count):
        key = header.text(f"key {index}")
        if not key or key in seen:
            raise header.bad(f"key {index} is {'empty' if not key else f'a second {shown(key)}'}")
        seen.add(key)
        kind = header.integer("I")
        if kind == _ARRAY:
            strings = _read_array(header, key, keep=key in lists)
            if strings is not None:
                kept[key] = strings
        elif kind == _STRING:
            keys[key] = header.text(f"key {shown(key)}")
        else:
            keys[key] = header.number(_scalar_code(header, key, kind))
    return keys, kept


def _scalar_code(header: _Reader, key: str, kind: int) -> str:
    if kind not in _SCALARS:
        raise header.bad(f"key {shown(key)} has type {kind}, which GGUF does not know")
    return _SCALARS[kind]


def _read_array(header: _Reader, key: str, keep: bool) -> tuple[str, ...] | None:
    kind, count = header.integer("I"), header.integer("Q")
    if count > _MAX_ARRAY_ITEMS:
        raise header.bad(f"key {shown(key)} claims {count} items, more than {_MAX_ARRAY_ITEMS}")
    if kind != _STRING:
        header.skip(count * struct.calcsize("<" + _scalar_code(header, key, kind)))
        return None
    if not keep:
        for _ in range(count):
            header.skip_text(f"an item of {shown(key)}")
        return None
    if count > _MAX_LIST_ITEMS:
        raise header.bad(f"key {shown(key)} lists {count} items, more than {_MAX_LIST_ITEMS}")
    return tuple(header.text(f"an item of {shown(key)}", _MAX_ITEM_BYTES) for _ in range(count))


@dataclasses.dataclass(frozen=True)
class _TensorInfo:
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # ggml's order, row length first
    offset_bytes: int  # from the start of the data

    @property
    def size_bytes(self) -> int:
        block_weights, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block_weights * block_bytes)


def _read_tensor_info(header: _Reader) -> _TensorInfo:
    name = header.text("a tensor's name", MAX_NAME_BYTES)
    rank = header.integer("I")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise header.bad(f"tensor {name!r} has {rank} dimensions, not 1 to {_MAX_DIMENSIONS}")
    shape = tuple(header.integer("Q") for _ in range(rank))
    kind = header.integer("I")
    if kind not in {int(known) for known in GGML_QUANT_SIZES}:
        raise header.bad(f"tensor {name!r} has type {kind}, which ggml does not know")
    if min(shape) < 1 or math.prod(shape) > _MAX_WEIGHTS:
        raise header.bad(f"tensor {name!r} has the impossible shape {list(shape)}")
    if shape[0] % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0]:
        raise header.bad(f"the rows of tensor {name!r}, {shape[0]} weights long, are no whole number of blocks")
    return _TensorInfo(name, GGMLQuantizationType(kind), shape, header.integer("Q"))


def _alignment_bytes(header: _Reader, keys: dict[str, Scalar]) -> int:
    value = keys.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT_BYTES)
    if not isinstance(value, int) or value < 1 or value & (value - 1):
        raise header.bad(f"{_ALIGNMENT_KEY} is {shown(value)}, not a power of two")
    return value


def _place_tensors(header: _Reader, infos: list[_TensorInfo], alignment: int) -> tuple[TensorFact, ...]:
    """Check that the tensors follow one another without a gap and end inside the file, as llama.cpp demands."""
    if len({info.name for info in infos}) != len(infos):
        raise header.bad("two tensors have the same name")
    data_start = -(-header.position // alignment) * alignment
    expected = 0
    tensors = []
    for info in infos:
        if info.offset_bytes != expected:
            raise header.bad(f"tensor {info.name!r} is said to start at {info.offset_bytes}, not at {expected}")
        start = data_start + info.offset_bytes
        tensors.append(TensorFact(info.name, info.type.name.lower(), info.shape[::-1], start, info.size_bytes))
        expected += -(-info.size_bytes // alignment) * alignment
    end = max((tensor.offset_bytes + tensor.size_bytes for tensor in tensors), default=header.position)
    if end > header.file_bytes:
        raise header.error(
            f"{header.path} is cut short by {end - header.file_bytes} of {end} bytes; copy or download it again."
        )
    return tuple(tensors)
