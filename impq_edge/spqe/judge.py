"""What a quantised model does to a text, beside the unquantised one: loss and divergence from one set of logits."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from impq_edge.spqe.walk import Hidden, Walk

KEPT_BYTES = 2 << 30
"""Probabilities of a text that are kept, 4 bytes × tokens × vocabulary, so that a divergence takes no second head."""


class Judge:
    """Loss of a text, and its divergence Σ p (log p − log q) from what the unquantised model made of it.

    In the divergence Σ p log p is known beforehand, and the rest is the mean over p of −log q. The probabilities p are
    kept where there is room, and made anew from what enters the head where not; the numbers are the same.

    Parameters
    ----------
    walk
        The text, and the head.
    reference
        What entered the unquantised model's head of every batch, as :meth:`Walk.entering_head` returns it.
    kept_bytes
        How much the probabilities may take.
    """

    @torch.inference_mode()
    def __init__(self, walk: Walk, reference: Hidden, kept_bytes: int = KEPT_BYTES) -> None:
        self._walk = walk
        self._reference = reference
        self._kept: list[list[torch.Tensor]] | None = [] if kept_bytes >= probabilities_bytes(walk) else None
        self._negative_entropies: list[torch.Tensor] = []  # Σ p log p of every token of every batch, (tokens,)
        for batch in reference:
            chunks, entropies = [], []
            for entering in torch.split(batch, walk.tokens_per_chunk):
                log_p = walk.logits(entering).log_softmax(dim=1)
                p = log_p.exp()
                entropies.append(torch.linalg.vecdot(p, log_p))
                if self._kept is not None:
                    chunks.append(p)
            self._negative_entropies.append(torch.cat(entropies))
            if self._kept is not None:
                self._kept.append(chunks)

    @torch.inference_mode()
    def judged(self, hidden: Hidden) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean loss and mean divergence of each window, (windows,) both, nats per token.

        Parameters
        ----------
        hidden
            What left the quantised model's last block.
        """
        losses, divergences = [], []
        for index, (batch, ids) in enumerate(zip(hidden, self._walk.batches, strict=True)):
            entering, targets = self._walk.entering_head(batch), ids[:, 1:].flatten()
            chunks = [torch.split(each, self._walk.tokens_per_chunk) for each in (entering, targets)]
            lost, crossed = [], []
            for part, target, p in zip(*chunks, self._probabilities(index), strict=True):
                logits = self._walk.logits(part)
                total = logits.logsumexp(dim=1)
                lost.append(total - logits.gather(1, target[:, None])[:, 0])
                crossed.append(total - torch.linalg.vecdot(p, logits))
            diverged = torch.cat(crossed) + self._negative_entropies[index]
            losses.append(torch.cat(lost).view(len(ids), -1).double().mean(dim=1))
            divergences.append(diverged.view(len(ids), -1).double().mean(dim=1))
        return torch.cat(losses).cpu().numpy(), torch.cat(divergences).cpu().numpy()

    def _probabilities(self, batch: int) -> Iterator[torch.Tensor]:
        """Yield p of every chunk of a batch, (tokens, vocabulary)."""
        if self._kept is not None:
            yield from self._kept[batch]
            return
        for entering in torch.split(self._reference[batch], self._walk.tokens_per_chunk):
            yield self._walk.logits(entering).log_softmax(dim=1).exp()


def probabilities_bytes(walk: Walk) -> int:
    """Return what a text's probabilities take, 4 bytes × tokens × vocabulary."""
    return 4 * sum(batch.numel() for batch in walk.batches) * walk.spec.hyperparameters.vocabulary
