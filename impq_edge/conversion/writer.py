"""Streams a checkpoint straight into a GGUF: pieces of tensors, read, encoded and written side by side."""

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from impq_edge.conversion.encoder import Encoder, PlainEncoder
from impq_edge.conversion.layout import Layout, Piece
from impq_edge.conversion.tensors import ReadRows, gguf_rows, row_order
from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import padded
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import atomic_path, require_free

Progress = Callable[[int], None]
"""Told how many bytes of tensor data have just been written, padding included."""

_Bytes = NDArray[np.uint8]

_CHUNK_WEIGHTS = 1 << 19  # 2 MiB as float32; 2 to 100 ms of encoding, against some 0.1 ms to hand it over

_RECORD_BYTES = 1 << 18
"""Room for the record beside a file, some forty bytes a tensor: without it a whole file would have to be made again."""


@dataclasses.dataclass(frozen=True)
class Written:
    """The files that were written."""

    files: tuple[Path, ...]  # the first is what llama.cpp is given
    file_bytes: int  # of all
    sha256: str  # over the bytes of all, one file after the other


def write_gguf(
    directory: Path,
    layout: Layout,
    out: Path,
    *,
    encoder: Encoder | None = None,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> Written:
    """Write a GGUF, in one file or in llama.cpp's split convention.

    The same inputs give the same bytes, whatever the number of threads. The files appear under their names only
    when all are whole, and the first, without which llama.cpp loads none, last.

    Parameters
    ----------
    directory
        The checkpoint.
    layout
        What :func:`~impq_edge.conversion.layout.plan_gguf` planned for it.
    out
        Name of the file; split files are named after it.
    encoder
        Who turns weights into bytes; ggml without an importance matrix by default.
    threads
        How many read and encode; all cores by default. Each holds some pieces of 2¹⁹ weights, so memory does not
        grow with the model.

    Raises
    ------
    ModelError
        When weights cannot be read or are not finite.
    ConversionError
        When a weight does not fit its type.
    RecordError
        When a file cannot be written.
    """
    encoder = encoder or PlainEncoder()
    paths = layout.paths(out)
    digest = hashlib.sha256()
    n_threads = threads or os.cpu_count() or 1
    with contextlib.ExitStack() as stack:  # closes the last file first: the first gets its name last
        require_free(paths[0], layout.file_bytes + _RECORD_BYTES)
        temporaries = [
            stack.enter_context(atomic_path(path, piece.file_bytes))
            for path, piece in zip(paths, layout.pieces, strict=True)
        ]
        with ThreadPoolExecutor(n_threads) as pool:
            for temporary, piece in zip(temporaries, layout.pieces, strict=True):
                jobs = _jobs(directory, layout, piece, encoder)
                written = _write_piece(temporary, piece, _in_order(pool, jobs, 2 * n_threads + 1), digest, progress)
                if written != piece.file_bytes:
                    raise ConversionError(
                        f"{out} came out at {written} bytes instead of {piece.file_bytes}; report this as a bug."
                    )
        if len(paths) > 1:  # that of an earlier run must not stand before pieces of this one
            paths[0].unlink(missing_ok=True)
    return Written(tuple(paths), layout.file_bytes, digest.hexdigest())


def _write_piece(
    path: Path, piece: Piece, chunks: Iterator[_Bytes], digest: "hashlib._Hash", progress: Progress
) -> int:
    with path.open("wb") as file:
        file.write(piece.header)
        digest.update(piece.header)
        for chunk in chunks:
            file.write(chunk.data)
            digest.update(chunk.data)
            progress(chunk.nbytes)
        return file.tell()


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], _Bytes]], limit: int) -> Iterator[_Bytes]:
    """Run jobs side by side and yield their results in order; at most ``limit`` are held, done or not."""
    held: collections.deque[Future[_Bytes]] = collections.deque()
    for job in jobs:
        held.append(pool.submit(job))
        if len(held) == limit:
            yield held.popleft().result()
    while held:
        yield held.popleft().result()


def _jobs(directory: Path, layout: Layout, piece: Piece, encoder: Encoder) -> Iterator[Callable[[], _Bytes]]:
    """Yield the work of a file in the order of its bytes; the encoder is asked when a tensor's turn comes."""
    for tensor in piece.tensors:
        kind = layout.types[tensor.gguf_name]
        yield from _tensor_jobs(directory, layout.spec, tensor, kind, encoder)
        size = kind.tensor_bytes(tensor.shape)
        if padded(size) > size:
            yield partial(_zeros, padded(size) - size)


def _tensor_jobs(
    directory: Path, spec: ModelSpec, tensor: TensorSpec, kind: TensorType, encoder: Encoder
) -> Iterator[Callable[[], _Bytes]]:
    importance = None
    if kind.block_weights > 1:  # floats are only rounded
        solved = encoder.solved(tensor, kind)
        if solved is not None:
            assert solved.shape == (tensor.shape[0], kind.tensor_bytes((1, tensor.shape[-1]))), tensor.name
            order = row_order(spec, tensor)
            yield lambda: np.ascontiguousarray(solved if order is None else solved[order]).ravel()
            return
        importance = encoder.importance(tensor, kind)
    read, rows = gguf_rows(directory, spec, tensor), tensor.shape[0]
    step = max(1, _CHUNK_WEIGHTS // math.prod(tensor.shape[1:]))
    for first in range(0, rows, step):
        yield partial(_encode_rows, read, first, min(first + step, rows), kind, importance)


def _encode_rows(
    read: ReadRows, first: int, last: int, kind: TensorType, importance: NDArray[np.float32] | None
) -> _Bytes:
    values = read(first, last)
    return encode(values.reshape(-1, values.shape[-1]), kind, importance=importance).ravel()


def _zeros(size_bytes: int) -> _Bytes:
    return np.zeros(size_bytes, np.uint8)
