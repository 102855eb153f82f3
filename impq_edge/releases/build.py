"""The pipeline: one checkpoint and one device in, a validated GGUF with its records and report out.

Every stage saves its record; a stage whose record is there and was made from the same inputs is not redone.
"""

import dataclasses
import shutil
from fractions import Fraction
from pathlib import Path

from impq_edge.conversion.artifact import Artifact
from impq_edge.data import data_path
from impq_edge.devices.memory import MemoryPlan, memory_plan
from impq_edge.devices.profile import DeviceProfile, load_device
from impq_edge.ggml.cache import KvType
from impq_edge.ggml.types import BLOCK_TYPES
from impq_edge.impq.allocation import Allocation
from impq_edge.lock import alone
from impq_edge.model.source import DEMO, find
from impq_edge.records import atomic_path
from impq_edge.releases.agreement import (
    agreed,
    require_measurable,
    require_same_model,
    require_same_text,
)
from impq_edge.releases.comparison import THIS_FILE, Comparison, Scored, all_at
from impq_edge.releases.lent import BackendLosses, lent_losses
from impq_edge.releases.naming import file_name
from impq_edge.releases.page import write_page
from impq_edge.releases.preview import evaluations_of, preview_of
from impq_edge.releases.report import render
from impq_edge.releases.telling import Say, say_allocation
from impq_edge.releases.trial import validated
from impq_edge.releases.within import require_within
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.table import Progress
from impq_edge.stages import (
    allocate,
    allocation_request,
    chooses,
    convert,
    ladder,
    load_profile,
    measured_types,
    open_model,
    profile,
    require_allocatable,
    require_no_program,
    require_rows,
)
from impq_edge.validation.report import ValidationReport
from impq_edge.validation.validate import DEFAULT_WINDOWS


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


@alone
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
    require_within(out)
    target = load_device(device) if isinstance(device, str) else device
    game, encoding = agreed(game or GameOptions(), encode)
    given = None if sensitivity is None else load_profile(sensitivity)
    request = allocation_request(
        target, context_tokens=context_tokens, kv_type=kv_type, budget_bytes=budget_bytes, average_bits=average_bits,
        min_generation_tok_per_s=min_generation_tok_per_s, alpha=alpha, outer_type=outer_type,
        types=game.types if given is None or game.is_ladder else measured_types(given),
    )  # fmt: skip
    if game.is_played_in_rounds if given is None else chooses(given, game.method):
        require_no_program(alpha)
    text_path = text or data_path("demo", "evaluation.txt")
    require_measurable(text_path, windows, request)
    source = find(model, revision)
    say(f"Model: {source.summary()}.")
    directory, spec = open_model(source, progress=progress)
    source = dataclasses.replace(source, directory=directory, content_sha256=spec.content_sha256)
    require_rows(spec, allow_fallback)
    require_allocatable(source, spec, request, game.player_kind)
    profile_path, kept = out / "sensitivity.json", out / "encoded"
    done = given is not None or profile_path.exists()
    say(preview_of(spec, game, encoding, windows, played=done).told(out))
    if game.is_played_in_rounds and not done:
        evaluations = evaluations_of(spec, game)
        say(f"The game is played in rounds, {evaluations:,} evaluations at most; the best that they measure is taken.")

    if given is not None and sensitivity is not None:
        found = given
        require_same_model(found, spec, sensitivity)
        require_same_text(found, directory, encoding, sensitivity)
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
    say_allocation(allocation, say)

    def finish(name: str, bits: int | None) -> tuple[Artifact, ValidationReport]:
        artifact = convert(
            source, out=out / name, allocation=allocation if bits is None else None,
            type=None if bits is None else BLOCK_TYPES[bits],
            outer_type=None if bits is None else allocation.outer_type,
            encode=encoding, kept=kept, allow_fallback=allow_fallback, say=say if bits is None else lambda _: None,
            progress=progress,
        )  # fmt: skip
        report = validated(out / name, artifact, target, allocation, text_path, windows, bits is None, progress)
        return artifact, report

    artifact, validation = finish(file_name(allocation), None)
    compared = {
        bits: (artifact, validation)
        if set(allocation.player_bits) == {bits}
        else finish(f"uniform-{bits}bit.gguf", bits)
        for bits in (4, 2)
    }
    losses = lent_losses(directory, found, {out / "backend-losses.json": allocation}, encoding, say, progress)
    plan = memory_plan(
        spec, allocation.tensor_types, artifact.file_bytes, target,
        context_tokens=allocation.context_tokens, kv_type=allocation.kv_type,
    )  # fmt: skip
    made = Build(out, target, found, allocation, artifact, validation, compared, plan)
    compared_with = _comparison(made, losses[0] if losses else None)
    with atomic_path(out / "report.md") as temporary:
        temporary.write_text(render(compared_with, command), "utf-8")
    write_page(compared_with, command, out / "report.html", say)
    shutil.rmtree(kept, ignore_errors=True)
    return made


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


def _comparison(made: Build, losses: BackendLosses | None) -> Comparison:
    return Comparison(
        device=made.device,
        profile=made.profile,
        allocation=made.allocation,
        mix=(made.artifact, made.validation),
        files={THIS_FILE: Scored.of(made.artifact, made.validation)}
        | {all_at(bits): Scored.of(*both) for bits, both in made.uniform.items()},
        plan=made.plan,
        backend_losses=losses,
    )
