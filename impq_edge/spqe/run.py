"""The stage: checkpoint and text in, sensitivity profile out; resumable at every evaluation."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import Backend, describe
from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import read_windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.game import Game
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.profile import GameSettings, SensitivityProfile
from impq_edge.spqe.sampling import evaluation_order, permutations

Progress = Callable[[str, int, int], None]
"""Told the name of a phase, the steps done and the steps in all."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A profile and what its run cost; the cost stays out of the profile, which is the same on every run."""

    profile: SensitivityProfile
    evaluations: int  # made by this run, not counting those resumed
    recomputed_share: float  # of the blocks, on average over this run's evaluations


def estimate_sensitivity(
    directory: Path,
    spec: ModelSpec,
    header_bytes: int,
    backend_name: str,
    backend: Backend,
    text: Path,
    journal_path: Path,
    *,
    n_permutations: int,
    tokens: int,
    window_tokens: int,
    seed: int,
    device: str,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Run SPQE as published: M walks from all-4-bit to all-2-bit, each block's loss increases along them.

    Losses are appended to ``journal_path`` as they are measured; a second call with the same inputs
    goes on where the first was stopped.

    Raises
    ------
    SensitivityError
        When no permutation is asked for, the journal belongs to other inputs, or a loss is not finite.
    """
    if n_permutations < 1:
        raise SensitivityError(f"--permutations {n_permutations} is too few; ask for 1 or more (the paper: 100).")
    windows = read_windows(directory, text, tokens, window_tokens)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = GameSettings(
        backend=describe(backend_name, backend),
        text_sha256=windows.text_sha256,
        tokens=windows.tokens.size,
        window_tokens=window_tokens,
        permutations=n_permutations,
        seed=seed,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
    )
    orders = permutations(spec.n_blocks, n_permutations, seed)
    journal = Journal(journal_path, {"model": spec.content_sha256, **dataclasses.asdict(settings)})
    game = Game(load_model(directory, spec, torch.device(device), dtype), spec, windows.tokens)
    reference = game.reference_losses()
    done = iter(range(1, spec.n_blocks + 1))
    bits = game.quantise_blocks(directory, backend, lambda _: progress("quantising", next(done), spec.n_blocks))
    _evaluate(game, orders, journal, progress)
    profile = SensitivityProfile.from_losses(
        model=spec,
        header_bytes=header_bytes,
        settings=settings,
        bits_per_weight=(bits[0], bits[1]),
        reference_losses=reference,
        orders=orders,
        losses=journal.losses,
    )
    return Measured(profile, game.evaluations, game.recomputed_share)


def _evaluate(game: Game, orders: NDArray[np.int64], journal: Journal, progress: Progress) -> None:
    wanted = evaluation_order(orders)
    for done, coalition in enumerate(wanted):
        progress("evaluating", done, len(wanted))
        if coalition not in journal.losses:
            journal.add(coalition, game.losses(coalition))
    progress("evaluating", len(wanted), len(wanted))
