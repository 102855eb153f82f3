"""The stages as functions: records in, records out. What the command line calls, and notebooks may."""

import dataclasses
import shutil
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from impq_edge.backends import load_backend
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.card import read_card
from impq_edge.conversion.encoder import EncodeOptions, open_encoder
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.layout import Layout, Recipe, header_bytes, plan_gguf
from impq_edge.conversion.metadata import Origin
from impq_edge.conversion.tokenizer import Tokenizer, read_tokenizer
from impq_edge.conversion.writer import write_gguf
from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, KvType, load_device
from impq_edge.errors import AllocationError, ConversionError, RecordError, SensitivityError
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.impq.allocate import Request, allocate_blocks, allocate_ladder, require_feasible
from impq_edge.impq.allocation import PUBLISHED_TYPES, Allocation
from impq_edge.model.calibration import Windows, read_windows
from impq_edge.model.players import PlayerKind
from impq_edge.model.recipe import TensorTypes, data_bytes, fallbacks, require_no_fallback, tensor_types
from impq_edge.model.source import DEMO, Source, fetch, find
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.records import load_one_of, sha256_json
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import DEFAULT_CALIBRATION_TOKENS, DEFAULT_WINDOW_TOKENS, GameOptions, stability_answer
from impq_edge.spqe.profile import Design, GameSettings, SensitivityProfile
from impq_edge.spqe.run import Limits, Measured, Workers, estimate_sensitivity, game_settings
from impq_edge.spqe.rungs import measure_ladder, measured_rungs
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
    kept: Path | None = None,
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
    kept
        A directory for what calibrated encoders make, which :func:`convert` can use.
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
    if game.is_ladder:
        raise SensitivityError("More types than 2 and 4 bit are measured one player at a time; call ladder instead.")
    job, header = _job(model, game, revision, allow_fallback, progress)
    job = dataclasses.replace(job, kept=kept)
    until_stable, answer = _stability(game, job.spec, header, request)
    design = Design(game.estimator, game.walks, game.seed, until_stable)
    before = None
    if out.exists():
        found = SensitivityProfile.load(out)
        _require_same_inputs(out, found.model, found.settings, job)
        if found.design == design and (found.stopped_by != "time" or not extend):
            return found
        before = found
    journal = out.with_name(f"{out.name}.journal")
    measured = estimate_sensitivity(
        job, header, design, journal, before=before,
        limits=Limits(answer, game.time_limit_s), workers=Workers(game.workers, game.ray_address), progress=progress,
    )  # fmt: skip
    measured.profile.save(out)
    if measured.journal_is_in_profile:  # and not losses of a round cut short, or of a larger design
        journal.unlink(missing_ok=True)
    say(_told(measured))
    return measured.profile


def ladder(
    model: str | Source = DEMO,
    *,
    out: Path,
    game: GameOptions,
    revision: str | None = None,
    allow_fallback: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> LadderProfile:
    """Measure what each player, embedding and head included, costs at each of ``game.types``, and save it.

    Where ``game.permutations`` asks for it, the published game is played as well, for the interactions of the players
    in the blocks; its profile is saved beside ``out`` as ``<stem>.game.json``. Other arguments as for
    :func:`profile`; a killed run goes on, and a finished ladder of the same game is extended by types it lacks.
    """
    job, header = _job(model, game, revision, allow_fallback, progress)
    journal = Journal(
        out.with_name(f"{out.name}.journal"), {"model": job.spec.content_sha256, **dataclasses.asdict(job.settings)}
    )
    played, types = None, game.types
    if game.walks:
        played = profile(
            model, out=out.with_name(f"{out.stem}.game.json"), game=dataclasses.replace(game, types=PUBLISHED_TYPES),
            revision=revision, allow_fallback=allow_fallback, say=say, progress=progress,
        )  # fmt: skip
    if out.exists():
        found = LadderProfile.load(out)
        _require_same_inputs(out, found.model, found.settings, job)
        if set(game.types) <= set(found.types) and found.game_sha256 == (played and played.identity()):
            return found
        types = tuple(sorted({*game.types, *found.types}))
        for key, divergences in measured_rungs(found).items():
            journal.losses.setdefault(key, divergences)
    made = measure_ladder(job, types, header, journal, progress)
    if played is not None:
        made = dataclasses.replace(made, covariance=played.covariance, game_sha256=played.identity())
    made.save(out)
    journal.path.unlink(missing_ok=True)
    return made


def _job(
    model: str | Source, game: GameOptions, revision: str | None, allow_fallback: bool, progress: Progress
) -> tuple[Job, int]:
    """Gather what a measurement needs, and the bytes of the model's GGUF before its tensor data."""
    backend = load_backend(game.backend, **game.backend_settings)
    device = require_compute(game.compute)
    directory, spec = open_model(model, revision, progress)
    require_rows(spec, allow_fallback)
    longest = max(game.tokens, 0 if backend.statistics == "none" else game.calibration_tokens)
    text = calibration_windows(directory, game.calibration, longest, game.window_tokens)
    windows, seen = text.first(game.tokens), text.first(game.calibration_tokens)
    settings = game_settings(game.backend, backend, windows, players=game.players, device=device, calibration=seen)
    return Job(directory.resolve(), spec, backend, windows, settings, seen), header_bytes(
        spec, _tokenizer(directory, spec)
    )


def _require_same_inputs(out: Path, model: ModelSpec, settings: GameSettings, job: Job) -> None:
    if model.content_sha256 != job.spec.content_sha256 or settings != job.settings:
        raise SensitivityError(f"{out} is a profile of other inputs; give another -o, or delete it to make it anew.")


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
    profile: SensitivityProfile | LadderProfile | Path | str,
    *,
    device: DeviceProfile | str,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    budget_bytes: int | None = None,
    average_bits: float | Fraction | None = None,
    alpha: float = 0.5,
    outer_type: TensorType | str = TensorType.Q6_K,
    types: Sequence[int] | None = None,
    out: Path | None = None,
) -> Allocation:
    """Solve IMPQ for a device: how many bits each player gets within its memory.

    Parameters
    ----------
    profile
        A sensitivity profile or a ladder, or the file or shipped name of one.
    device
        A shipped name, a TOML file, or a loaded profile.
    context_tokens, kv_type
        What the KV cache must hold and how; the device's own defaults when None.
    budget_bytes, average_bits
        Further limits, on the file and on the blocks' nominal bits.
    alpha
        Damping of interactions, 1 drops them.
    outer_type
        Type of embedding and head, where they are no players.
    types
        Bits to choose from; what was measured by default.

    Raises
    ------
    AllocationError
        When the model does not fit even at the fewest bits.
    """
    found = load_profile(profile) if isinstance(profile, Path | str) else profile
    request = allocation_request(
        device, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes, average_bits=average_bits,
        alpha=alpha, outer_type=outer_type, types=types or measured_types(found),
    )  # fmt: skip
    if isinstance(found, LadderProfile):
        covariance = None if found.covariance is None else np.array(found.covariance)
        allocation = allocate_ladder(
            found.model, found.header_bytes, found.divergences(request.types), covariance, found.identity(), request,
            found.settings.players,
        )  # fmt: skip
    else:
        estimate = found.estimate()
        allocation = allocate_blocks(
            found.model, found.header_bytes, estimate.phi, estimate.covariance, found.identity(), request,
            found.settings.players,
        )  # fmt: skip
    allocation.check(found.model)
    if out is not None:
        allocation.save(out)
    return allocation


