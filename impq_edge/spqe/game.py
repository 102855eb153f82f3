"""The game: the loss of a model whose players are each at 2 or at 4 bit, evaluated with reuse.

Both versions of every matrix are made once; a coalition is a choice between them. Activations that enter
each block are kept for the coalition evaluated last and for the all-4-bit one, so that an evaluation
starts at the lowest block in which it differs from one of the two.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from impq_edge.backends import BITS, Backend, Bits
from impq_edge.errors import SensitivityError
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.spqe.graphs import MAX_FLOP, Graphs
from impq_edge.spqe.observe import Observer
from impq_edge.spqe.sampling import Coalition
from impq_edge.spqe.versions import Versions

Progress = Callable[[int], None]
"""Told how many steps have just been finished."""

LOGITS_PER_CHUNK = 1 << 26  # float32 logits alive at once: 256 MiB
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


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
    model
        A ``transformers`` causal language model; its blocks are taken over.
    spec
        Its record, L blocks.
    windows
        Token ids, shape (windows, window length).
    players
        What the N players are.
    """

    def __init__(self, model: Any, spec: ModelSpec, windows: NDArray[np.int64], players: PlayerKind = "blocks") -> None:
        self.spec = spec
        self.players = players_of(spec, players)
        self.blocks_computed = 0
        self.evaluations = 0
        self._model = model
        embedding = model.model.embed_tokens.weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        rows = max(1, TOKENS_PER_BATCH[self.device.type] // windows.shape[1])
        self._batches = [torch.from_numpy(windows[i : i + rows]).to(self.device) for i in range(0, len(windows), rows)]
        self._embedded, self._arguments = _capture(model, self._batches)
        self._matrices = [spec.block_matrices(block) for block in range(spec.n_blocks)]
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
        resident_blocks: int | None = None,
    ) -> Prepared:
        """Make both versions of every block, one block after another, from full-precision inputs.

        Parameters
        ----------
        read
            Returns a matrix of the checkpoint, (out, in), float32.
        backend
            Makes the versions; it is given statistics of the inputs that enter a matrix while nothing is
            quantised, which is what makes blocks independent of the coalition they will be used in.
        resident_blocks
            How many blocks keep both versions on the GPU; all by default.
        """
        assert self._last is None, "a game is prepared once"
        self._versions = Versions(self.spec.n_blocks, self.device, resident_blocks)
        self._graphs = Graphs() if self._graphs_pay() else None
        bits_used = dict.fromkeys(BITS, 0.0)
        hidden = list(self._embedded)
        for index in range(self.spec.n_blocks):
            layer = self._take(index)
            observer = Observer(layer, backend.statistics)
            with observer:
                hidden = [self._run(layer, index, batch) for batch in hidden]
            names: list[str] = []
            stored: list[dict[Bits, torch.Tensor]] = []
            for tensor in self._matrices[index]:
                name = tensor.name.removeprefix(f"model.layers.{index}.")
                names.append(name)
                stored.append({})
                weight, inputs = read(tensor).to(self.device), observer.take(name)
                for bits in BITS:
                    made = backend.quantise(weight, bits, inputs)
                    stored[-1][bits] = made.weight.to(self.dtype)
                    bits_used[bits] += made.bits_per_weight * tensor.weights
            self._versions.add(layer, names, stored)
            progress(1)
        weights = sum(player.weights for player in self.players)
        return Prepared(self._losses(hidden), (bits_used[2] / weights, bits_used[4] / weights))

    @torch.inference_mode()
    def losses(self, coalition: Coalition) -> NDArray[np.float64]:
        """Return the mean negative log-likelihood per token of each window, in nats, shape (windows,)."""
        start, trace = self._best_start(coalition)
        entering = [*trace.entering[: start + 1]]
        del trace
        self._last = None  # what is not shared makes room for what comes
        bits = [tuple(coalition[owner] for owner in owners) for owners in self._owners]
        for index, layer in enumerate(self._versions.blocks(start, bits), start):
            entering.append([self._replay(layer, index, bits[index], batch) for batch in entering[index]])
        self.blocks_computed += self.spec.n_blocks - start
        self.evaluations += 1
        self._last = _Trace(coalition, entering)
        if set(coalition) == {4}:
            self._base = self._last
        return self._losses(entering[-1])

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

    def _take(self, index: int) -> torch.nn.Module:
        """Take a block out of the model, to where blocks run."""
        layer: torch.nn.Module = self._model.model.layers[index]
        self._model.model.layers[index] = torch.nn.Identity()
        if next(layer.parameters()).device != self.device:  # it was loaded into host memory
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(layer, recurse=True)
            layer.to(self.device)
        return layer

    def _graphs_pay(self) -> bool:
        if self.device.type != "cuda" or self._versions.streamed_blocks:
            return False
        weights = sum(tensor.weights for tensor in self._matrices[0])
        return 2 * weights * self._batches[0].numel() < MAX_FLOP

    def _best_start(self, coalition: Coalition) -> tuple[int, _Trace]:
        nothing = _Trace((), [self._embedded])
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
            return self._run(layer, index, hidden)
        key = (index, bits, len(hidden))
        return self._graphs.run(key, lambda entering: self._run(layer, index, entering), hidden)

    def _run(self, layer: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        out = layer(hidden, **self._arguments[len(hidden)][index])
        left: torch.Tensor = out[0] if isinstance(out, tuple) else out  # transformers before 4.54 returned a tuple
        return left

    def _losses(self, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        """Return each window's loss in float32, from hidden states (windows, T, d) as they leave the last block."""
        losses = [self._token_losses(*pair).mean(dim=1) for pair in zip(hidden, self._batches, strict=True)]
        values: NDArray[np.float64] = torch.cat(losses).double().cpu().numpy()
        if not np.isfinite(values).all():
            raise SensitivityError(
                "The model's loss is not finite on this text; validate an F16 GGUF of it to see whether it works."
            )
        return values

    def _token_losses(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return −log p of every token but the first of each window, (windows, T − 1)."""
        hidden = self._model.model.norm(hidden[:, :-1]).flatten(0, 1)
        targets = ids[:, 1:].flatten()
        cap = self.spec.hyperparameters.final_softcap
        step = max(1, LOGITS_PER_CHUNK // self.spec.hyperparameters.vocabulary)
        losses = []
        for first in range(0, len(targets), step):
            logits = self._model.lm_head(hidden[first : first + step]).float()
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            losses.append(functional.cross_entropy(logits, targets[first : first + step], reduction="none"))
        return torch.cat(losses).view(len(ids), -1)


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook to end a forward pass once the block's inputs are known."""


def _capture(model: Any, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[int, list[dict[str, Any]]]]:
    """Record what ``transformers`` feeds its blocks: the embedded text, and each block's other arguments.

    Masks and rotary embeddings are built by the library itself, whatever its version; they depend only
    on the batch's shape, so one record per number of rows is enough.
    """
    embedded: list[torch.Tensor] = []
    arguments: dict[int, list[dict[str, Any]]] = {}
    layers = model.model.layers

    def keep_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedded.append(args[0] if args else kwargs["hidden_states"])
        if len(embedded[-1]) in arguments:
            raise _StopForward

    def keep_arguments(_: Any, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")}
        arguments.setdefault(len(embedded[-1]), []).append(others)

    hooks = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(keep_arguments, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            for batch in batches:
                try:
                    model.model(input_ids=batch, use_cache=False)
                except _StopForward:
                    continue
    finally:
        for hook in hooks:
            hook.remove()
    return embedded, arguments
