"""The stages that write: the GGUF, and llama.cpp's importance matrix."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.card import read_card
from impq_edge.conversion.encoder import EncodeOptions, open_encoder
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.layout import Layout, Recipe, plan_gguf
from impq_edge.conversion.metadata import Origin
from impq_edge.conversion.writer import write_gguf
from impq_edge.errors import ConversionError, RecordError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.allocation import Allocation
from impq_edge.lock import sole_maker
from impq_edge.model.calibration import DEFAULT_CALIBRATION_TOKENS, DEFAULT_WINDOW_TOKENS
from impq_edge.model.recipe import TensorTypes, data_bytes, fallbacks, require_no_fallback, tensor_types
from impq_edge.model.source import DEMO, Source
from impq_edge.model.spec import ModelSpec, require_unchanged
from impq_edge.stages.opening import (
    calibration_text,
    calibration_windows,
    in_mebibytes,
    open_model,
    require_compute,
    require_rows,
    tokenizer_of,
)

if TYPE_CHECKING:
    from impq_edge.spqe.table import Progress

FILE_TYPES = (TensorType.F32, TensorType.F16, TensorType.Q8_0, TensorType.Q4_K, TensorType.Q2_K)


@sole_maker
def convert(
    model: str | Source = DEMO,
    *,
    out: Path | str,
    allocation: Allocation | Path | str | None = None,
    type: TensorType | str | None = None,
    outer_type: TensorType | str | None = None,
    encode: EncodeOptions | None = None,
    kept: Path | None = None,
    revision: str | None = None,
    allow_fallback: bool = False,
    threads: int | None = None,
    shard_bytes: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: "Progress" = lambda *_: None,
) -> Artifact:
    """Write a checkpoint as one GGUF, with the types of an allocation or one type for all blocks.

    The record of the file is saved beside it as ``<out>.json``; a whole file of the same inputs is not made again. With
    ``shard_bytes`` a larger file becomes several of at most that size, in llama.cpp's split convention: ``m.gguf``
    becomes ``m-00001-of-00003.gguf``, …. ``encode`` says how weights become bytes. What GPTQ has made is kept in the
    directory ``kept``, where a game may have left its own; without one beside the file until that is whole, so that a
    killed run goes on. ``say`` is told what of the model card could not be used.

    Raises
    ------
    ConversionError
        When neither or both of ``allocation`` and ``type`` are given, the type is none of
        :data:`FILE_TYPES`, or ``outer_type`` (Q6_K by default) is given beside an allocation.
    AllocationError
        When the allocation was made for other weights.
    """
    if (allocation is None) == (type is None):
        raise ConversionError("Give either --allocation FILE or --type TYPE: what to store the blocks in.")
    if allocation is not None and outer_type is not None:
        raise ConversionError(
            f"--head-type {outer_type} has no effect with --allocation, which has its own; give it to allocate."
        )
    if threads is not None and threads < 1:
        raise ConversionError(f"--threads {threads} is too few; ask for 1 or more.")
    out = Path(out)
    directory, spec = open_model(model, revision, progress)
    if allocation is not None:
        found = allocation if isinstance(allocation, Allocation) else Allocation.load(Path(allocation))
        found.check(spec)
        spec = dataclasses.replace(spec, name=found.model_name)  # the file's size counts its name
        require_rows(spec, allow_fallback, found.outer_type or TensorType.Q6_K)
        types: TensorTypes = found.tensor_types
        allocation_sha256: str | None = found.identity()
        recipe: Recipe = {
            "allocation_sha256": allocation_sha256,
            "profile_sha256": found.profile_sha256,
            "device": found.device[:64],
            "budget_bytes": found.budget_bytes,
        }
        if found.evidence is not None:
            recipe = {**recipe, "method": found.evidence.method}
    else:
        kind, outer = _file_type(type), TensorType(outer_type or TensorType.Q6_K)
        types = uniform_types(spec, kind, outer, allow_fallback)
        allocation_sha256, recipe = None, {"type": str(kind)}
    tokenizer = tokenizer_of(directory, spec)
    encode = encode or EncodeOptions()
    beside = out.with_name(f"{out.name}.encoded")
    opened = open_encoder(
        directory, spec, types, encode,
        lambda: calibration_windows(directory, encode.calibration, encode.calibration_tokens, encode.window_tokens),
        lambda: require_compute(encode.compute), kept or beside,
        lambda done, total: progress("calibrating, blocks", done, total),
    )  # fmt: skip
    recipe = {**recipe, "model_sha256": spec.content_sha256, **opened.facts}
    card, left_out = read_card(directory)
    if left_out:
        say(left_out)
    origin = Origin(card, imatrix=opened.imatrix, imatrix_file=encode.imatrix.name if encode.imatrix else None)
    layout = plan_gguf(spec, tokenizer, types, recipe, origin=origin, shard_bytes=shard_bytes)
    if allocation is not None and layout.unsplit_bytes != found.predicted_file_bytes:
        raise ConversionError(
            f"The file would take {layout.unsplit_bytes} bytes, not the {found.predicted_file_bytes} of the "
            "allocation, which another version of impq-edge made; make profile and allocation anew."
        )
    require_unchanged(directory, spec)  # tokenizer and card were read after the hash; the writer looks to the weights
    known = _written_before(out, layout)
    if known is not None:
        return known
    advance = in_mebibytes("writing, MiB", data_bytes(spec, types), progress)
    written = write_gguf(directory, layout, out, encoder=opened.encoder, threads=threads, progress=advance)
    first, *others = written.files
    artifact = Artifact(
        artifact=first.name,
        more_files=tuple(path.name for path in others),
        sha256=written.sha256,
        file_bytes=written.file_bytes,
        predicted_file_bytes=layout.file_bytes,
        model_sha256=spec.content_sha256,
        allocation_sha256=allocation_sha256,
        tensor_types=dict(types),
        encoding=opened.facts,
        bits_per_weight=8 * written.file_bytes / spec.weights,
    )
    artifact.save(record_path(out))
    shutil.rmtree(beside, ignore_errors=True)  # after the record: a run killed before finds all of it again
    return artifact


def imatrix(
    model: str | Source = DEMO,
    *,
    out: Path,
    calibration: Path | None = None,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
    compute: str | None = None,
    revision: str | None = None,
    progress: "Progress" = lambda *_: None,
) -> Imatrix:
    """Collect the importance matrix of a model on a text and write it as llama.cpp's GGUF.

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used.
    """
    from impq_edge.conversion.calibrated import collect_imatrix

    device = require_compute(compute)
    directory, spec = open_model(model, revision, progress)
    windows = calibration_windows(directory, calibration, calibration_tokens, DEFAULT_WINDOW_TOKENS)
    found = collect_imatrix(
        directory, spec, windows, calibration_text(calibration).name, device,
        lambda done, total: progress("calibrating, blocks", done, total),
    )  # fmt: skip
    found.write(out)
    return found


def uniform_types(spec: ModelSpec, kind: TensorType, outer: TensorType, allow_fallback: bool) -> TensorTypes:
    """Return the types of a uniform file: its blocks at ``kind``; floats and Q8_0 take the outside too."""
    if kind not in BLOCK_TYPES.values():
        outer = kind
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, kind, outer))
    return tensor_types(spec, [kind] * spec.n_blocks, outer)


def record_path(gguf: Path) -> Path:
    """Return where the record of a GGUF lies."""
    return gguf.with_name(f"{gguf.name}.json")


def _written_before(out: Path, layout: Layout) -> Artifact | None:
    """Return the record of a file that is whole and was made from the same inputs: its header tells all of them."""
    try:
        found = Artifact.load(record_path(out))
        with out.with_name(found.artifact).open("rb") as file:
            same = file.read(len(layout.pieces[0].header)) == layout.pieces[0].header
    except (RecordError, OSError):
        return None
    names = tuple(path.name for path in layout.paths(out))
    return found if same and names == (found.artifact, *found.more_files) and found.is_intact(out.parent) else None


def _file_type(kind: TensorType | str | None) -> TensorType:
    if kind not in FILE_TYPES:
        raise ConversionError(f"--type {kind!r} is not one of {', '.join(FILE_TYPES)}.")
    return TensorType(kind)
