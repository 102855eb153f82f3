"""The record of a GGUF that was written."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from impq_edge.ggml.types import TensorType
from impq_edge.records import Record, sha256_files


@dataclasses.dataclass(frozen=True)
class Artifact(Record):
    """A GGUF, what it was made from, and what it is."""

    SCHEMA: ClassVar[str] = "impq-edge.artifact/2"

    artifact: str  # file name, of the first where there are several; the record lies beside the files
    sha256: str  # over the bytes of all files, one after the other
    file_bytes: int  # of all files
    predicted_file_bytes: int
    model_sha256: str
    allocation_sha256: str | None  # None for a uniform file
    tensor_types: dict[str, TensorType]
    encoding: dict[str, str | int]  # how weights became bytes, and on what text
    bits_per_weight: float  # file bytes over all weights
    more_files: tuple[str, ...] = ()  # names of the further files of a split GGUF, in order

    def is_intact(self, directory: Path) -> bool:
        """Whether the files are there with the bytes this record tells."""
        paths = [directory / name for name in (self.artifact, *self.more_files)]
        if not all(path.is_file() for path in paths):
            return False
        return sum(path.stat().st_size for path in paths) == self.file_bytes and sha256_files(paths) == self.sha256
