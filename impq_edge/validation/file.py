"""What a GGUF says of itself, as far as a whole model that llama.cpp is to run must say it."""

import dataclasses
from pathlib import Path

from impq_edge.errors import ValidationError
from impq_edge.ggml.header import Header, Scalar, TensorFact, read_header
from impq_edge.ggml.split import MAX_FILES, SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_paths, unsplit_path
from impq_edge.records import shown


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What a GGUF says of itself; arrays among the keys are checked and passed over."""

    files: tuple[Path, ...]  # one, or all pieces of a split GGUF in order
    file_bytes: int  # of all
    version: int
    keys: dict[str, Scalar]  # of the first file
    tensors: tuple[TensorFact, ...]  # of all files in order, each with its offset in its own

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.keys["general.architecture"])

    @property
    def trained_context_tokens(self) -> int | None:
        """The context the model was trained for, where the file says."""
        value = self.keys.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight, tokenizer and padding included."""
        return 8 * self.file_bytes / self.weights


def read_facts(path: Path) -> FileFacts:
    """Read and check the header of a model, or all headers of one that is split; no tensor data is read.

    Raises
    ------
    ValidationError
        When the path is no regular file, the file is no GGUF, is cut short, is a later piece of one or lacks
        pieces, or a header claims what cannot be.
    """
    header = read_header(path, ValidationError)
    files = _pieces(path, header)
    headers = [header, *(_read_piece(files, index) for index in range(1, len(files)))]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    if not isinstance(header.keys.get("general.architecture"), str):
        raise _unsound(path, "it names no architecture (general.architecture)")
    if not tensors:
        raise _unsound(path, "it holds no tensors")
    if len(files) > 1:
        _check_tensors(path, header, tensors)
    return FileFacts(tuple(files), sum(header.file_bytes for header in headers), header.version, header.keys, tensors)


def _pieces(path: Path, header: Header) -> list[Path]:
    """Return all files of the model whose first is ``path``, as llama.cpp finds them (src/llama-model-loader.cpp)."""
    count, number = (_whole_number(path, header, key, default) for key, default in ((SPLIT_COUNT, 1), (SPLIT_NO, 0)))
    if count <= 1:
        return [path]
    whole = unsplit_path(path)
    files = split_paths(whole, count) if whole else []
    if number != 0:
        first = files[0].name if files else "the first"
        raise ValidationError(f"{path} is piece {number + 1} of {count} of a split GGUF; pass {first}.")
    if not files or files[0] != path:
        raise ValidationError(
            f"{path} is the first of {count} pieces of a split GGUF, but is not named NAME-00001-of-{count:05d}.gguf, "
            "by which llama.cpp finds the others; give it its name back."
        )
    return files


def _whole_number(path: Path, header: Header, key: str, default: int) -> int:
    value = header.keys.get(key, default)
    if type(value) is not int or not 0 <= value <= MAX_FILES:
        raise _unsound(path, f"{key} is {shown(value)}, not a number from 0 to {MAX_FILES}")
    return value


def _read_piece(files: list[Path], index: int) -> Header:
    path = files[index]
    if not path.exists():
        raise ValidationError(f"{path}, piece {index + 1} of {len(files)} of {files[0].name}, is missing; get it too.")
    header = read_header(path, ValidationError)
    found = header.keys.get(SPLIT_NO), header.keys.get(SPLIT_COUNT)
    if found != (index, len(files)):
        raise _unsound(path, f"it says {SPLIT_NO} {shown(found[0])} of {shown(found[1])}, not {index} of {len(files)}")
    return header


def _check_tensors(path: Path, header: Header, tensors: tuple[TensorFact, ...]) -> None:
    expected = header.keys.get(SPLIT_TENSORS)
    if expected != len(tensors):
        raise _unsound(path, f"{SPLIT_TENSORS} is {shown(expected)}, but its pieces hold {len(tensors)} tensors")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _unsound(path, "two tensors in its pieces have the same name")


def _unsound(path: Path, what: str) -> ValidationError:
    return ValidationError(f"{path} is not a sound GGUF: {what}; build or download it again.")
