"""The values of a checkpoint's tensors, read row by row as float32.

The safetensors package reads BF16 only through PyTorch, and maps whole shards into memory to do so. Its format is a
length, a JSON header and the bytes (github.com/huggingface/safetensors, "Format"), and its headers have been checked
by :func:`impq_edge.model.spec.read_model` before anybody comes here; so the bytes are read straight from the file.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ModelError
from impq_edge.model.spec import TensorSpec
from impq_edge.model.watched import require_as_hashed

_STORED_AS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where in which file the values of a tensor lie; it may be read from any number of threads."""

    name: str
    path: Path
    format: str  # as safetensors names it
    shape: tuple[int, ...]
    offset_bytes: int

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Read the rows ``first`` to ``last - 1``; those of a vector are its elements.

        Returns
        -------
        The values, shape (last - first, …).

        Raises
        ------
        ModelError
            When the file cannot be read, or changed since the checkpoint was opened.
        """
        return _as_float32(self.rows_as_stored(first, last), self.format)

    def rows_as_stored(self, first: int, last: int) -> NDArray[Any]:
        """Read the same without converting it; BF16 as uint16 of the same bits."""
        stored_as = _STORED_AS[self.format]
        row = math.prod(self.shape[1:])
        try:
            values = np.fromfile(
                self.path, stored_as, (last - first) * row, offset=self.offset_bytes + first * row * stored_as.itemsize
            )
        except OSError as error:
            raise _unreadable(self.path, error.strerror or error) from None
        if values.size != (last - first) * row:
            raise _unreadable(self.path, f"it ends inside {self.name!r}")
        require_as_hashed(self.path)
        return values.reshape(last - first, *self.shape[1:])


def find_tensor(directory: Path, tensor: TensorSpec) -> StoredTensor:
    """Find a tensor in its shard.

    Raises
    ------
    ModelError
        When the shard cannot be read, or no longer is what :func:`~impq_edge.model.spec.read_model` saw.
    """
    assert tensor.shard is not None, f"{tensor.name} is derived, not stored"
    path = directory / tensor.shard
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > path.stat().st_size:
                raise _unreadable(path, "it is no safetensors file")
            entry = json.loads(file.read(length))[tensor.name]
        start, end = entry["data_offsets"]
        found = StoredTensor(tensor.name, path, entry["dtype"], tuple(entry["shape"]), _LENGTH_BYTES + length + start)
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unreadable(path, f"its header has no sound entry {tensor.name!r}") from None
    stored_as = _STORED_AS.get(found.format)
    if found.shape != tensor.shape or stored_as is None or end - start != tensor.weights * stored_as.itemsize:
        raise _unreadable(path, f"{tensor.name!r} changed since the checkpoint was opened")
    return found


def require_finite(values: NDArray[np.float32], name: str, first_row: int = 0) -> None:
    """Refuse NaN and infinite weights: no format can store them and every loss would be NaN."""
    finite = np.isfinite(values)
    if not finite.all():
        bad = int(finite.size - finite.sum())
        raise ModelError(
            f"Tensor {name!r} has {bad} NaN or infinite weights in its rows {first_row} to "
            f"{first_row + len(values) - 1}; use another checkpoint."
        )


def _as_float32(values: NDArray[Any], stored_as: str) -> NDArray[np.float32]:
    if stored_as != "BF16":
        return values.astype(np.float32, copy=False)
    bits = values.astype(np.uint32)  # BF16 is the upper half of a float32
    bits <<= 16
    return bits.view(np.float32)


def _unreadable(path: Path, reason: object) -> ModelError:
    return ModelError(f"Shard {path} cannot be read ({reason}); download the checkpoint again.")
