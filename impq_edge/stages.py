"""The stages as functions: records in, records out. What the command line calls, and notebooks may."""

import dataclasses
from collections.abc import Callable, Hashable
from fractions import Fraction
from pathlib import Path

from impq_edge.backends import load_backend
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.conversion.writer import Recipe, file_bytes, header_bytes, write_gguf
from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, KvType, load_device
from impq_edge.errors import AllocationError, ConversionError, SensitivityError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, require_feasible
from impq_edge.impq.allocation import Allocation
from impq_edge.model.calibration import Windows, read_windows
from impq_edge.model.recipe import TensorTypes, data_bytes, fallbacks, require_no_fallback, tensor_types
from impq_edge.model.source import DEMO, Source, fetch, find
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.records import sha256_file, sha256_json
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.options import GameOptions, stability_answer
from impq_edge.spqe.profile import Design, SensitivityProfile
from impq_edge.spqe.run import Limits, Measured, Workers, estimate_sensitivity, game_settings
from impq_edge.spqe.table import Job, Progress

_MIB = 2**20

OUTER_TYPES = (TensorType.Q6_K, TensorType.Q8_0, TensorType.Q4_K, TensorType.F16)
FILE_TYPES = (TensorType.F32, TensorType.F16, TensorType.Q8_0, TensorType.Q4_K, TensorType.Q2_K)


