"""The stages as functions: records in, records out. What the command line calls, and notebooks may."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from impq_edge.backends import load_backend
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.conversion.writer import Recipe, file_bytes, header_bytes, write_gguf
from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, KvType, load_device
from impq_edge.errors import ConversionError, SensitivityError
from impq_edge.ggml.types import TensorType
from impq_edge.impq.allocate import Request, allocate_blocks
from impq_edge.impq.allocation import BLOCK_TYPES, Allocation
from impq_edge.model.calibration import Windows, read_windows
from impq_edge.model.recipe import TensorTypes, data_bytes, fallbacks, require_no_fallback, tensor_types
from impq_edge.model.source import DEMO, Source, fetch, find
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.records import sha256_file
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.run import estimate_sensitivity, game_settings

Progress = Callable[[str, int, int], None]
"""Told the name of a phase, what is done and what there is in all; the unit is the phase's own."""

_MIB = 2**20

DEFAULT_PERMUTATIONS = 8  # a CPU's worth for the demo; the paper's setting is 100
DEFAULT_TOKENS = 4096
DEFAULT_WINDOW_TOKENS = 512
OUTER_TYPES = (TensorType.Q6_K, TensorType.Q8_0, TensorType.Q4_K, TensorType.F16)
FILE_TYPES = (TensorType.F32, TensorType.F16, TensorType.Q8_0, TensorType.Q4_K, TensorType.Q2_K)


def profile(
    model: str | Source = DEMO,
    *,
    out: Path,
    backend: str = "kquant",
    permutations: int = DEFAULT_PERMUTATIONS,
    tokens: int = DEFAULT_TOKENS,
    window_tokens: int = DEFAULT_WINDOW_TOKENS,
    calibration: Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    allow_fallback: bool = False,
    compute: str | None = None,
    progress: Progress = lambda *_: None,
) -> SensitivityProfile:
    """Estimate how much each block suffers at 2 bit (SPQE as published) and save it.

    Parameters
    ----------
    model
        ``"demo"``, a checkpoint directory, a hub id, or what :func:`impq_edge.model.source.find` found.
    out
        Where the profile is saved. Losses are kept in ``<out>.journal`` until it is whole; a killed run
        goes on from there, and a finished one with the same inputs is not redone.
    backend
        One of :data:`impq_edge.backends.NAMES`.
    permutations
        M walks; the paper's setting is 100.
    tokens, window_tokens
        Calibration tokens, cut into windows.
    calibration
        A UTF-8 text; the one that ships with the package by default.
    compute
        ``"cuda"`` or ``"cpu"``; CUDA when there is one by default.

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used; see the subclasses in :mod:`impq_edge.errors`.
    """
    directory, spec = open_model(model, revision, progress)
    require_rows(spec, allow_fallback)
    windows = calibration_windows(directory, calibration, tokens, window_tokens)
    chosen = load_backend(backend)
    settings = game_settings(
        backend, chosen, windows, n_permutations=permutations, seed=seed, device=compute or best_compute()
    )
    if out.exists():
        found = SensitivityProfile.load(out)
        if found.model == spec and found.settings == settings:
            return found
        raise SensitivityError(f"{out} is a profile of other inputs; give another -o, or delete it to make it anew.")
    journal = out.with_name(f"{out.name}.journal")
    header = header_bytes(spec, _tokenizer(directory, spec))
    measured = estimate_sensitivity(directory, spec, header, chosen, windows, settings, journal, progress)
    measured.profile.save(out)
    journal.unlink()
    return measured.profile


def allocate(
    profile: SensitivityProfile | Path,
    *,
    device: DeviceProfile | str,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    budget_bytes: int | None = None,
    average_bits: float | Fraction | None = None,
    alpha: float = 0.5,
    outer_type: TensorType | str = TensorType.Q6_K,
    out: Path | None = None,
) -> Allocation:
    """Solve IMPQ for a device: which blocks get 4 bit within its memory.

    Parameters
    ----------
    profile
        A sensitivity profile, or the file or shipped name of one.
    device
        A shipped name, a TOML file, or a loaded profile.
    context_tokens, kv_type
        What the KV cache must hold and how; the device's own defaults when None.
    budget_bytes, average_bits
        Further limits, on the file and on the blocks' nominal bits.
    alpha
        Damping of interactions, 1 drops them.
    outer_type
        Type of embedding and head.

    Raises
    ------
    AllocationError
        When the model does not fit even with every block at 2 bit.
    """
    found = load_profile(profile) if isinstance(profile, Path) else profile
    target = load_device(device) if isinstance(device, str) else device
    estimate = found.estimate()
    request = Request(
        device=target,
        context_tokens=context_tokens or target.context_tokens,
        kv_type=kv_type or target.kv_type,
        file_budget_bytes=budget_bytes,
        average_bits=None if average_bits is None else Fraction(average_bits).limit_denominator(10**6),
        alpha=alpha,
        outer_type=TensorType(outer_type),
    )
    allocation = allocate_blocks(
        found.model, found.header_bytes, estimate.phi, estimate.covariance, found.identity(), request
    )
    allocation.check(found.model)
    if out is not None:
        allocation.save(out)
    return allocation


