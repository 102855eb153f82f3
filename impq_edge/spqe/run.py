"""The stage: checkpoint and text in, sensitivity profile out; resumable at every evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import Backend, describe
from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.game import Game
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.profile import GameSettings, SensitivityProfile
from impq_edge.spqe.sampling import Coalition, evaluation_order, permutations

Progress = Callable[[str, int, int], None]
"""Told the name of a phase, the steps done and the steps in all."""

COMPUTE_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A profile and what its run cost; the cost stays out of the profile, which is the same on every run."""

    profile: SensitivityProfile
    evaluations: int  # made by this run, not counting those resumed
    recomputed_share: float  # of the blocks, on average over this run's evaluations


def game_settings(
    backend_name: str, backend: Backend, windows: Windows, *, n_permutations: int, seed: int, device: str
) -> GameSettings:
    """Gather everything besides the model that the losses depend on."""
    return GameSettings(
        backend=describe(backend_name, backend),
        text_sha256=windows.text_sha256,
        tokens=windows.tokens.size,
        window_tokens=windows.tokens.shape[1],
        permutations=n_permutations,
        seed=seed,
        device=device,
        dtype=COMPUTE_DTYPES[device],
    )


def estimate_sensitivity(
    directory: Path,
    spec: ModelSpec,
    header_bytes: int,
    backend: Backend,
    windows: Windows,
    settings: GameSettings,
    journal_path: Path,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Run SPQE as published: M walks from all-4-bit to all-2-bit, each block's loss increases along them.

    Losses are appended to ``journal_path`` as they are measured; a second call with the same inputs
    goes on where the first was stopped.

    Raises
    ------
    SensitivityError
        When the journal belongs to other inputs, or a loss is not finite.
    """
    orders = permutations(spec.n_blocks, settings.permutations, settings.seed)
    journal = Journal(journal_path, {"model": spec.content_sha256, **dataclasses.asdict(settings)})
    try:
        game, reference, bits = _prepare(directory, spec, backend, windows, settings, progress)
        _evaluate(game, evaluation_order(orders), journal, progress)
    except torch.OutOfMemoryError as error:
        raise SensitivityError(
            f"The GPU's memory is too small for this model and {settings.tokens} tokens ({error}); ask for fewer "
            "--tokens, or use --compute cpu."
        ) from error
    profile = SensitivityProfile.from_losses(
        model=spec,
        header_bytes=header_bytes,
        settings=settings,
        bits_per_weight=bits,
        reference_losses=reference,
        orders=orders,
        losses=journal.losses,
    )
    return Measured(profile, game.evaluations, game.recomputed_share)


def measure_coalitions(
    directory: Path,
    spec: ModelSpec,
    backend: Backend,
    windows: Windows,
    settings: GameSettings,
    coalitions: Sequence[Coalition],
    progress: Progress = lambda *_: None,
) -> list[float]:
    """Return the mean loss of each coalition in nats per token, on any backend and without a journal."""
    game, _, _ = _prepare(directory, spec, backend, windows, settings, progress)
    return [float(game.losses(coalition).mean()) for coalition in coalitions]


def _prepare(
    directory: Path, spec: ModelSpec, backend: Backend, windows: Windows, settings: GameSettings, progress: Progress
) -> tuple[Game, NDArray[np.float64], tuple[float, float]]:
    model = load_model(directory, spec, torch.device(settings.device), getattr(torch, settings.dtype))
    game = Game(model, spec, windows.tokens)
    reference = game.reference_losses()
    done = iter(range(1, spec.n_blocks + 1))
    bits = game.quantise_blocks(directory, backend, lambda _: progress("quantising", next(done), spec.n_blocks))
    return game, reference, bits


def _evaluate(game: Game, wanted: Sequence[Coalition], journal: Journal, progress: Progress) -> None:
    for done, coalition in enumerate(wanted):
        progress("evaluating", done, len(wanted))
        if coalition not in journal.losses:
            journal.add(coalition, game.losses(coalition))
    progress("evaluating", len(wanted), len(wanted))
