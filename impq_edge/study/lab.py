"""A game whose losses are kept on disk, and what it makes of held-out text: where methods are compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.impq.allocation import Objective
from impq_edge.model.calibration import Windows
from impq_edge.spqe.journal import Journal, to_text
from impq_edge.spqe.judge import Judge
from impq_edge.spqe.memory import memory_told
from impq_edge.spqe.sampling import Coalition, uniform
from impq_edge.spqe.table import Job, Progress, prepare_game
from impq_edge.spqe.walk import Hidden, Walk, open_walk


@dataclasses.dataclass(frozen=True)
class Examined:
    """What a coalition does to a text that was not used to choose it."""

    losses: NDArray[np.float64]  # (windows,), nats per token
    divergences: NDArray[np.float64]  # (windows,), KL to the unquantised model, nats per token


class Lab:
    """A prepared game on a calibration text, and held-out texts beside it.

    Parameters
    ----------
    job
        Model, backend, calibration text and players.
    held_out
        Texts by name.
    journal
        Where losses are kept, so that an interrupted run measures nothing twice.
    """

    def __init__(
        self, job: Job, held_out: Mapping[str, Windows], journal: Path, progress: Progress = lambda *_: None
    ) -> None:
        identity = {"model": job.spec.content_sha256, **job.settings.identity()}
        self._journal = Journal(journal, identity)
        dtype: torch.dtype = getattr(torch, job.settings.dtype)
        device = torch.device(job.settings.device)
        with memory_told():
            texts = {"": job.windows, **held_out}
            reference, self.unquantised = _unquantised(job, texts, device, dtype)
            walk = open_walk(job.directory, job.spec, job.windows, device, dtype)
            self._judge = Judge(walk, reference[""])
            self._held_out = {name: walk.beside(windows) for name, windows in held_out.items()}
            self._examiners = {
                name: Judge(beside, reference[name], kept_bytes=0) for name, beside in self._held_out.items()
            }
            self._game, self.prepared = prepare_game(job, walk, progress)
        self.players = self._game.players

    def ask(self, coalitions: Sequence[Coalition]) -> NDArray[np.float64]:
        """Return loss and divergence of each coalition on the calibration text, (coalitions, 2), nats per token."""
        missing = {c for c in coalitions if to_text(c) not in self._journal.losses}
        for coalition in sorted(missing):  # sorted: activations are reused the most
            self._journal.add(to_text(coalition), self._measured(coalition))
        found: NDArray[np.float64] = np.array([self._journal.losses[to_text(c)] for c in coalitions]).reshape(-1, 2)
        return found

    def examine(self, coalition: Coalition) -> dict[str, Examined]:
        """Return what a coalition does to every held-out text."""
        with memory_told(), torch.inference_mode():
            return {
                name: Examined(*self._examiners[name].judged(self._game.passed(walk, coalition)))
                for name, walk in self._held_out.items()
            }

    def _measured(self, coalition: Coalition) -> NDArray[np.float64]:
        with memory_told(), torch.inference_mode():
            found = np.array([values.mean() for values in self._judge.judged(self._game.leaving(coalition))])
        if not np.isfinite(found).all():
            raise SensitivityError(
                f"The loss of {to_text(coalition)} is not finite on this text; try another backend or its settings."
            )
        return found


class Asked:
    """A lab as one method sees it: what it asks is counted, whoever asked before."""

    def __init__(self, lab: Lab, objective: Objective) -> None:
        self._lab = lab
        self._column = 0 if objective == "loss" else 1
        self._seen: dict[Coalition, float] = {}
        self.n_players = len(lab.players)

    def __call__(self, coalitions: Sequence[Coalition]) -> NDArray[np.float64]:
        """Return what is to be minimised of each coalition, (coalitions,), nats per token."""
        values: NDArray[np.float64] = self._lab.ask(coalitions)[:, self._column]
        self._seen.update(zip(coalitions, values.tolist(), strict=True))
        return values

    @property
    def seen(self) -> Mapping[Coalition, float]:
        """Everything this method has asked for, in the order in which it did."""
        return self._seen

    @property
    def evaluations(self) -> int:
        """How many distinct coalitions that were."""
        return len(self._seen)

    def anchors(self) -> tuple[float, float]:
        """Return the values of all at 4 bit and of all at 2 bit."""
        high, low = self([uniform(4, self.n_players), uniform(2, self.n_players)]).tolist()
        return high, low


def _unquantised(
    job: Job, texts: Mapping[str, Windows], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Hidden], dict[str, NDArray[np.float64]]]:
    """Return what enters the unquantised model's head of each text, and each text's losses, (windows,)."""
    walk: Walk | None = None
    walks: dict[str, Walk] = {}
    for name, windows in texts.items():
        walk = open_walk(job.directory, job.spec, windows, device, dtype) if walk is None else walk.beside(windows)
        walks[name] = walk
    assert walk is not None
    with torch.inference_mode():
        hidden = {name: list(each.embedded) for name, each in walks.items()}
        for block in range(job.spec.n_blocks):
            layer = walk.take(block)
            hidden = {name: [walks[name].run(layer, block, b) for b in batches] for name, batches in hidden.items()}
        entering = {name: [walks[name].entering_head(b) for b in batches] for name, batches in hidden.items()}
        return entering, {name: walks[name].losses(batches) for name, batches in hidden.items()}