def profile(
    model: str | Source = DEMO,
    *,
    out: Path,
    game: GameOptions | None = None,
    request: Request | None = None,
    extend: bool = True,
    revision: str | None = None,
    allow_fallback: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> SensitivityProfile:
    """Estimate how much each player suffers at 2 bit (SPQE) and save it.

    Parameters
    ----------
    model
        ``"demo"``, a checkpoint directory, a hub id, or what :func:`impq_edge.model.source.find` found.
    out
        Where the profile is saved. Losses are kept in ``<out>.journal`` until it is whole; a run that was killed,
        or ended by its time limit, goes on from there. A finished profile with the same inputs is not redone;
        one of the same game with fewer permutations, or cut short, is gone on with.
    game
        How sensitivity is measured.
    request
        The allocation that must have stopped changing where ``game.until_stable`` is ``"allocation"``.
    extend
        Whether a profile that a time limit cut short is gone on with, or taken as it is.
    say
        Told what the game took: evaluations, and the share of the blocks they recomputed.

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used; see the subclasses in :mod:`impq_edge.errors`.
    """
    game = game or GameOptions()
    if game.until_stable == "allocation" and request is None:
        raise SensitivityError(
            "--until-stable allocation needs a device; use it with build, or give average bits such as 2.5,3."
        )
    backend = load_backend(game.backend, **game.backend_settings)
    device = require_compute(game.compute)
    directory, spec = open_model(model, revision, progress)
    require_rows(spec, allow_fallback)
    header = header_bytes(spec, _tokenizer(directory, spec))
    windows = calibration_windows(directory, game.calibration, game.tokens, game.window_tokens)
    settings = game_settings(game.backend, backend, windows, players=game.players, device=device)
    until_stable, answer = _stability(game, spec, header, request)
    design = Design(game.estimator, game.permutations, game.seed, until_stable)
    before = None
    if out.exists():
        found = SensitivityProfile.load(out)
        if found.model.content_sha256 != spec.content_sha256 or found.settings != settings:
            raise SensitivityError(
                f"{out} is a profile of other inputs; give another -o, or delete it to make it anew."
            )
        if found.design == design and (found.stopped_by != "time" or not extend):
            return found
        before = found
    journal = out.with_name(f"{out.name}.journal")
    measured = estimate_sensitivity(
        Job(directory.resolve(), spec, backend, windows, settings), header, design, journal, before=before,
        limits=Limits(answer, game.time_limit_s), workers=Workers(game.workers, game.ray_address), progress=progress,
    )  # fmt: skip
    measured.profile.save(out)
    if measured.journal_is_in_profile:  # and not losses of a round cut short, or of a larger design
        journal.unlink(missing_ok=True)
    say(_told(measured))
    return measured.profile


def _told(measured: Measured) -> str:
    done = f"{measured.evaluations:,} evaluations, which recomputed {measured.recomputed_share:.0%} of the blocks"
    if measured.streamed_blocks:
        done += f"; {measured.streamed_blocks} blocks were streamed from host memory, for want of GPU memory"
    return f"{done}."


def _stability(
    game: GameOptions, spec: ModelSpec, header: int, request: Request | None
) -> tuple[str, Callable[[Estimate], Hashable] | None]:
    """Return how a profile records what must have stopped changing, and the function that answers it."""
    if game.until_stable is None:
        return "", None
    if game.until_stable != "allocation":
        return game.until_stable, stability_answer(game.until_stable, spec, game.players)
    assert request is not None

    def allocation(found: Estimate) -> tuple[int, ...]:
        return allocate_blocks(spec, header, found.phi, found.covariance, "", request, game.players).player_bits

    return f"allocation {sha256_json(repr(request))[:16]}", allocation


def allocate(
    profile: SensitivityProfile | Path | str,
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
    found = profile if isinstance(profile, SensitivityProfile) else load_profile(profile)
    estimate = found.estimate()
    request = allocation_request(
        device, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes, average_bits=average_bits,
        alpha=alpha, outer_type=outer_type,
    )  # fmt: skip
    allocation = allocate_blocks(
        found.model, found.header_bytes, estimate.phi, estimate.covariance, found.identity(), request,
        found.settings.players,
    )  # fmt: skip
    allocation.check(found.model)
    if out is not None:
        allocation.save(out)
    return allocation


def allocation_request(
    device: DeviceProfile | str,
    *,
    context_tokens: int | None,
    kv_type: KvType | None,
    budget_bytes: int | None,
    average_bits: float | Fraction | None,
    alpha: float,
    outer_type: TensorType | str,
) -> Request:
    """Fill in the device's defaults; arguments as for :func:`allocate`."""
    target = load_device(device) if isinstance(device, str) else device
    if outer_type not in OUTER_TYPES:
        raise AllocationError(f"--head-type {outer_type!r} is not one of {', '.join(OUTER_TYPES)}.")
    if average_bits is not None and not 0 < average_bits < 100:  # NaN included
        raise AllocationError(f"--average-bits {average_bits} is outside 2…4, the bits of the two versions of a block.")
    return Request(
        device=target,
        context_tokens=target.context_tokens if context_tokens is None else context_tokens,
        kv_type=kv_type or target.kv_type,
        file_budget_bytes=budget_bytes,
        average_bits=None if average_bits is None else Fraction(average_bits).limit_denominator(10**6),
        alpha=alpha,
        outer_type=TensorType(outer_type),
    )


def require_allocatable(source: Source, spec: ModelSpec, request: Request) -> None:
    """Refuse what no allocation can meet, before a game is played for it; ``source`` has been fetched."""
    assert source.directory is not None
    require_feasible(spec, header_bytes(spec, _tokenizer(source.directory, spec)), request)


def convert(
    model: str | Source = DEMO,
    *,
    out: Path | str,
    allocation: Allocation | Path | str | None = None,
    type: TensorType | str | None = None,
    outer_type: TensorType | str | None = None,
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
        kind, outer = _file_type(type), TensorType(outer_type or TensorType.Q6_K)
        types = uniform_types(spec, kind, outer, allow_fallback)
        allocation_sha256, recipe = None, {"type": str(kind)}
    tokenizer = _tokenizer(directory, spec)
    predicted = file_bytes(spec, tokenizer, types)
    if allocation is not None and predicted != found.predicted_file_bytes:
        raise ConversionError(
            f"The file would take {predicted} bytes, not the {found.predicted_file_bytes} of the allocation, which "
            "another version of impq-edge made; make profile and allocation anew."
        )
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
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, kind, outer))
    return tensor_types(spec, [kind] * spec.n_blocks, outer)


def require_rows(spec: ModelSpec, allow_fallback: bool, outer: TensorType = TensorType.Q6_K) -> None:
    """Refuse a model whose rows hold no K-quants, unless the substitution is allowed."""
    if not allow_fallback:
        require_no_fallback(fallbacks(spec, TensorType.Q2_K, outer))


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


def require_compute(compute: str | None) -> str:
    """Return where the game is played: what was asked for, else CUDA where there is a GPU.

    Raises
    ------
    SensitivityError
        When CUDA is asked for and there is none.
    """
    import torch

    if compute == "cuda" and not torch.cuda.is_available():
        raise SensitivityError("--compute cuda was asked for, but PyTorch sees no GPU; use --compute cpu.")
    return compute or ("cuda" if torch.cuda.is_available() else "cpu")
