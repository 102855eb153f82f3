"""The game: the loss or divergence of a model whose players are each at 2 or at 4 bit, evaluated with reuse.

Both versions of every matrix are made once; a coalition is a choice between them. Activations that enter
each block are kept for the coalition evaluated last and for the all-4-bit one, so that an evaluation
starts at the lowest block in which it differs from one of the two.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.backends import BITS, Backend, Bits, Inputs, Stored
from impq_edge.backends.kquant_kept import Kept
from impq_edge.errors import SensitivityError
from impq_edge.ggml.types import BLOCK_TYPES, type_for_row
from impq_edge.impq.allocation import Objective
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import TensorSpec
from impq_edge.spqe.graphs import MAX_FLOP, Graphs
from impq_edge.spqe.judge import Judge
from impq_edge.spqe.observe import Observer
from impq_edge.spqe.sampling import Coalition
from impq_edge.spqe.versions import Versions
from impq_edge.spqe.walk import Hidden, Walk

Progress = Callable[[int], None]
"""Told how many steps have just been finished."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was learnt while both versions of every block were made."""

    reference_losses: NDArray[np.float64]  # (windows,), nats per token: nothing quantised
    bits_per_weight: tuple[float, float]  # that the blocks' matrices really take, at 2 and at 4 bit


@dataclasses.dataclass
class _Trace:
    """Activations entering blocks 0…L, and leaving the last, for one coalition; one tensor per batch."""

    coalition: Coalition
    entering: list[list[torch.Tensor]]


