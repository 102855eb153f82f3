"""The pipeline: one checkpoint and one device in, a validated GGUF with its records and report out.

Every stage saves its record; a stage whose record is there and was made from the same inputs is not redone.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from impq_edge.backends import load_backend, load_recorded
from impq_edge.backends.kquant import KQuant
from impq_edge.conversion.artifact import Artifact
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.data import data_path
from impq_edge.devices.memory import MemoryPlan, memory_plan
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.errors import RecordError, ValidationError
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import BLOCK_TYPES
from impq_edge.impq.allocate import Request
from impq_edge.impq.allocation import Allocation
from impq_edge.model.calibration import DEFAULT_WINDOW_TOKENS
from impq_edge.model.players import players_of
from impq_edge.model.source import DEMO, find
from impq_edge.model.spec import ModelSpec
from impq_edge.records import atomic_path, read_text
from impq_edge.releases.lent import BackendLosses, measure_lent
from impq_edge.releases.page import write_page
from impq_edge.releases.preview import Preview, preview
from impq_edge.releases.report import Comparison, backend_name, render
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.playing import evaluations_for
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.table import Progress
from impq_edge.stages import (
    allocate,
    allocation_request,
    calibration_windows,
    chooses,
    convert,
    ladder,
    load_profile,
    measured_types,
    open_model,
    profile,
    require_allocatable,
    require_compute,
    require_no_program,
    require_rows,
)
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.validate import DEFAULT_WINDOWS, FILL_S, MIN_CONTEXT_TOKENS, request_sha256, validate

Say = Callable[[str], None]
"""Told a sentence a person should read now."""


@dataclasses.dataclass(frozen=True)
class Build:
    """What a build made."""

    directory: Path
    device: DeviceProfile
    profile: SensitivityProfile | LadderProfile
    allocation: Allocation
    artifact: Artifact
    validation: ValidationReport
    uniform: dict[int, tuple[Artifact, ValidationReport]]  # bits of all blocks → the file and its measures
    plan: MemoryPlan


def build(
    device: DeviceProfile | str,
    *,
    out: Path,
    model: str = DEMO,
    revision: str | None = None,
    game: GameOptions | None = None,
    sensitivity: Path | None = None,
    context_tokens: int | None = None,
    kv_type: KvType | None = None,
    budget_bytes: int | None = None,
    average_bits: float | Fraction | None = None,
    min_generation_tok_per_s: float | None = None,
    alpha: float | None = None,
    outer_type: str = "q6_k",
    allow_fallback: bool = False,
    encode: str | None = None,
    text: Path | None = None,
    windows: int = DEFAULT_WINDOWS,
    command: str = "",
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Build:
    """Run every stage and write the GGUF, the records, ``report.md`` and ``report.html`` into ``out``.

    Parameters
    ----------
    device
        A shipped name, a TOML file, or a loaded profile.
    out
        A directory, of its own for every build; an unfinished one is gone on with.
    game
        How sensitivity is measured.
    sensitivity
        A finished sensitivity profile or ladder of this model, which spares the longest stage.
    encode
        How the file's K-quants are encoded; as in the game where that is played with K-quants.
    command
        The command that asked for the build, for the report.
    say
        Told what the build will cost before it starts, and what it decided.

    The other parameters are those of :func:`impq_edge.profile`, :func:`impq_edge.allocate`,
    :func:`impq_edge.convert` and :func:`impq_edge.validate`.

    Raises
    ------
    ImpqError
        One sentence for whatever cannot be used.
    """
    target = load_device(device) if isinstance(device, str) else device
    game, encoding = _agreed(game or GameOptions(), encode)
    given = None if sensitivity is None else load_profile(sensitivity)
    request = allocation_request(
        target, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes, average_bits=average_bits,
        min_generation_tok_per_s=min_generation_tok_per_s, alpha=alpha, outer_type=outer_type,
        types=game.types if given is None or game.is_ladder else measured_types(given),
    )  # fmt: skip
    if game.is_played_in_rounds if given is None else chooses(given, game.method):
        require_no_program(alpha)
    text_path = text or data_path("demo", "evaluation.txt")
    _require_measurable(text_path, windows, request)
    source = find(model, revision)
    say(f"Model: {source.summary()}.")
    directory, spec = open_model(source, progress=progress)
    source = dataclasses.replace(source, directory=directory)
    require_rows(spec, allow_fallback)
    require_allocatable(source, spec, request, game.players)
    profile_path, kept = out / "sensitivity.json", out / "encoded"
    done = given is not None or profile_path.exists()
    say(_told(_preview(spec, game, encoding, windows, played=done), out))
    if game.is_played_in_rounds and not done:
        evaluations = evaluations_for(len(players_of(spec, game.players)), game.walks)
        say(f"The game is played in rounds, {evaluations:,} evaluations at most; the best that they measure is taken.")

    if given is not None and sensitivity is not None:
        found = given
        _require_same_model(found, spec, sensitivity)
        _require_same_text(found, directory, encoding, sensitivity)
    elif game.is_ladder:
        found = ladder(source, out=profile_path, game=game, allow_fallback=allow_fallback, say=say, progress=progress)
    else:
        found = profile(
            source, out=profile_path, game=game, request=request, extend=False, kept=kept,
            allow_fallback=allow_fallback, say=say, progress=progress,
        )  # fmt: skip
    allocation = allocate(
        found, device=target, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes,
        average_bits=average_bits, min_generation_tok_per_s=min_generation_tok_per_s, method=game.method, alpha=alpha,
        outer_type=outer_type, types=request.types, out=out / "allocation.json",
    )  # fmt: skip
    _tell_allocation(allocation, say)

    def finish(name: str, bits: int | None) -> tuple[Artifact, ValidationReport]:
        artifact = convert(
            source, out=out / name, allocation=allocation if bits is None else None,
            type=None if bits is None else BLOCK_TYPES[bits],
            outer_type=None if bits is None else allocation.outer_type,
            encode=encoding, kept=kept, allow_fallback=allow_fallback, say=say if bits is None else lambda _: None,
            progress=progress,
        )  # fmt: skip
        report = _validated(out / name, artifact, target, allocation, text_path, windows, bits is None, progress)
        return artifact, report

    artifact, validation = finish(_file_name(spec, allocation), None)
    compared = {
        bits: (artifact, validation)
        if set(allocation.player_bits) == {bits}
        else finish(f"uniform-{bits}bit.gguf", bits)
        for bits in (4, 2)
    }
    losses = None
    if isinstance(found, SensitivityProfile) and not _is_what_ships(found, encoding):
        losses = measure_lent(directory, found, allocation, encoding, out / "backend-losses.json", progress)
        if losses.matters:
            say(losses.warning(backend_name(found)))
    plan = memory_plan(
        spec, allocation.tensor_types, artifact.file_bytes, target,
        context_tokens=allocation.context_tokens, kv_type=allocation.kv_type,
    )  # fmt: skip
    made = Build(out, target, found, allocation, artifact, validation, compared, plan)
    compared_with = _comparison(made, losses)
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(render(compared_with, command), "utf-8")
    write_page(compared_with, command, out / "report.html", say)
    shutil.rmtree(kept, ignore_errors=True)
    return made


def _agreed(game: GameOptions, encode: str | None) -> tuple[GameOptions, EncodeOptions]:
    """Refuse what cannot run before anything is downloaded; a game with K-quants and the file have one encoder."""
    if game.backend == "kquant" and encode is not None:
        game = dataclasses.replace(game, backend_settings={**game.backend_settings, "encode": encode})
    backend = load_backend(game.backend, **game.backend_settings)
    return game, EncodeOptions(
        encode=backend.encode if isinstance(backend, KQuant) else encode, calibration=game.calibration,
        calibration_tokens=game.calibration_tokens, window_tokens=game.window_tokens,
        compute=require_compute(game.compute),
    )  # fmt: skip


def summary(made: Build) -> dict[str, object]:
    """Return what ``build --json`` prints."""
    return {
        "artifact": str(made.directory / made.artifact.artifact),
        "sha256": made.artifact.sha256,
        "file_bytes": made.artifact.file_bytes,
        "predicted_file_bytes": made.artifact.predicted_file_bytes,
        "budget_bytes": made.allocation.budget_bytes,
        "average_bits": made.allocation.average_bits,
        "bits_per_weight": made.artifact.bits_per_weight,
        "tensor_types": made.artifact.tensor_types,
        "player_bits": list(made.allocation.player_bits),
        "device": made.device.name,
        "speeds": made.allocation.to_json()["speeds"],
        "objective": made.allocation.objective,
        "lower_bound": made.allocation.lower_bound,
        **({"evidence": made.allocation.to_json()["evidence"]} if made.allocation.evidence else {}),
        "validation": made.validation.to_json(),
        "uniform": {f"{bits}bit": report.to_json() for bits, (_, report) in made.uniform.items()},
        "report": str(made.directory / "report.md"),
        "page": str(page) if (page := made.directory / "report.html").exists() else None,
    }


def _preview(spec: ModelSpec, game: GameOptions, encoding: EncodeOptions, windows: int, *, played: bool) -> Preview:
    n_players = len(players_of(spec, game.players))
    evaluations = game.walks * (n_players - 1) + 2 if game.walks else 0
    files, inside = 3, sum(tensor.weights for tensor in spec.tensors if tensor.block is not None)
    solved = spec.weights - inside
    if played or game.backend != "kquant":
        solved += files * inside
    elif game.is_ladder:
        evaluations += len(game.types) * (n_players + 1)
        solved += (len(game.types) + files) * spec.weights
    else:  # the files hold what the game encodes
        solved += len(game.types) * inside
    return preview(
        spec,
        evaluations=0 if played else evaluations,
        solved_weights=solved if encoding.encoder == "gptq" else 0,
        tokens=game.tokens,
        validation_tokens=windows * DEFAULT_WINDOW_TOKENS,
        files=files,
        compute=require_compute(encoding.compute),
    )


def _told(cost: Preview, out: Path) -> str:
    mib = 2**20
    minutes = cost.seconds / 60
    time = f"about {minutes:.0f} minutes" if minutes >= 2 else "about a minute or two"
    return (
        f"This writes up to {cost.write_bytes / mib:,.0f} MiB to {out}, holds about "
        f"{cost.memory_bytes / mib:,.0f} MiB of weights in memory, and takes {time} on this machine."
    )


def _tell_allocation(allocation: Allocation, say: Say) -> None:
    left = allocation.budget_bytes - allocation.predicted_file_bytes
    if allocation.everything_fits:
        say(
            f"Everything fits {allocation.device} at {allocation.types[-1]} bit; {left / 2**20:,.1f} MiB would be left."
        )
    else:
        counts = Counter(allocation.player_bits)
        players = ", ".join(f"{counts[bits]} at {bits}" for bits in allocation.types if counts[bits])
        known = allocation.evidence.told() if allocation.evidence else "proven optimal for the profile"
        say(
            f"Of {len(allocation.player_bits)} players {players} bit, "
            f"{allocation.average_bits:.2f} bits on average, "
            f"{allocation.predicted_file_bytes:,} bytes; {known}."
        )
    if allocation.speeds is not None:
        say(f"Speed {allocation.speeds.summary(allocation.device)}.")


def _require_same_model(found: SensitivityProfile | LadderProfile, spec: ModelSpec, path: Path) -> None:
    if found.model.content_sha256 != spec.content_sha256:
        raise RecordError(
            f"{path} is a profile of {found.model.name} ({found.model.content_sha256[:12]}…), not of {spec.name} "
            f"({spec.content_sha256[:12]}…); leave --profile out to make one of this model."
        )


def _require_same_text(
    found: SensitivityProfile | LadderProfile, directory: Path, encoding: EncodeOptions, path: Path
) -> None:
    """Another backend's losses are compared on the profile's own text, so that must be at hand."""
    if _is_what_ships(found, encoding):
        return
    windows = calibration_windows(directory, encoding.calibration, found.settings.tokens, found.settings.window_tokens)
    if windows.text_sha256 != found.settings.text_sha256:
        raise RecordError(f"{path} was made on another calibration text than this; give that text with --calibration.")


def _require_measurable(text: Path, windows: int, request: Request) -> None:
    """Refuse what validation would only refuse at the end."""
    read_text(text)
    if windows < 1:
        raise ValidationError(f"--windows {windows} is too few; ask for 1 or more.")
    if request.context_tokens < MIN_CONTEXT_TOKENS:
        raise ValidationError(
            f"--context {request.context_tokens} is too short to be measured; ask for {MIN_CONTEXT_TOKENS} or more."
        )


def _file_name(spec: ModelSpec, allocation: Allocation) -> str:
    return f"{spec.name}-{Path(allocation.device).name}-IMPQ-{allocation.bits_per_weight:.2f}bpw.gguf"


def _validated(
    path: Path,
    artifact: Artifact,
    device: DeviceProfile,
    allocation: Allocation,
    text: Path,
    windows: int,
    ships: bool,
    progress: Progress,
) -> ValidationReport:
    """Measure a file, unless the record of the same measurement is there already.

    The device's limit of memory, and the check of it that fills the whole context, are for the file that ships: one
    that it is compared with may be too large for the device.
    """
    fill_s = FILL_S if ships else 0.0
    context_tokens, kv_type = allocation.context_tokens, allocation.kv_type
    wanted = request_sha256(
        device, text, windows=windows, context_tokens=context_tokens, kv_type=kv_type, fill_s=fill_s
    )
    record = path.with_name(f"{path.name}.validation.json")
    if record.exists():
        found = ValidationReport.load(record)
        if found.sha256 == artifact.sha256 and found.request_sha256 == wanted:
            return found
    report = validate(
        path, device=device, text=text, windows=windows, context_tokens=allocation.context_tokens,
        kv_type=allocation.kv_type, fill_s=fill_s, memory_limit_bytes="device" if ships else None, progress=progress,
    )  # fmt: skip
    report.save(record)
    return report


def _is_what_ships(found: SensitivityProfile | LadderProfile, encoding: EncodeOptions) -> bool:
    """Whether sensitivity was measured with the encoder that the writer uses."""
    recorded = found.settings.backend
    return recorded.get("name") == "kquant" and load_recorded(recorded) == KQuant(encoding.encoder)


def _comparison(made: Build, losses: BackendLosses | None) -> Comparison:
    return Comparison(
        device=made.device,
        profile=made.profile,
        allocation=made.allocation,
        mix=(made.artifact, made.validation),
        uniform=made.uniform,
        plan=made.plan,
        backend_losses=losses,
    )
