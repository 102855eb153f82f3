"""A game ready to be played: the model loaded, both versions of every block made, on this machine or another."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import Backend
from impq_edge.backends.kquant import KQuant
from impq_edge.backends.kquant_kept import Kept
from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import Windows
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.spqe.game import Game, Prepared
from impq_edge.spqe.memory import free_gpu_bytes, memory_told, resident_blocks
from impq_edge.spqe.profile import GameSettings
from impq_edge.spqe.sampling import Coalition, uniform
from impq_edge.spqe.walk import TOKENS_PER_BATCH, Walk, open_walk

Progress = Callable[[str, int, int], None]
"""Told the name of a phase, what is done and what there is in all; the unit is the phase's own."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a machine needs to set a game up; it can be pickled and sent there."""

    directory: Path
    spec: ModelSpec
    backend: Backend
    windows: Windows
    settings: GameSettings
    calibration: Windows | None = None  # what the backend's statistics come from; ``windows`` by default
    kept: Path | None = None  # a directory for what calibrated encoders of K-quants make


class Table:
    """A prepared game, and what was learnt in preparing it."""

    def __init__(self, game: Game, prepared: Prepared) -> None:
        self._game = game
        self.prepared = prepared

    @property
    def evaluations(self) -> int:
        """How many coalitions were evaluated."""
        return self._game.evaluations

    @property
    def streamed_blocks(self) -> int:
        """How many blocks wait in host memory because the GPU does not hold both versions of all."""
        return self._game.streamed_blocks

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks that evaluations had to compute, on average."""
        return self._game.recomputed_share

    def losses(self, coalition: Coalition) -> NDArray[np.float64]:
        """Return v of each window, (windows,), nats per token.

        Raises
        ------
        SensitivityError
            When a loss is not finite, or the GPU's memory does not suffice.
        """
        with memory_told():
            return self._game.losses(coalition)

    def keep_all_4(self) -> None:
        """Evaluate all-4-bit, uncounted: everybody's walks start there, and its activations are reused most."""
        self.losses(uniform(4, self._game.n_players))
        self._game.evaluations = self._game.blocks_computed = 0

    def evaluate(self, coalitions: Sequence[Coalition]) -> Generator[tuple[Coalition, NDArray[np.float64]], None, None]:
        """Yield each coalition with its losses, in the order given."""
        for coalition in coalitions:
            yield coalition, self.losses(coalition)


def set_table(job: Job, progress: Progress = lambda *_: None) -> Table:
    """Load the model and make both versions of every block.

    Raises
    ------
    SensitivityError
        When the GPU's memory does not suffice.
    BackendError
        When the backend cannot store this model's matrices.
    """
    spec, device = job.spec, torch.device(job.settings.device)
    dtype: torch.dtype = getattr(torch, job.settings.dtype)
    resident = spec.n_blocks
    if device.type == "cuda":
        windows, window_tokens = job.windows.tokens.shape
        resident = resident_blocks(
            spec, windows=windows, window_tokens=window_tokens, batch_tokens=TOKENS_PER_BATCH["cuda"],
            itemsize=dtype.itemsize, statistics=job.backend.statistics, free_bytes=free_gpu_bytes(),
            objective=job.settings.objective,
        )  # fmt: skip
    with memory_told():
        walk = open_walk(job.directory, spec, job.windows, device, dtype)
        return Table(*prepare_game(job, walk, progress, resident))


def prepare_game(
    job: Job, walk: Walk, progress: Progress = lambda *_: None, resident_blocks: int | None = None
) -> tuple[Game, Prepared]:
    """Make both versions of every block of a walk of the job's text, from which no block was taken yet.

    Arguments and errors as for :meth:`Game.prepare` and :func:`set_table`.
    """
    done = iter(range(1, job.spec.n_blocks + 1))
    game = Game(walk, job.settings.players, job.settings.objective)
    prepared = game.prepare(
        lambda tensor: torch.from_numpy(read_tensor(job.directory, tensor)),
        job.backend,
        lambda _: progress("quantising", next(done), job.spec.n_blocks),
        calibration=calibration_walk(job, walk),
        resident_blocks=resident_blocks,
        kept=kept_encodings(job),
    )
    return game, prepared


def calibration_walk(job: Job, walk: Walk) -> Walk | None:
    """Return the walk of the text that statistics come from; None where it is the walk's own, or none are needed."""
    if job.calibration is None or job.backend.statistics == "none":
        return None
    return walk.beside(job.calibration)


def kept_encodings(job: Job) -> Kept | None:
    """Return what remembers encodings; None where nothing is to be kept, or encoding again is as good."""
    backend = job.backend
    if job.kept is None or not isinstance(backend, KQuant) or backend.statistics == "none":
        return None
    return encodings_in(job.kept, backend, job.spec, job.settings)


def encodings_in(directory: Path, backend: KQuant, spec: ModelSpec, settings: GameSettings) -> Kept:
    """Return what a directory holds of a model's encodings on one text, for the game and the writer alike."""
    return Kept(backend, directory, {"model": spec.content_sha256, **settings.calibration()})


def set_table_elsewhere(job: Job) -> Table:
    """Do the same on a machine of a cluster, whose copy of the checkpoint may be another.

    Raises
    ------
    SensitivityError
        When the checkpoint there is not the one the run was started with.
    """
    found = read_model(job.directory, job.spec.name)
    if found.content_sha256 != job.spec.content_sha256:
        raise SensitivityError(
            f"A worker's {job.directory} holds other files ({found.content_sha256[:12]}…) than this machine's "
            f"({job.spec.content_sha256[:12]}…); copy the checkpoint there, or use a path that machines share."
        )
    table = set_table(dataclasses.replace(job, kept=None))
    table.keep_all_4()
    return table
