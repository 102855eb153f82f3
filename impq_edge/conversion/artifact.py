"""The record of a GGUF that was written."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from impq_edge.ggml.types import TensorType
from impq_edge.records import Record, sha256_file


@dataclasses.dataclass(frozen=True)
class Artifact(Record):
    """A GGUF, what it was made from, and what it is."""

    SCHEMA: ClassVar[str] = "impq-edge.artifact/1"

    artifact: str  # file name; the record lies beside the file
    sha256: str
    file_bytes: int
    predicted_file_bytes: int
    model_sha256: str
    allocation_sha256: str | None  # None for a uniform file
    tensor_types: dict[str, TensorType]
    bits_per_weight: float  # file bytes over all weights

    def is_intact(self, directory: Path) -> bool:
        """Whether the file is there with the bytes this record tells."""
        path = directory / self.artifact
        return path.is_file() and path.stat().st_size == self.file_bytes and sha256_file(path) == self.sha256
