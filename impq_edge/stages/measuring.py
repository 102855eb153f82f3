"""The stages that measure: SPQE's game, and the ladder of types."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from impq_edge.backends import load_backend
from impq_edge.conversion.layout import header_bytes
from impq_edge.data import data_path
from impq_edge.errors import SensitivityError
from impq_edge.impq.allocate import Request, allocate_blocks, budgets_of
from impq_edge.impq.allocation import PUBLISHED_TYPES
from impq_edge.lock import sole_maker
from impq_edge.model.players import players_of
from impq_edge.model.source import DEMO, Source
from impq_edge.model.spec import ModelSpec, require_unchanged
from impq_edge.records import is_plain_name, is_there, load_one_of, sha256_json
from impq_edge.spqe.estimate import Estimate
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions, stability_answer
from impq_edge.spqe.playing import CURVE, Rounds, curve, evaluations_for
from impq_edge.spqe.profile import Design, GameSettings, SensitivityProfile
from impq_edge.spqe.run import Limits, Measured, Workers, estimate_sensitivity, game_settings
from impq_edge.spqe.rungs import measure_ladder, measured_rungs
from impq_edge.spqe.table import Job, Progress
from impq_edge.stages.opening import calibration_windows, open_model, require_compute, require_rows, tokenizer_of


@sole_maker
def profile(
    model: str | Source = DEMO,
    *,
    out: Path,
    game: GameOptions | None = None,
    request: Request | Sequence[Request] | None = None,
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
        The allocation that must have stopped changing where ``game.until_stable`` is ``"allocation"``, or the one
        whose budgets rounds are played at where ``game.curve`` names no others. Several where a profile is to serve
        several devices.
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
    requests = () if request is None else (request,) if isinstance(request, Request) else tuple(request)
    if game.until_stable == "allocation" and not requests:
        raise SensitivityError(
            "--until-stable allocation needs a device; use it with build, or give average bits such as 2.5,3."
        )
    if game.is_ladder:
        raise SensitivityError("More types than 2 and 4 bit are measured one player at a time; call ladder instead.")
    job, header = _job(model, game, kept, revision, allow_fallback, progress)
    until_stable, answer = _stability(game, job.spec, header, requests)
    design = Design(game.estimator or "permutations", game.walks, game.seed, until_stable)
    if game.is_played_in_rounds:
        design = dataclasses.replace(design, estimator="stratified", rounds=_rounds(game, job.spec, header, requests))
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


@sole_maker
def ladder(
    model: str | Source = DEMO,
    *,
    out: Path,
    game: GameOptions,
    kept: Path | None = None,
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
    job, header = _job(model, game, kept, revision, allow_fallback, progress)
    journal = Journal(
        out.with_name(f"{out.name}.journal"), {"model": job.spec.content_sha256, **job.settings.identity()}
    )
    played, types = None, game.types
    if game.walks:
        played = profile(
            model, out=out.with_name(f"{out.stem}.game.json"),
            game=dataclasses.replace(game, types=PUBLISHED_TYPES, method="impq"), kept=kept,
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


def load_profile(name: Path | str) -> SensitivityProfile | LadderProfile:
    """Load a sensitivity profile or a ladder from a file, or by the name of one that ships with the package."""
    path = Path(name)
    if not is_there(path) and is_plain_name(str(name)) and (shipped := data_path("profiles", f"{name}.json")).exists():
        path = shipped
    found = load_one_of(path, SensitivityProfile, LadderProfile)
    assert isinstance(found, SensitivityProfile | LadderProfile)
    return found


def measured_types(found: SensitivityProfile | LadderProfile) -> tuple[int, ...]:
    """Return the bits that a record knows the cost of."""
    return found.types if isinstance(found, LadderProfile) else PUBLISHED_TYPES


def _job(
    model: str | Source,
    game: GameOptions,
    kept: Path | None,
    revision: str | None,
    allow_fallback: bool,
    progress: Progress,
) -> tuple[Job, int]:
    """Gather what a measurement needs, and the bytes of the model's GGUF before its tensor data."""
    backend = load_backend(game.backend, **game.backend_settings)
    device = require_compute(game.compute)
    directory, spec = open_model(model, revision, progress)
    require_rows(spec, allow_fallback)
    longest = max(game.tokens, 0 if backend.statistics == "none" else game.calibration_tokens)
    text = calibration_windows(directory, game.calibration, longest, game.window_tokens)
    windows, seen = text.first(game.tokens), text.first(game.calibration_tokens)
    settings = game_settings(
        game.backend, backend, windows, players=game.player_kind, device=device, calibration=seen,
        objective=game.measured_objective,
    )  # fmt: skip
    header = header_bytes(spec, tokenizer_of(directory, spec))
    require_unchanged(directory, spec)  # what was read of it now is what its record tells
    return Job(directory.resolve(), spec, backend, windows, settings, seen, kept), header


def _require_same_inputs(out: Path, model: ModelSpec, settings: GameSettings, job: Job) -> None:
    if model.content_sha256 != job.spec.content_sha256 or settings != job.settings:
        other = "settings" if model.content_sha256 == job.spec.content_sha256 else "files of the checkpoint"
        raise SensitivityError(
            f"{out} is a profile of other inputs ({other}); give another -o, or delete it to make it anew."
        )


def _told(measured: Measured) -> str:
    done = f"{measured.evaluations:,} evaluations, which recomputed {measured.recomputed_share:.0%} of the blocks"
    if measured.streamed_blocks:
        done += f"; {measured.streamed_blocks} blocks were streamed from host memory, for want of GPU memory"
    return f"{done}."


def _rounds(game: GameOptions, spec: ModelSpec, header: int, requests: Sequence[Request]) -> Rounds:
    """Return the rounds of a curve that serves all devices, or of the budgets of those that are known."""
    players = players_of(spec, game.player_kind)
    if requests and game.curve is None:
        budgets = [budgets_of(spec, header, request, game.player_kind) for request in requests]
    else:
        budgets = curve(players, game.targets or CURVE)
    return Rounds.within(budgets, evaluations_for(len(players), game.walks))


def _stability(
    game: GameOptions, spec: ModelSpec, header: int, requests: Sequence[Request]
) -> tuple[str, Callable[[Estimate], Hashable] | None]:
    """Return how a profile records what must have stopped changing, and the function that answers it."""
    if game.until_stable is None:
        return "", None
    if game.until_stable != "allocation":
        return game.until_stable, stability_answer(game.until_stable, spec, game.player_kind)

    def allocations(found: Estimate) -> tuple[tuple[int, ...], ...]:
        return tuple(
            allocate_blocks(spec, header, found.phi, found.covariance, "", request, game.player_kind).player_bits
            for request in requests
        )

    asked = requests[0] if len(requests) == 1 else requests
    return f"allocation {sha256_json(repr(asked))[:16]}", allocations
