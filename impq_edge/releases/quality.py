"""How far files are from the unquantised model, measured once a file; the files it takes are written when needed."""

import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from impq_edge.conversion.artifact import Artifact
from impq_edge.ggml.types import BLOCK_TYPES
from impq_edge.records import Record, sha256_file, sha256_json
from impq_edge.releases.making import MadeModel
from impq_edge.releases.matrix import Matrix
from impq_edge.releases.naming import Layout
from impq_edge.spqe.table import Progress
from impq_edge.stages import calibration_windows, convert
from impq_edge.validation.results import Divergence
from impq_edge.validation.validate import compare


@dataclasses.dataclass(frozen=True)
class Quality(Record):
    """One file against the F16 file of its model, on the evaluation text."""

    SCHEMA: ClassVar[str] = "impq-edge.quality/1"

    file: str
    sha256: str
    file_bytes: int
    reference_sha256: str
    reference_bytes: int
    made_of: str  # hash over file, reference, text and settings: a resumed release sees what need not be done again
    divergence: Divergence

    @property
    def perplexity(self) -> float:
        """The file's own, as it was measured side by side with the reference."""
        return self.divergence.reference_perplexity * self.divergence.perplexity_ratio


class Yardsticks:
    """The F16 file of a model and that with all blocks at 4 bit, and what is measured with them."""

    def __init__(self, matrix: Matrix, made: MadeModel, layout: Layout, progress: Progress) -> None:
        self._matrix, self._made, self._layout, self._progress = matrix, made, layout, progress
        self._text_sha256 = sha256_file(matrix.text)
        self._f16: Artifact | None = None
        self.records: list[Path] = []

    def of(self, artifact: Artifact) -> Quality:
        """Measure a file of the release."""
        return self._measured(artifact.artifact, {"file": artifact.sha256}, lambda: (artifact, self._layout.root))

    def at_4_bit(self) -> Quality:
        """Measure the model with all blocks at 4 bit."""
        encoding = self._matrix.encoding
        text = calibration_windows(
            self._made.directory, encoding.calibration, encoding.calibration_tokens, encoding.window_tokens
        )
        facts = {
            "uniform": 4, "outer": self._matrix.order.head_type, "encode": encoding.encoder,
            "calibration": text.text_sha256, "calibration_tokens": encoding.calibration_tokens,
        }  # fmt: skip
        return self._measured("uniform-4bit.gguf", facts, lambda: (self._written("uniform-4bit.gguf", 4), self._work))

    @property
    def _work(self) -> Path:
        return self._layout.work / self._made.row.name

    def _measured(self, name: str, facts: dict[str, object], file: Callable[[], tuple[Artifact, Path]]) -> Quality:
        record = self._layout.records(self._made.row.name) / f"{name}.quality.json"
        self.records.append(record)
        made_of = sha256_json(
            {
                **facts, "model": self._made.spec.content_sha256, "text": self._text_sha256,
                "windows": self._matrix.order.windows, "llama_cpp_python": metadata.version("llama-cpp-python"),
            }
        )  # fmt: skip
        if record.exists():
            found = Quality.load(record)
            if found.made_of == made_of:
                return found
        artifact, folder = file()
        self._f16 = self._f16 or self._written("f16.gguf", None)
        divergence = compare(
            folder / artifact.artifact, self._work / self._f16.artifact, text=self._matrix.text,
            windows=self._matrix.order.windows, progress=self._progress,
        )  # fmt: skip
        made = Quality(
            name, artifact.sha256, artifact.file_bytes, self._f16.sha256, self._f16.file_bytes, made_of, divergence
        )
        made.save(record)
        return made

    def _written(self, name: str, bits: int | None) -> Artifact:
        return convert(
            self._made.row.source, out=self._work / name, type="f16" if bits is None else BLOCK_TYPES[bits],
            outer_type=None if bits is None else self._matrix.order.head_type, encode=self._matrix.encoding,
            kept=self._layout.kept(self._made.row.name), allow_fallback=True, progress=self._progress,
        )  # fmt: skip