class Game:
    """v(S) for every coalition S of a model's players, on fixed windows of text.

    Parameters
    ----------
    walk
        The model, L blocks, and the text.
    players
        What the N players are.
    objective
        What v is.
    """

    def __init__(self, walk: Walk, players: PlayerKind = "blocks", objective: Objective = "loss") -> None:
        self.spec = walk.spec
        self.players = players_of(walk.spec, players)
        self.blocks_computed = 0
        self.evaluations = 0
        self._walk = walk
        self._objective = objective
        self._judge: Judge | None = None  # made by prepare, for divergences
        self._matrices = [walk.spec.block_matrices(block) for block in range(walk.spec.n_blocks)]
        owner = {tensor.name: index for index, player in enumerate(self.players) for tensor in player.tensors}
        self._owners = [[owner[tensor.name] for tensor in matrices] for matrices in self._matrices]
        self._versions: Versions  # made by prepare
        self._graphs: Graphs | None = None
        self._base: _Trace | None = None
        self._last: _Trace | None = None

    @torch.no_grad()  # not inference_mode: libraries change what they are given in place
    def prepare(
        self,
        read: Callable[[TensorSpec], torch.Tensor],
        backend: Backend,
        progress: Progress = lambda _: None,
        *,
        calibration: Walk | None = None,
        resident_blocks: int | None = None,
        kept: Kept | None = None,
    ) -> Prepared:
        """Make both versions of every block, one block after another, from full-precision inputs.

        Parameters
        ----------
        read
            Returns a matrix of the checkpoint, (out, in), float32.
        backend
            Makes the versions; it is given statistics of the inputs that enter a matrix while nothing is
            quantised, which is what makes blocks independent of the coalition they will be used in.
        calibration
            The text that those statistics come from, through the same model; the game's own by default.
        resident_blocks
            How many blocks keep both versions on the GPU; all by default.
        kept
            Asked in the backend's stead: what it has encoded before is not encoded again.
        """
        assert self._last is None, "a game is prepared once"
        self._versions = Versions(self.spec.n_blocks, self._walk.device, resident_blocks)
        self._graphs = Graphs() if self._graphs_pay() else None
        bits_used = dict.fromkeys(BITS, 0.0)
        hidden, seen = list(self._walk.embedded), [] if calibration is None else list(calibration.embedded)
        for index in range(self.spec.n_blocks):
            layer = self._walk.take(index)
            observer = Observer(layer, backend.statistics)
            with observer:
                if calibration is None:
                    hidden = [self._walk.run(layer, index, batch) for batch in hidden]
                else:
                    seen = [calibration.run(layer, index, batch) for batch in seen]
            if calibration is not None:
                hidden = [self._walk.run(layer, index, batch) for batch in hidden]
            names: list[str] = []
            versions: list[dict[Bits, torch.Tensor]] = []
            for tensor in self._matrices[index]:
                names.append(tensor.name_in_block)
                versions.append({})
                weight, inputs = read(tensor).to(self._walk.device), observer.take(tensor.name_in_block)
                for bits in BITS:
                    made = stored(backend, kept, tensor, weight, bits, inputs)
                    versions[-1][bits] = made.weight.to(self._walk.dtype)
                    bits_used[bits] += made.bits_per_weight * tensor.weights
            self._versions.add(layer, names, versions)
            progress(1)
        weights = sum(player.weights for player in self.players)
        reference = _finite(self._walk.losses(hidden))
        if self._objective == "divergence":
            self._judge = Judge(self._walk, [self._walk.entering_head(batch) for batch in hidden])
        return Prepared(reference, (bits_used[2] / weights, bits_used[4] / weights))

    @torch.inference_mode()
    def losses(self, coalition: Coalition) -> NDArray[np.float64]:
        """Return v of each window, in nats per token, shape (windows,): mean −log p, or mean divergence."""
        hidden = self.leaving(coalition)
        return _finite(self._walk.losses(hidden) if self._judge is None else self._judge.judged(hidden)[1])

    @torch.inference_mode()
    def leaving(self, coalition: Coalition) -> Hidden:
        """Return what leaves the last block when the game's text passes a coalition."""
        start, trace = self._best_start(coalition)
        entering = [*trace.entering[: start + 1]]
        del trace
        self._last = None  # what is not shared makes room for what comes
        bits = self._bits(coalition)
        for index, layer in enumerate(self._versions.blocks(start, bits), start):
            entering.append([self._replay(layer, index, bits[index], batch) for batch in entering[index]])
        self.blocks_computed += self.spec.n_blocks - start
        self.evaluations += 1
        self._last = _Trace(coalition, entering)
        if set(coalition) == {4}:
            self._base = self._last
        return entering[-1]

    @torch.inference_mode()
    def passed(self, walk: Walk, coalition: Coalition) -> Hidden:
        """Return what leaves the last block when another text passes a coalition: nothing reused, nothing kept."""
        hidden = walk.embedded
        for index, layer in enumerate(self._versions.blocks(0, self._bits(coalition))):
            hidden = [walk.run(layer, index, batch) for batch in hidden]
        return hidden

    def _bits(self, coalition: Coalition) -> list[tuple[Bits, ...]]:
        """Return the bits of every matrix of every block."""
        return [tuple(coalition[owner] for owner in owners) for owners in self._owners]

    @property
    def recomputed_share(self) -> float:
        """Share of the blocks that evaluations had to compute, on average."""
        return self.blocks_computed / max(1, self.evaluations * self.spec.n_blocks)

    @property
    def n_players(self) -> int:
        """N."""
        return len(self.players)

    @property
    def streamed_blocks(self) -> int:
        """How many blocks live in host memory because both versions of all did not fit the GPU."""
        return self._versions.streamed_blocks

    def forget(self) -> None:
        """Let go of all activations that could be reused."""
        self._last = self._base = None

    def _graphs_pay(self) -> bool:
        if self._walk.device.type != "cuda" or self._versions.streamed_blocks:
            return False
        weights = sum(tensor.weights for tensor in self._matrices[0])
        return 2 * weights * self._walk.batches[0].numel() < MAX_FLOP

    def _best_start(self, coalition: Coalition) -> tuple[int, _Trace]:
        nothing = _Trace((), [self._walk.embedded])
        known = [trace for trace in (self._last, self._base) if trace is not None]
        return max(((self._shared_blocks(coalition, t.coalition), t) for t in [*known, nothing]), key=lambda p: p[0])

    def _shared_blocks(self, one: Coalition, other: Coalition) -> int:
        """Return how many of the lowest blocks two coalitions have in common."""
        for player, a, b in zip(self.players, one, other, strict=False):
            if a != b:
                return player.block or 0
        return self.spec.n_blocks if other else 0

    def _replay(self, layer: torch.nn.Module, index: int, bits: tuple[Bits, ...], hidden: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            return self._walk.run(layer, index, hidden)
        key = (index, bits, len(hidden))
        return self._graphs.run(key, lambda entering: self._walk.run(layer, index, entering), hidden)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise SensitivityError(
            "The model's loss is not finite on this text; validate an F16 GGUF of it to see whether it works."
        )
    return values


def stored(
    backend: Backend, kept: Kept | None, tensor: TensorSpec, weight: torch.Tensor, bits: Bits, inputs: Inputs | None
) -> Stored:
    """Return a matrix, (out, in), at 2 or 4 bit: what was kept of an earlier encoding, or a new one."""
    if kept is None:
        return backend.quantise(weight, bits, inputs)
    return kept.store(tensor, weight, type_for_row(BLOCK_TYPES[bits], tensor.shape[-1]), inputs)
