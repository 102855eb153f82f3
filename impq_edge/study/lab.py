"""A game whose losses are kept on disk, and what it makes of held-out text: where methods are compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import Windows
from impq_edge.spqe.journal import Journal, to_text
from impq_edge.spqe.memory import memory_told
from impq_edge.spqe.sampling import Coalition, uniform
from impq_edge.spqe.table import Job, Progress, prepare_game
from impq_edge.spqe.walk import Hidden, Walk, open_walk

Objective = Literal["loss", "divergence"]
"""What a method minimises on the calibration text: the published loss, or the divergence from the unquantised model."""


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
        identity = {"model": job.spec.content_sha256, **dataclasses.asdict(job.settings)}
        self._journal = Journal(journal, identity)
        dtype: torch.dtype = getattr(torch, job.settings.dtype)
        device = torch.device(job.settings.device)
        with memory_told():
            texts = {"": job.windows, **held_out}
            self._reference, self.unquantised = _unquantised(job, texts, device, dtype)
            self._walk = open_walk(job.directory, job.spec, job.windows, device, dtype)
            self._held_out = {name: self._walk.beside(windows) for name, windows in held_out.items()}
            self._judge = Judge(self._walk, self._reference.pop(""))
            self._game, self.prepared = prepare_game(job, self._walk, progress)
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
            exams = {}
            for name, walk in self._held_out.items():
                hidden = self._game.passed(walk, coalition)
                exams[name] = Examined(walk.losses(hidden), walk.divergences(self._reference[name], hidden))
        return exams

    def _measured(self, coalition: Coalition) -> NDArray[np.float64]:
        with memory_told(), torch.inference_mode():
            found: NDArray[np.float64] = self._judge.judged(self._game.leaving(coalition))
        if not np.isfinite(found).all():
            raise SensitivityError(
                f"The loss of {to_text(coalition)} is not finite on this text; try another backend or its settings."
            )
        return found


class Judge:
    """Loss and divergence of a text from one set of logits.

    The unquantised model's probabilities are kept, 4 bytes × tokens × vocabulary: with them a divergence costs one more
    pass over the logits, not a second head. In Σ p (log p − log q) the first half is known beforehand.
    """

    @torch.inference_mode()
    def __init__(self, walk: Walk, reference: Hidden) -> None:
        self._walk = walk
        self._tokens = sum(len(batch) for batch in reference)
        self._chunks: list[list[torch.Tensor]] = []  # p, (tokens, vocabulary), of every batch
        self._negative_entropy = 0.0
        for batch in reference:
            chunks = []
            for entering in torch.split(batch, walk.tokens_per_chunk):
                log_p = walk.logits(entering).log_softmax(dim=1)
                chunks.append(log_p.exp())
                self._negative_entropy += float((chunks[-1] * log_p).sum(dim=1).double().sum())
            self._chunks.append(chunks)

    @torch.inference_mode()
    def judged(self, hidden: Hidden) -> NDArray[np.float64]:
        """Return mean loss and mean divergence, (2,), nats per token, of what leaves the last block."""
        losses, crossed = [], []
        for batch, ids, chunks in zip(hidden, self._walk.batches, self._chunks, strict=True):
            entering, targets = self._walk.entering_head(batch), ids[:, 1:].flatten()
            step = self._walk.tokens_per_chunk
            for part, target, p in zip(torch.split(entering, step), torch.split(targets, step), chunks, strict=True):
                logits = self._walk.logits(part)
                total = logits.logsumexp(dim=1)
                losses.append((total - logits.gather(1, target[:, None])[:, 0]).double().sum())
                crossed.append((total - torch.linalg.vecdot(p, logits)).double().sum())
        sums = torch.stack([torch.stack(losses).sum(), torch.stack(crossed).sum()]).cpu().numpy()
        found: NDArray[np.float64] = (sums + np.array([0.0, self._negative_entropy])) / self._tokens
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