def measured_types(found: SensitivityProfile | LadderProfile) -> tuple[int, ...]:
    """Return the bits that a record knows the cost of."""
    return found.types if isinstance(found, LadderProfile) else PUBLISHED_TYPES


def allocation_request(
    device: DeviceProfile | str,
    *,
    context_tokens: int | None,
    kv_type: KvType | None,
    budget_bytes: int | None,
    average_bits: float | Fraction | None,
    alpha: float,
    outer_type: TensorType | str,
    types: Sequence[int] = PUBLISHED_TYPES,
) -> Request:
    """Fill in the device's defaults; arguments as for :func:`allocate`."""
    target = load_device(device) if isinstance(device, str) else device
    if outer_type not in OUTER_TYPES:
        raise AllocationError(f"--head-type {outer_type!r} is not one of {', '.join(OUTER_TYPES)}.")
    if average_bits is not None and not 0 < average_bits < 100:  # NaN included
        raise AllocationError(
            f"--average-bits {average_bits} is outside {types[0]}…{types[-1]}, the bits to choose from."
        )
    return Request(
        device=target,
        context_tokens=target.context_tokens if context_tokens is None else context_tokens,
        kv_type=kv_type or target.kv_type,
        file_budget_bytes=budget_bytes,
        average_bits=None if average_bits is None else Fraction(average_bits).limit_denominator(10**6),
        alpha=alpha,
        outer_type=TensorType(outer_type),
        types=tuple(types),
    )


def require_allocatable(source: Source, spec: ModelSpec, request: Request, players: PlayerKind) -> None:
    """Refuse what no allocation can meet, before a game is played for it; ``source`` has been fetched."""
    assert source.directory is not None
    require_feasible(spec, header_bytes(spec, _tokenizer(source.directory, spec)), request, players)


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
    progress: Progress = lambda *_: None,
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
    else:
        kind, outer = _file_type(type), TensorType(outer_type or TensorType.Q6_K)
        types = uniform_types(spec, kind, outer, allow_fallback)
        allocation_sha256, recipe = None, {"type": str(kind)}
    tokenizer = _tokenizer(directory, spec)
    encode = encode or EncodeOptions()
    beside = out.with_name(f"{out.name}.encoded")
    opened = open_encoder(
        directory, spec, types, encode, encode.calibration or data_path("demo", "calibration.txt"),
        require_compute(encode.compute), kept or beside,
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
    known = _written_before(out, layout)
    if known is not None:
        return known
    advance = _mebibytes("writing, MiB", data_bytes(spec, types), progress)
    written = write_gguf(directory, layout, out, encoder=opened.encoder, threads=threads, progress=advance)
    shutil.rmtree(beside, ignore_errors=True)
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
    return artifact


def imatrix(
    model: str | Source = DEMO,
    *,
    out: Path,
    calibration: Path | None = None,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
    compute: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda *_: None,
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
    text = calibration or data_path("demo", "calibration.txt")
    windows = read_windows(directory, text, calibration_tokens, DEFAULT_WINDOW_TOKENS)
    found = collect_imatrix(
        directory, spec, windows, text.name, device, lambda done, total: progress("calibrating, blocks", done, total)
    )
    found.write(out)
    return found


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


def load_profile(name: Path | str) -> SensitivityProfile | LadderProfile:
    """Load a sensitivity profile or a ladder from a file, or by the name of one that ships with the package."""
    path, shipped = Path(name), data_path("profiles", f"{name}.json")
    if not path.exists() and Path(name).name == str(name) and shipped.exists():
        path = shipped
    found = load_one_of(path, SensitivityProfile, LadderProfile)
    assert isinstance(found, SensitivityProfile | LadderProfile)
    return found


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
