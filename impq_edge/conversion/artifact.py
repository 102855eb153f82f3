"""The record of a GGUF that was written."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from impq_edge.ggml.types import TensorType
from impq_edge.records import Record, sha256_files, shown


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

    def __post_init__(self) -> None:
        for name in (self.artifact, *self.more_files):
            if Path(name).name != name or "\0" in name:  # it must not lead out of the record's directory
                raise ValueError(f"{shown(name)} is not a plain file name")

    def is_intact(self, directory: Path) -> bool:
        """Whether the files are there with the bytes this record tells."""
        paths = [directory / name for name in (self.artifact, *self.more_files)]
        try:
            sizes = [path.stat().st_size for path in paths if path.is_file()]
            return len(sizes) == len(paths) and sum(sizes) == self.file_bytes and sha256_files(paths) == self.sha256
        except OSError:  # a name too long for any file, or a file that cannot be read
            return False
