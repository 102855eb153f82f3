"""Text on its way through a model, block after block: for the game, the ladder and calibrated encoding alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_block, load_outside
from impq_edge.model.spec import ModelSpec

LOGITS_PER_CHUNK = 1 << 26  # float32 logits alive at once: 256 MiB
# On a CPU 16 MiB, which the allocator uses again, where the system clears the pages of every larger piece anew (a sixth
# of the demo's time); but 256 tokens at least, so that computing with the head takes longer than reading it.
_LOGITS_PER_CHUNK_ON_CPU, _TOKENS_PER_CHUNK_ON_CPU = 1 << 22, 256
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}

Hidden = list[torch.Tensor]
"""Activations between two blocks, one tensor (windows, T, hidden) per batch."""


class Walk:
    """Fixed windows of text and a model to pass them through.

    Parameters
    ----------
    model
        A ``transformers`` causal language model; its blocks are taken over.
    spec
        Its record, L blocks.
    windows
        Token ids, shape (windows, T).
    load
        Gives a block its weights, on the model's device, where the model came without
        (:func:`impq_edge.model.load.load_outside`).
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        windows: NDArray[np.int64],
        load: Callable[[torch.nn.Module, int], None] = lambda _layer, _block: None,
    ) -> None:
        self.spec = spec
        self._model = model
        self._load = load
        embedding = model.model.embed_tokens.weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        rows = max(1, TOKENS_PER_BATCH[self.device.type] // windows.shape[1])
        self.batches = [torch.from_numpy(windows[i : i + rows]).to(self.device) for i in range(0, len(windows), rows)]
        self.embedded, self._arguments = _capture(model, self.batches)

    def beside(self, windows: Windows) -> "Walk":
        """Return a walk of another text through the same model, of which nothing may have been taken."""
        return Walk(self._model, self.spec, windows.tokens, self._load)

    @property
    def outside(self) -> Any:
        """The model without what was taken of its blocks: embedding, norm and head."""
        return self._model

    def take(self, block: int) -> torch.nn.Module:
        """Take a block out of the model, with its weights, to where blocks run."""
        layer: torch.nn.Module = self._model.model.layers[block]
        self._model.model.layers[block] = torch.nn.Identity()
        self._load(layer, block)
        return layer

    def run(self, layer: torch.nn.Module, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what leaves a block when ``hidden`` (windows, T, d), one batch, enters it."""
        left: torch.Tensor = layer(hidden, **self._arguments[len(hidden)][block])
        return left

    def embed(self) -> Hidden:
        """Embed the text again, with the embedding that the model has now."""
        return _capture(self._model, self.batches)[0]

    def entering_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head multiplies for every token but the last of each window, (windows · (T − 1), d)."""
        normed: torch.Tensor = self._model.model.norm(hidden[:, :-1])
        return normed.flatten(0, 1)

    def logits(self, entering: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """Return float32 logits (tokens, vocabulary) of what enters the head, (tokens, d), or another head."""
        cap = self.spec.hyperparameters.final_softcap
        logits = functional.linear(entering, self._model.lm_head.weight if head is None else head).float()
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def tokens_per_chunk(self) -> int:
        """How many tokens' logits are alive at once."""
        vocabulary = self.spec.hyperparameters.vocabulary
        most = max(1, LOGITS_PER_CHUNK // vocabulary)
        if self.device.type != "cpu":
            return most
        return min(most, max(_TOKENS_PER_CHUNK_ON_CPU, _LOGITS_PER_CHUNK_ON_CPU // vocabulary))

    def losses(self, hidden: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        """Return each window's mean −log p per token in float32, from what leaves the last block, (windows,)."""
        means = [self._token_losses(*pair).mean(dim=1) for pair in zip(hidden, self.batches, strict=True)]
        losses: NDArray[np.float64] = torch.cat(means).double().cpu().numpy()
        return losses

    def divergences(
        self, reference: Sequence[torch.Tensor], hidden: Sequence[torch.Tensor], head: torch.Tensor | None = None
    ) -> NDArray[np.float64]:
        """Return each window's mean KL divergence Σ p (log p − log q) to another model's p, (windows,), nats per token.

        Parameters
        ----------
        reference
            What enters that model's head, of every batch, as :meth:`entering_head` returns it.
        hidden
            What leaves this model's last block.
        head
            That model's head, where it is not this one's.
        """
        means = [
            self._token_divergences(before, self.entering_head(batch), head).view(len(batch), -1).mean(dim=1)
            for before, batch in zip(reference, hidden, strict=True)
        ]
        divergences: NDArray[np.float64] = torch.cat(means).double().cpu().numpy()
        return divergences

    def _token_divergences(
        self, reference: torch.Tensor, entering: torch.Tensor, head: torch.Tensor | None
    ) -> torch.Tensor:
        """Return Σ p (log p − log q) of every token, (tokens,), from what enters the heads."""
        step, found = self.tokens_per_chunk // 2 or 1, []  # two models' logits are alive
        for first in range(0, len(reference), step):
            log_p = self.logits(reference[first : first + step], head).log_softmax(dim=1)
            log_q = self.logits(entering[first : first + step]).log_softmax(dim=1)
            found.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
        return torch.cat(found)

    def _token_losses(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return −log p of every token but the first of each window, (windows, T − 1)."""
        entering, targets = self.entering_head(hidden), ids[:, 1:].flatten()
        step = self.tokens_per_chunk
        losses = [
            functional.cross_entropy(
                self.logits(entering[first : first + step]), targets[first : first + step], reduction="none"
            )
            for first in range(0, len(targets), step)
        ]
        return torch.cat(losses).view(len(ids), -1)


def open_walk(directory: Path, spec: ModelSpec, windows: Windows, device: torch.device, dtype: torch.dtype) -> Walk:
    """Load a checkpoint but for its blocks, which are loaded one at a time as they are taken."""

    def load(layer: torch.nn.Module, block: int) -> None:
        load_block(directory, spec, layer, block, device, dtype)

    return Walk(load_outside(directory, spec, device, dtype), spec, windows.tokens, load)


def _capture(model: Any, batches: Sequence[torch.Tensor]) -> tuple[Hidden, dict[int, list[dict[str, Any]]]]:
    """Record what ``transformers`` feeds its blocks: the embedded text, and each block's other arguments.

    Masks and rotary embeddings are built by the library itself, whatever its version; they depend only
    on the batch's shape, so one record per number of rows is enough. No block computes anything.
    """
    embedded: Hidden = []
    arguments: dict[int, list[dict[str, Any]]] = {}
    layers = list(model.model.layers)

    def passing(first: bool) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
            if first:
                embedded.append(hidden_states)
            others.pop("past_key_values", None)
            arguments.setdefault(len(hidden_states), []).append(others)
            return hidden_states

        return forward

    for index, layer in enumerate(layers):
        layer.forward = passing(index == 0)
    try:
        with torch.no_grad():  # not inference_mode: blocks are also differentiated with what is recorded here
            for batch in batches:
                arguments.pop(len(batch), None)
                model.model(input_ids=batch, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return embedded, arguments
