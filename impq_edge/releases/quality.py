"""How far files are from the unquantised model, measured once a file; the files it takes are written when needed."""

import contextlib
import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from impq_edge.conversion.artifact import Artifact
from impq_edge.errors import RecordError
from impq_edge.ggml.types import BLOCK_TYPES
from impq_edge.records import Record, sha256_file, sha256_json
from impq_edge.releases.making import MadeModel
from impq_edge.releases.matrix import Matrix
from impq_edge.releases.naming import Layout
from impq_edge.spqe.table import Progress
from impq_edge.stages import calibration_windows, convert
from impq_edge.validation.results import Divergence, Score
from impq_edge.validation.validate import compare


@dataclasses.dataclass(frozen=True)
class Quality(Record):
    """One file against the F16 file of its model, on the evaluation text."""

    SCHEMA: ClassVar[str] = "impq-edge.quality/2"

    file: str
    sha256: str
    file_bytes: int
    reference_sha256: str
    reference_bytes: int
    made_of: str  # hash over file, reference, text and settings: a resumed release sees what need not be done again
    score: Score  # the file's own, measured side by side with the reference
    divergence: Divergence


class Yardsticks:
    """The F16 file of a model and those with all blocks at 4 and at 2 bit, and what is measured with them."""

    def __init__(self, matrix: Matrix, made: MadeModel, layout: Layout, progress: Progress) -> None:
        self._matrix, self._made, self._layout, self._progress = matrix, made, layout, progress
        self._text_sha256 = sha256_file(matrix.text)
        encoding = matrix.encoding
        self.calibration_sha256 = calibration_windows(
            made.directory, encoding.calibration, encoding.calibration_tokens, encoding.window_tokens
        ).text_sha256
        self._f16: Artifact | None = None
        self.records: list[Path] = []

    def of(self, artifact: Artifact) -> Quality:
        """Measure a file of the release."""
        return self._measured(artifact.artifact, {"file": artifact.sha256}, lambda: (artifact, self._layout.root))

    def at(self, bits: int) -> Quality:
        """Measure the model with all blocks at 4 or at 2 bit."""
        encoding, name = self._matrix.encoding, f"uniform-{bits}bit.gguf"
        facts = {
            "uniform": bits, "outer": self._matrix.order.head_type, "encode": encoding.encoder,
            "calibration": self.calibration_sha256, "calibration_tokens": encoding.calibration_tokens,
        }  # fmt: skip
        return self._measured(name, facts, lambda: (self._written(name, bits), self._work))

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
        with contextlib.suppress(RecordError):  # of another version, whose record is measured anew
            found = Quality.load(record)
            if found.made_of == made_of:
                return found
        artifact, folder = file()
        self._f16 = self._f16 or self._written("f16.gguf", None)
        score, divergence = compare(
            folder / artifact.artifact, self._work / self._f16.artifact, text=self._matrix.text,
            windows=self._matrix.order.windows, progress=self._progress,
        )  # fmt: skip
        for measured, place in ((artifact, folder), (self._f16, self._work)):
            if not measured.is_intact(place):
                raise RecordError(
                    f"{place / measured.artifact} was changed by something else while it was measured; run the same "
                    "command again."
                )
        made = Quality(
            name, artifact.sha256, artifact.file_bytes, self._f16.sha256, self._f16.file_bytes, made_of, score,
            divergence,
        )  # fmt: skip
        made.save(record)
        return made

    def _written(self, name: str, bits: int | None) -> Artifact:
        return convert(
            self._made.row.source, out=self._work / name, type="f16" if bits is None else BLOCK_TYPES[bits],
            outer_type=None if bits is None else self._matrix.order.head_type, encode=self._matrix.encoding,
            kept=self._layout.kept(self._made.row.name), allow_fallback=True, progress=self._progress,
        )  # fmt: skip
