"""llama.cpp's importance matrix: what each tensor's inputs were like on some text, read and written as its GGUF.

``llama-imatrix`` (tools/imatrix/imatrix.cpp) sums the squares of the inputs of every matrix, column by column, and
counts the tokens; ``llama-quantize`` (tools/quantize/quantize.cpp, common/imatrix-loader.cpp) divides one by the
other. A tensor of several matrices (experts) has one row of sums and one count for each.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from impq_edge.errors import ConversionError
from impq_edge.ggml.header import MAX_NAME_BYTES, Header, Scalar, read_header
from impq_edge.model.spec import ModelSpec
from impq_edge.records import atomic_path, shown

TYPE_KEY, TYPE = "general.type", "imatrix"
DATASETS_KEY = "imatrix.datasets"
CHUNK_COUNT_KEY = "imatrix.chunk_count"
CHUNK_SIZE_KEY = "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_COUNT = 1 << 53  # whole numbers that a double tells apart


@dataclasses.dataclass(frozen=True, eq=False)
class Imatrix:
    """The inputs of a model's matrices on some text, by GGUF tensor name.

    Raises
    ------
    ConversionError
        When the arrays do not belong together, a sum is negative or not finite, or a count is negative.
    """

    sums: Mapping[str, NDArray[np.float32]]  # of squared inputs, (matrices, row length)
    counts: Mapping[str, NDArray[np.int64]]  # tokens that each matrix has seen, (matrices,)
    datasets: tuple[str, ...]  # what the text is called
    chunk_count: int  # windows of text
    chunk_tokens: int  # of a window

    def __post_init__(self) -> None:
        if not self.sums or self.sums.keys() != self.counts.keys():
            raise _unsound("it holds no tensors" if not self.sums else "sums and counts are not of the same tensors")
        for name, sums in self.sums.items():
            _check(name, sums, self.counts[name])

    @classmethod
    def dense(
        cls,
        squares: Mapping[str, NDArray[np.float64]],
        tokens: int,
        *,
        datasets: Iterable[str] = (),
        chunk_count: int,
        chunk_tokens: int,
    ) -> Self:
        """Make one of sums of squared inputs, (row length,) of each tensor, over ``tokens`` tokens."""
        return cls(
            {name: np.asarray(values, np.float32).reshape(1, -1) for name, values in squares.items()},
            {name: np.array([tokens], np.int64) for name in squares},
            tuple(datasets),
            chunk_count,
            chunk_tokens,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the GGUF that ``llama-imatrix`` or :meth:`write` made.

        Raises
        ------
        ConversionError
            When the file cannot be read, is another GGUF or the older ``.dat`` format, or holds what cannot be.
        """
        header = read_header(path, ConversionError, lists=(DATASETS_KEY,))
        _require_imatrix(path, header.keys)
        tensors = {tensor.name: tensor for tensor in header.tensors}
        names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
        alone = sorted(tensors.keys() ^ {name + suffix for name in names for suffix in (_SUMS, _COUNTS)})
        if alone or not names:
            raise _unsound(f"{shown(alone[0])} has no counterpart" if alone else "it holds no tensors", path)
        if DATASETS_KEY not in header.lists:
            raise _unsound(f"it has no {DATASETS_KEY}", path)
        values = _read_values(path, header)
        try:
            counts = {name: _whole(name, values[name + _COUNTS]) for name in names}
            return cls(
                {name: _rows(name, values[name + _SUMS], counts[name]) for name in names},
                counts,
                header.lists[DATASETS_KEY],
                _count(path, header.keys, CHUNK_COUNT_KEY),
                _count(path, header.keys, CHUNK_SIZE_KEY),
            )
        except ConversionError as error:  # which does not know the file
            raise ConversionError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the GGUF that ``llama-quantize --imatrix`` reads; the same numbers give the same bytes.

        Raises
        ------
        ConversionError
            When a tensor's name is too long for a GGUF, or no data set is named.
        RecordError
            When the file cannot be written.
        """
        if not self.datasets:  # GGUFWriter leaves out an empty list, and llama-quantize then refuses the file
            raise ConversionError("The importance matrix names no data set; name the text it was measured on.")
        for name in self.sums:
            if len((name + _SUMS).encode()) > MAX_NAME_BYTES:
                raise ConversionError(f"Tensor {name!r} has too long a name for an importance matrix; shorten it.")
        with atomic_path(path) as temporary:
            writer = _Writer(temporary, "")
            writer.add_type(TYPE)
            writer.add_array(DATASETS_KEY, list(self.datasets))
            writer.add_uint32(CHUNK_COUNT_KEY, self.chunk_count)
            writer.add_uint32(CHUNK_SIZE_KEY, self.chunk_tokens)
            for name in sorted(self.sums):
                # As llama.cpp writes it: a tensor of one matrix has one dimension, ggml trims the others.
                sums, counts = self.sums[name], self.counts[name].astype(np.float32)
                writer.add_tensor(name + _SUMS, sums[0] if len(sums) == 1 else sums)
                writer.add_tensor(name + _COUNTS, counts if len(counts) == 1 else counts[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """Return the mean squared input of each column, as ``llama-quantize`` computes it (``load_imatrix``).

        A matrix that has seen no token gets ones, which is no preference. Shape (row length,), for a tensor of
        several matrices one after the other; None where nothing is known of the tensor.
        """
        if name not in self.sums:
            return None
        sums, counts = self.sums[name], self.counts[name].astype(np.float32)[:, None]
        seen = counts > 0
        mean: NDArray[np.float32] = np.where(seen, sums / np.where(seen, counts, np.float32(1)), np.float32(1))
        return mean.reshape(-1)

    def require_for(self, spec: ModelSpec) -> None:
        """Refuse a matrix that was measured on another model.

        Every matrix of the blocks must be there; embedding and head, which ``llama-imatrix`` leaves out, may be.

        Raises
        ------
        ConversionError
            When tensors of the model are missing or have rows of another length.
        """
        missing, other = [], []
        for tensor in spec.tensors:
            found = self.sums.get(tensor.gguf_name)
            if found is None:
                missing += [tensor.gguf_name] if tensor.role == "matrix" else []
            elif tensor.role != "vector" and found.shape != (1, tensor.shape[-1]):
                other.append(f"{tensor.gguf_name}, {found.size} for {tensor.shape[-1]}")
        faults = [f"lacks {len(missing)} of its tensors ({missing[0]} first)"] if missing else []
        faults += [f"has another number of columns in {len(other)} ({other[0]} first)"] if other else []
        if faults:
            raise ConversionError(
                f"The importance matrix was not measured on {spec.name}: it {' and '.join(faults)}; "
                "measure one on this model."
            )


class _Writer(GGUFWriter):
    def add_architecture(self) -> None:
        """Add nothing: an importance matrix has no architecture."""


def _unsound(what: str, path: Path | None = None) -> ConversionError:
    of = f"{path} is" if path else "This is"
    return ConversionError(f"{of} no sound importance matrix: {what}; measure it again.")


def _check(name: str, sums: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    if sums.ndim != 2 or counts.shape != sums.shape[:1] or not sums.size:
        raise _unsound(f"{name} has sums of shape {sums.shape} and counts of shape {counts.shape}")
    bad = np.argwhere(~(np.isfinite(sums) & (sums >= 0)))
    if bad.size:
        raise _unsound(f"column {bad[0][1]} of {name} sums to {sums[tuple(bad[0])]:g}")
    if counts.min() < 0:
        raise _unsound(f"{name} was counted {counts.min()} times")


def _require_imatrix(path: Path, keys: Mapping[str, Scalar]) -> None:
    if keys.get(TYPE_KEY) != TYPE:
        raise ConversionError(
            f"{path} is a GGUF of type {shown(keys.get(TYPE_KEY))}, not {TYPE!r}; pass a file that llama-imatrix wrote."
        )


def _count(path: Path, keys: Mapping[str, Scalar], key: str) -> int:
    value = keys.get(key)
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise _unsound(f"{key} is {shown(value)}", path)
    return value


def _read_values(path: Path, header: Header) -> dict[str, NDArray[np.float32]]:
    """Read all tensors, flat; no more memory than the file has bytes."""
    for tensor in header.tensors:
        if tensor.type != "f32":
            raise _unsound(f"{tensor.name} is {tensor.type}, not f32", path)
    try:
        return {
            tensor.name: np.fromfile(path, "<f4", tensor.weights, offset=tensor.offset_bytes)
            for tensor in header.tensors
        }
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}; check the file.") from None


def _whole(name: str, counts: NDArray[np.float32]) -> NDArray[np.int64]:
    """Round as C's ``lround``, which ``llama-quantize`` applies."""
    exact = counts.astype(np.float64)
    bad = exact[~(np.abs(exact) < _MAX_COUNT)]  # NaN included
    if bad.size:
        raise _unsound(f"{name} was counted {bad[0]:g} times")
    whole: NDArray[np.int64] = np.trunc(exact + np.copysign(0.5, exact)).astype(np.int64)
    return whole


def _rows(name: str, sums: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    if len(sums) % len(counts):
        raise _unsound(f"the {len(sums)} sums of {name} cannot be shared among {len(counts)} counts")
    return sums.reshape(len(counts), -1)
