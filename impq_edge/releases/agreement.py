"""What must hold before anything is made: game and file have one encoder, a given profile is this model's."""

import dataclasses
from pathlib import Path

from impq_edge.backends import load_backend, load_recorded
from impq_edge.backends.kquant import KQuant
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.errors import RecordError, ValidationError
from impq_edge.impq.allocate import Request
from impq_edge.model.spec import ModelSpec
from impq_edge.records import read_text
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.stages import calibration_windows, require_compute
from impq_edge.validation.validate import MIN_CONTEXT_TOKENS


def agreed(game: GameOptions, encode: str | None) -> tuple[GameOptions, EncodeOptions]:
    """Refuse what cannot run before anything is downloaded; a game with K-quants and the file have one encoder."""
    if game.backend == "kquant" and encode is not None:
        game = dataclasses.replace(game, backend_settings={**game.backend_settings, "encode": encode})
    backend = load_backend(game.backend, **game.backend_settings)
    return game, EncodeOptions(
        encode=backend.encode if isinstance(backend, KQuant) else encode, calibration=game.calibration,
        calibration_tokens=game.calibration_tokens, window_tokens=game.window_tokens,
        compute=require_compute(game.compute),
    )  # fmt: skip


def require_same_model(found: SensitivityProfile | LadderProfile, spec: ModelSpec, path: Path) -> None:
    if found.model.content_sha256 != spec.content_sha256:
        raise RecordError(
            f"{path} is a profile of {found.model.name} ({found.model.content_sha256[:12]}…), not of {spec.name} "
            f"({spec.content_sha256[:12]}…); leave --profile out to make one of this model."
        )


def require_same_text(
    found: SensitivityProfile | LadderProfile, directory: Path, encoding: EncodeOptions, path: Path
) -> None:
    """Another backend's losses are compared on the profile's own text, so that must be at hand."""
    if is_what_ships(found, encoding):
        return
    windows = calibration_windows(directory, encoding.calibration, found.settings.tokens, found.settings.window_tokens)
    if windows.text_sha256 != found.settings.text_sha256:
        raise RecordError(f"{path} was made on another calibration text than this; give that text with --calibration.")


def require_measurable(text: Path, windows: int, request: Request) -> None:
    """Refuse what validation would only refuse at the end."""
    read_text(text)
    if windows < 1:
        raise ValidationError(f"--windows {windows} is too few; ask for 1 or more.")
    if request.context_tokens < MIN_CONTEXT_TOKENS:
        raise ValidationError(
            f"--context {request.context_tokens} is too short to be measured; ask for {MIN_CONTEXT_TOKENS} or more."
        )


def is_what_ships(found: SensitivityProfile | LadderProfile, encoding: EncodeOptions) -> bool:
    """Whether sensitivity was measured with the encoder that the writer uses."""
    recorded = found.settings.backend
    return recorded.get("name") == "kquant" and load_recorded(recorded) == KQuant(encoding.encoder)
