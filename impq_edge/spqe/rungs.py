"""Measuring a ladder: every player at every type, alone, against the unquantised model; resumable at each."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import Inputs
from impq_edge.backends.kquant import KQuant
from impq_edge.errors import SensitivityError
from impq_edge.ggml.types import LADDER, TensorType, type_for_row
from impq_edge.model.load import read_tensor
from impq_edge.model.players import Player, players_of
from impq_edge.model.spec import TensorSpec
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.ladder import LadderProfile, Rung
from impq_edge.spqe.memory import memory_told
from impq_edge.spqe.observe import Observer, entering_head
from impq_edge.spqe.table import Job, Progress, calibration_walk, kept_encodings
from impq_edge.spqe.walk import Hidden, open_walk

_REFERENCE = "unquantised"


def measure_ladder(
    job: Job, types: Sequence[int], header_bytes: int, journal: Journal, progress: Progress = lambda *_: None
) -> LadderProfile:
    """Measure what each player costs at each of several types.

    Parameters
    ----------
    job
        Model, text and encoder; the backend is K-quants, since these types are GGUF's.
    types
        Ascending widths of :data:`impq_edge.ggml.types.LADDER`.
    header_bytes
        Of a GGUF of this model, before its tensor data.
    journal
        Keeps every measurement; those it holds are not made again.

    Raises
    ------
    SensitivityError
        When a divergence is not finite, or the GPU's memory does not suffice.
    """
    players = players_of(job.spec, job.settings.players, outer=True)
    wanted = [rung_key(player, bits) for player in players for bits in types]
    missing = [key for key in [_REFERENCE, *wanted] if key not in journal.losses]
    if missing:
        with memory_told(), torch.inference_mode():
            _Measurement(job, types, journal, progress).run(players)
    return LadderProfile(
        model=job.spec,
        header_bytes=header_bytes,
        settings=job.settings,
        types=tuple(types),
        reference_losses=tuple(journal.losses[_REFERENCE].tolist()),
        rungs=tuple(
            Rung(player.name, bits, tuple(journal.losses[rung_key(player, bits)].tolist()))
            for player in players
            for bits in types
        ),
    )


def measured_rungs(made: LadderProfile) -> dict[str, NDArray[np.float64]]:
    """Return what a finished ladder knows, as a journal would hold it."""
    known = {_REFERENCE: np.array(made.reference_losses)}
    return known | {_key(rung.player, rung.bits): np.array(rung.divergences) for rung in made.rungs}


def rung_key(player: Player, bits: int) -> str:
    """Name a measurement in a journal."""
    return _key(player.name, bits)


def _key(name: str, bits: int) -> str:
    return f"{name} at {bits}"


class _Measurement:
    """The unquantised model with what entered each of its blocks, and one player of it replaced at a time."""

    def __init__(self, job: Job, types: Sequence[int], journal: Journal, progress: Progress) -> None:
        assert isinstance(job.backend, KQuant), "the types of a ladder are GGUF's"
        self._job, self._types, self._journal, self._progress = job, types, journal, progress
        self._backend: KQuant = job.backend
        self._kept = kept_encodings(job)
        dtype: torch.dtype = getattr(torch, job.settings.dtype)
        self._walk = open_walk(job.directory, job.spec, job.windows, torch.device(job.settings.device), dtype)
        self._head = self._walk.outside.lm_head.weight.data
        self._calibration = calibration_walk(job, self._walk) or self._walk
        self._seen: Hidden = self._calibration.embedded
        self._layers: list[torch.nn.Module] = []
        self._entering: list[Hidden] = [self._walk.embedded]
        for block in range(job.spec.n_blocks):
            layer = self._walk.take(block)
            self._layers.append(layer)
            self._entering.append([self._walk.run(layer, block, batch) for batch in self._entering[-1]])
            progress("unquantised blocks", block + 1, job.spec.n_blocks)
        self._reference = [self._walk.entering_head(batch) for batch in self._entering[-1]]

    def run(self, players: Sequence[Player]) -> None:
        """Measure what the journal lacks, block by block."""
        if _REFERENCE not in self._journal.losses:
            self._journal.add(_REFERENCE, _finite(self._walk.losses(self._entering[-1]), "nothing"))
        for block in [*range(self._job.spec.n_blocks), None]:
            own = [player for player in players if player.block == block]
            inputs = self._inside(block) if block is not None else self._outside(own)
            for player in own:
                self._climb(player, inputs)
                self._told(players)

    def _told(self, players: Sequence[Player]) -> None:
        self._progress("measuring the ladder", len(self._journal.losses) - 1, len(players) * len(self._types))

    def _inside(self, block: int) -> dict[TensorSpec, Inputs | None]:
        """Return the statistics of what enters a block's matrices."""
        if self._backend.statistics == "none":
            return dict.fromkeys(self._job.spec.block_matrices(block))
        with Observer(self._layers[block], self._backend.statistics) as observer:
            self._seen = [self._calibration.run(self._layers[block], block, batch) for batch in self._seen]
            return {t: observer.take(t.name_in_block) for t in self._job.spec.block_matrices(block)}

    def _outside(self, players: Sequence[Player]) -> dict[TensorSpec, Inputs | None]:
        tied = self._job.spec.hyperparameters.tied_embeddings
        inputs = entering_head(self._calibration, self._seen, self._backend.statistics)
        tensors = [tensor for player in players for tensor in player.tensors]
        return {t: inputs if tied or t.role == "head" else None for t in tensors}

    def _climb(self, player: Player, inputs: dict[TensorSpec, Inputs | None]) -> None:
        """Measure one player at every type; types that are stored alike are measured once."""
        parameters = [self._parameter(tensor) for tensor in player.tensors]
        unquantised = [parameter.data for parameter in parameters]
        known: dict[tuple[TensorType, ...], NDArray[np.float64]] = {}
        weights: list[torch.Tensor] = []
        for bits in self._types:
            key, kinds = rung_key(player, bits), tuple(type_for_row(LADDER[bits], t.shape[-1]) for t in player.tensors)
            if key in self._journal.losses:
                known[kinds] = self._journal.losses[key]
                continue
            if kinds not in known:
                weights = weights or [self._read(tensor) for tensor in player.tensors]
                for parameter, tensor, weight, kind in zip(parameters, player.tensors, weights, kinds, strict=True):
                    parameter.data = self._stored(tensor, weight, kind, inputs[tensor]).to(self._walk.dtype)
                known[kinds] = _finite(self._divergence(player), key)
            self._journal.add(key, known[kinds])
        for parameter, data in zip(parameters, unquantised, strict=True):
            parameter.data = data

    def _stored(
        self, tensor: TensorSpec, weight: torch.Tensor, kind: TensorType, inputs: Inputs | None
    ) -> torch.Tensor:
        if self._kept is None or inputs is None:
            return self._backend.store(weight, kind, inputs).weight
        return self._kept.store(tensor, weight, kind, inputs).weight

    def _read(self, tensor: TensorSpec) -> torch.Tensor:
        return torch.from_numpy(read_tensor(self._job.directory, tensor)).to(self._walk.device)

    def _parameter(self, tensor: TensorSpec) -> torch.nn.Parameter:
        if tensor.block is not None:
            return self._layers[tensor.block].get_parameter(tensor.name_in_block)
        found: torch.nn.Parameter = self._walk.outside.get_parameter(tensor.name)  # a tied head shares it
        return found

    def _divergence(self, player: Player) -> NDArray[np.float64]:
        """Return the mean divergence of each window from the unquantised model, (windows,), nats per token."""
        first, hidden = player.block, self._entering[-1]
        if player.block is not None:
            hidden = self._entering[player.block]
        elif player.tensors[0].role == "embedding":
            first, hidden = 0, self._walk.embed()
        if first is not None:
            for block in range(first, self._job.spec.n_blocks):
                hidden = [self._walk.run(self._layers[block], block, batch) for batch in hidden]
        return self._walk.divergences(self._reference, hidden, self._head)


def _finite(values: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise SensitivityError(
            f"The model's outputs are not finite on this text with {what} quantised; validate an F16 GGUF of it to see "
            "whether it works."
        )
    return values
