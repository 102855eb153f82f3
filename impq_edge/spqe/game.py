"""The game: the loss of a model whose blocks are each at 2 or at 4 bit, evaluated with reuse.

Both versions of every block are made once; a coalition is a choice between them. Activations that enter
each block are kept for the coalition evaluated last and for the all-4-bit one, so that an evaluation
starts at the lowest block in which it differs from one of the two.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from impq_edge.backends import BITS, Backend, Bits
from impq_edge.errors import SensitivityError
from impq_edge.model.load import read_tensor
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.sampling import Coalition

Progress = Callable[[int], None]
"""Told how many steps have just been finished."""

_LOGITS_PER_CHUNK = 1 << 26  # float32 logits alive at once: 256 MiB
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


@dataclasses.dataclass
class _Trace:
    """Activations entering blocks 0…L, and leaving the last, for one coalition; one tensor per batch."""

    coalition: Coalition
    entering: list[list[torch.Tensor]]


class Game:
    """v(S) for every coalition S of a model's blocks, on fixed windows of text.

    Parameters
    ----------
    model
        A ``transformers`` causal language model; its blocks are taken over and replaced by versions.
    spec
        Its record, L blocks.
    windows
        Token ids, shape (windows, window length).
    """

    def __init__(self, model: Any, spec: ModelSpec, windows: NDArray[np.int64]) -> None:
        self.spec = spec
        self.blocks_computed = 0
        self.evaluations = 0
        self._model = model
        self._layers: list[dict[Bits, torch.nn.Module]] = []
        device = next(model.parameters()).device
        rows = max(1, _TOKENS_PER_BATCH[device.type] // windows.shape[1])
        self._batches = [torch.from_numpy(windows[i : i + rows]).to(device) for i in range(0, len(windows), rows)]
        self._embedded, self._arguments = _capture(model, self._batches)
        self._base: _Trace | None = None
        self._last: _Trace | None = None

    @torch.inference_mode()
    def reference_losses(self) -> NDArray[np.float64]:
        """Return the loss of each window with the weights as they came, before any block is quantised."""
        assert not self._layers, "the original blocks are gone"
        hidden = list(self._embedded)
        for index, layer in enumerate(self._model.model.layers):
            hidden = [self._run(layer, index, batch) for batch in hidden]
        return self._losses(hidden)

    def quantise_blocks(
        self, directory: Path, backend: Backend, progress: Progress = lambda _: None
    ) -> tuple[float, float]:
        """Make both versions of every block from the checkpoint's weights.

        Returns
        -------
        The bits per weight that the blocks' matrices really take, at 2 and at 4 bit.
        """
        bits_used = dict.fromkeys(BITS, 0.0)
        for index, layer in enumerate(self._model.model.layers):
            versions = {bits: copy_sharing_vectors(layer) for bits in BITS}
            for tensor in self.spec.block_matrices(index):
                weight = torch.from_numpy(read_tensor(directory, tensor)).to(self._embedded[0].device)
                path = tensor.name.removeprefix(f"model.layers.{index}.").removesuffix(".weight")
                for bits, version in versions.items():
                    stored = backend.quantise(weight, bits)
                    target = version.get_parameter(f"{path}.weight")
                    target.copy_(stored.weight.to(target.dtype))
                    bits_used[bits] += stored.bits_per_weight * tensor.weights
            self._layers.append(versions)
            self._model.model.layers[index] = torch.nn.Identity()  # the original is needed no longer
            progress(1)
        weights = sum(t.weights for i in range(self.spec.n_blocks) for t in self.spec.block_matrices(i))
        return bits_used[2] / weights, bits_used[4] / weights

    def use_blocks(self, layers: Sequence[dict[Bits, torch.nn.Module]]) -> None:
        """Play with given versions of every block instead of quantising any."""
        self._layers = list(layers)

    @torch.inference_mode()
    def losses(self, coalition: Coalition) -> NDArray[np.float64]:
        """Return the mean negative log-likelihood per token of each window, in nats, shape (windows,)."""
        start, trace = self._best_start(coalition)
        entering = [*trace.entering[: start + 1]]
        for index in range(start, self.spec.n_blocks):
            layer = self._layers[index][coalition[index]]
            entering.append([self._run(layer, index, batch) for batch in entering[index]])
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

    def _best_start(self, coalition: Coalition) -> tuple[int, _Trace]:
        nothing = _Trace((), [self._embedded])
        known = [trace for trace in (self._last, self._base) if trace is not None]
        return max(((_shared_prefix(coalition, t.coalition), t) for t in [*known, nothing]), key=lambda pair: pair[0])

    def _run(self, layer: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        out = layer(hidden, **self._arguments[len(hidden)][index])
        left: torch.Tensor = out[0] if isinstance(out, tuple) else out  # transformers before 4.54 returned a tuple
        return left

    def _losses(self, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        losses = [
            self._window_loss(row, ids)
            for batch, tokens in zip(hidden, self._batches, strict=True)
            for row, ids in zip(batch, tokens, strict=True)
        ]
        values: NDArray[np.float64] = torch.stack(losses).double().cpu().numpy()
        if not np.isfinite(values).all():
            raise SensitivityError(
                "The model's loss is not finite on this text; validate an F16 GGUF of it to see whether it works."
            )
        return values

    def _window_loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of one window in float32: ``hidden`` (T, d) as it leaves the last block, ``ids`` (T,)."""
        hidden, targets = self._model.model.norm(hidden[None, :-1])[0], ids[1:]
        cap = self.spec.hyperparameters.final_softcap
        step = max(1, _LOGITS_PER_CHUNK // self.spec.hyperparameters.vocabulary)
        total = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(targets), step):
            logits = self._model.lm_head(hidden[first : first + step]).float()
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            total += functional.cross_entropy(logits, targets[first : first + step], reduction="sum")
        return total / len(targets)


def _shared_prefix(one: Coalition, other: Coalition) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


def copy_sharing_vectors(layer: torch.nn.Module) -> torch.nn.Module:
    """Copy a block; norms, biases and the configuration are shared, only the matrices are new."""
    shared = {id(p): p for p in layer.parameters() if p.dim() == 1}
    configs = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    return copy.deepcopy(layer, memo={**shared, **configs})


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