def convert(
    model: str | Source = DEMO,
    *,
    out: Path,
    allocation: Allocation | Path | None = None,
    type: TensorType | str | None = None,
    outer_type: TensorType | str = TensorType.Q6_K,
    revision: str | None = None,
    allow_fallback: bool = False,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Artifact:
    """Write a checkpoint as one GGUF, with the types of an allocation or one type for all blocks.

    The record of the file is saved beside it as ``<out>.json``.

    Raises
    ------
    ConversionError
        When neither or both of ``allocation`` and ``type`` are given, or the type is none of
        :data:`FILE_TYPES`.
    AllocationError
        When the allocation was made for other weights.
    """
    if (allocation is None) == (type is None):
        raise ConversionError("Give either --allocation FILE or --type TYPE: what to store the blocks in.")
    directory, spec = open_model(model, revision, progress)
    if allocation is not None:
        found = Allocation.load(allocation) if isinstance(allocation, Path) else allocation
        found.check(spec)
        require_rows(spec, allow_fallback, found.outer_type)
        types: TensorTypes = found.tensor_types
        allocation_sha256: str | None = found.identity()
        recipe: Recipe = {
            "allocation_sha256": allocation_sha256,
            "profile_sha256": found.profile_sha256,
            "device": found.device[:64],
            "budget_bytes": found.budget_bytes,
        }
    else:
        kind, outer = _file_type(type), TensorType(outer_type)
        types = uniform_types(spec, kind, outer, allow_fallback)
        allocation_sha256, recipe = None, {"type": str(kind)}
    tokenizer = _tokenizer(directory, spec)
    predicted = file_bytes(spec, tokenizer, types)
    advance = _mebibytes("writing, MiB", data_bytes(spec, types), progress)
    written = write_gguf(
        directory, spec, tokenizer, types, out,
        recipe={**recipe, "model_sha256": spec.content_sha256}, threads=threads, progress=advance,
    )  # fmt: skip
    artifact = Artifact(
        artifact=out.name,
        sha256=sha256_file(out),
        file_bytes=written,
        predicted_file_bytes=predicted,
        model_sha256=spec.content_sha256,
        allocation_sha256=allocation_sha256,
        tensor_types=dict(types),
        bits_per_weight=8 * written / spec.weights,
    )
    artifact.save(record_path(out))
    return artifact


def open_model(
    model: str | Source, revision: str | None = None, progress: Progress = lambda *_: None
) -> tuple[Path, ModelSpec]:
    """Find a checkpoint, download what is missing of it, and read its record."""
    source = find(model, revision) if isinstance(model, str) else model
    directory = fetch(source, _mebibytes("downloading, MiB", source.download_bytes, progress))

    def hashed(done: int, total: int) -> None:
        progress("hashing the checkpoint, MiB", done // _MIB, total // _MIB)

    return directory, read_model(directory, source.name, hashed)


def record_path(gguf: Path) -> Path:
    """Return where the record of a GGUF lies."""
    return gguf.with_name(f"{gguf.name}.json")


def load_profile(name: Path | str) -> SensitivityProfile:
    """Load a sensitivity profile from a file, or by the name of one that ships with the package."""
    path, shipped = Path(name), data_path("profiles", f"{name}.json")
    if not path.exists() and Path(name).name == str(name) and shipped.exists():
        path = shipped
    return SensitivityProfile.load(path)


def calibration_windows(directory: Path, text: Path | None, tokens: int, window_tokens: int) -> Windows:
    """Cut windows from a text, the shipped calibration text by default."""
    return read_windows(directory, text or data_path("demo", "calibration.txt"), tokens, window_tokens)


def uniform_types(spec: ModelSpec, kind: TensorType, outer: TensorType, allow_fallback: bool) -> TensorTypes:
    """Return the types of a uniform file: its blocks at ``kind``; floats and Q8_0 take the outside too."""
    if kind not in BLOCK_TYPES.values():
        outer = kind
    blocks = [kind] * spec.n_blocks
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, blocks, outer))
    return tensor_types(spec, blocks, outer)


def require_rows(spec: ModelSpec, allow_fallback: bool, outer: TensorType = TensorType.Q6_K) -> None:
    """Refuse a model whose rows hold no K-quants, unless the substitution is allowed."""
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, [TensorType.Q2_K] * spec.n_blocks, outer))


def _file_type(kind: TensorType | str | None) -> TensorType:
    if kind not in FILE_TYPES:
        raise ConversionError(f"--type {kind!r} is not one of {', '.join(FILE_TYPES)}.")
    return TensorType(kind)


def _tokenizer(directory: Path, spec: ModelSpec) -> Tokenizer:
    return read_tokenizer(directory, spec.hyperparameters.vocabulary, spec.hyperparameters.architecture)


def _mebibytes(phase: str, total_bytes: int, progress: Progress) -> Callable[[int], None]:
    """Turn steps in bytes into a phase in MiB."""
    done_bytes = 0

    def advance(step_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes = min(done_bytes + step_bytes, total_bytes)
        progress(phase, done_bytes // _MIB, total_bytes // _MIB)

    return advance


def best_compute() -> str:
    """Return ``"cuda"`` where there is a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
