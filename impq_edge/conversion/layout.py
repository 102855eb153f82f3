"""What a GGUF will be to the byte, in one file or several, before any weight is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from impq_edge.conversion.metadata import Origin, add_metadata
from impq_edge.conversion.tokenizer import Tokenizer
from impq_edge.errors import ConversionError
from impq_edge.ggml.split import split_paths
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes, data_bytes, padded
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.model.vocabulary import Vocabulary
from impq_edge.records import scratch_directory

Recipe = Mapping[str, str | int | float | None]
"""How a file was made, as its metadata tells it; see :mod:`impq_edge.conversion.metadata`."""

_SPLIT_KEYS_BYTES = 128  # the three keys of a piece and the padding after them take less
_LENGTH_BYTES, _TYPE_BYTES, _SCORE_BYTES = 8, 4, 4  # of a string; of a token


@dataclasses.dataclass(frozen=True)
class Piece:
    """One file: its header, padded, and the tensors that follow."""

    header: bytes
    tensors: tuple[TensorSpec, ...]
    file_bytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model, what each tensor is stored in, and the files that take them."""

    spec: ModelSpec
    types: TensorTypes
    pieces: tuple[Piece, ...]
    unsplit_bytes: int  # as a single file

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(piece.file_bytes for piece in self.pieces)

    def paths(self, out: Path) -> list[Path]:
        """Return the files' names for a model that is to be called ``out``."""
        return split_paths(out, len(self.pieces))


def plan_gguf(
    spec: ModelSpec,
    tokenizer: Tokenizer,
    types: TensorTypes,
    recipe: Recipe,
    *,
    origin: Origin | None = None,
    shard_bytes: int | None = None,
) -> Layout:
    """Lay out a GGUF.

    Parameters
    ----------
    spec, tokenizer, types
        What to store, and as what.
    recipe, origin
        How it is made, and where it comes from, for the metadata.
    shard_bytes
        What no file may exceed; None: one file of any size. Tensors stay whole and in order, as llama.cpp's
        ``llama-gguf-split`` does it, which however counts tensor data alone.

    Raises
    ------
    ConversionError
        When a tensor and the metadata fit no file of that size, or recipe and origin are too long.
    """
    (header,) = _headers(spec, tokenizer, types, recipe, origin, [spec.tensors])
    unsplit_bytes = len(header) + data_bytes(spec, types)
    headers, parts = [header], [spec.tensors]
    if shard_bytes is not None and unsplit_bytes > shard_bytes:
        parts = _partition(spec, types, shard_bytes, len(header) + _SPLIT_KEYS_BYTES)
        headers = _headers(spec, tokenizer, types, recipe, origin, parts)
    pieces = tuple(
        Piece(header, part, len(header) + sum(_stored_bytes(tensor, types) for tensor in part))
        for header, part in zip(headers, parts, strict=True)
    )
    return Layout(spec, types, pieces, unsplit_bytes)


def header_bytes(spec: ModelSpec, tokenizer: Tokenizer) -> int:
    """Return the bytes of a GGUF of this model before its tensor data.

    They do not depend on the tensors' types, the recipe or the origin: all have fields of fixed width.
    """
    types = {tensor.gguf_name: TensorType.F32 for tensor in spec.tensors}
    return len(_headers(spec, tokenizer, types, {}, None, [spec.tensors])[0])


def estimated_header_bytes(spec: ModelSpec, vocabulary: Vocabulary) -> int:
    """Estimate :func:`header_bytes` without a tokenizer: what its strings take is counted, known or guessed.

    A string takes its bytes and 8 for their number, a token 4 more for its type and 4 for a score where there are
    any. Chat templates are left out: a few kilobytes.
    """
    stand_in = Tokenizer(
        model=vocabulary.model, pre="default", tokens=("",), types=(TokenType.NORMAL,),
        scores=(0.0,) if vocabulary.model == "llama" else None, merges=None, special_ids={"bos": 0, "eos": 0, "pad": 0},
        add_bos=True, add_eos=False, add_space_prefix=False, chat_templates={},
    )  # fmt: skip
    token_bytes = _LENGTH_BYTES + _TYPE_BYTES + (_SCORE_BYTES if vocabulary.model == "llama" else 0)
    strings = vocabulary.tokens_bytes + vocabulary.merges_bytes + vocabulary.merges * _LENGTH_BYTES
    return padded(header_bytes(spec, stand_in) + (spec.hyperparameters.vocabulary - 1) * token_bytes + strings)


def _partition(
    spec: ModelSpec, types: TensorTypes, shard_bytes: int, header_bytes: int
) -> list[tuple[TensorSpec, ...]]:
    """Fill file after file; ``header_bytes``, which only the first needs, are kept free in all."""
    room = shard_bytes - header_bytes
    sizes = {tensor: _stored_bytes(tensor, types) for tensor in spec.tensors}
    largest = max(sizes, key=lambda tensor: sizes[tensor])
    if sizes[largest] > room:
        raise ConversionError(
            f"Tensor {largest.gguf_name} takes {sizes[largest]} bytes and the metadata {header_bytes}, more than the "
            f"{shard_bytes} of a shard, and no tensor is split; "
            f"ask for --shard-size {sizes[largest] + header_bytes} or more."
        )
    parts: list[list[TensorSpec]] = [[]]
    left = room
    for tensor, size in sizes.items():
        if size > left:
            parts.append([])
            left = room
        parts[-1].append(tensor)
        left -= size
    return [tuple(part) for part in parts]


def _stored_bytes(tensor: TensorSpec, types: TensorTypes) -> int:
    return padded(types[tensor.gguf_name].tensor_bytes(tensor.shape))


def _headers(
    spec: ModelSpec,
    tokenizer: Tokenizer,
    types: TensorTypes,
    recipe: Recipe,
    origin: Origin | None,
    parts: Sequence[Sequence[TensorSpec]],
) -> list[bytes]:
    """Return header, metadata (in the first only) and tensor table of every file, padded."""
    writer = GGUFWriter(None, spec.hyperparameters.architecture)
    add_metadata(writer, spec, tokenizer, types, recipe, origin)
    for index, part in enumerate(parts):
        if index:
            writer.tensors.append({})  # the next file; the writer's own limit would not count the metadata
        for tensor in part:
            kind = types[tensor.gguf_name]
            writer.add_tensor_info(
                tensor.gguf_name, tensor.shape, np.dtype(np.float32), kind.tensor_bytes(tensor.shape), kind.ggml
            )
    with scratch_directory() as folder:
        path = folder / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        headers = [file.read_bytes() for file in split_paths(path, len(parts))]
    return [header.ljust(padded(len(header)), b"\0") for header in headers]
