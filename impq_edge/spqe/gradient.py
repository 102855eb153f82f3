"""The gradient of a text's mean loss, passed back through a model block after block.

Of the text's way through the model only what enters each block is kept; a block is run again to be differentiated, one
batch at a time, so that no more than one batch's way through one block lies in memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from impq_edge.spqe.walk import Hidden, Walk

Progress = Callable[[int], None]
"""Told how many blocks have just been finished."""

_LOGITS_COPIES = 4  # alive at once: what the head returns, its float32, the log-softmax, and a gradient


def matrix_gradients(
    walk: Walk, layers: Sequence[torch.nn.Module], entering: list[Hidden], progress: Progress = lambda _: None
) -> dict[str, torch.Tensor]:
    """Return ∂ loss / ∂ W for every matrix of the blocks, by its name in the checkpoint.

    The loss is the mean over all tokens but each window's first, nats per token.

    Parameters
    ----------
    walk, layers
        The text, and all L blocks of the model as they were taken from it.
    entering
        What enters blocks 0…L − 1, and what leaves the last one; emptied on the way, from its end.

    Returns
    -------
    dict
        (out, in) each, float32 whatever the model computes in, in host memory.
    """
    found: dict[str, torch.Tensor] = {}
    leaving = _head_gradients(walk, entering.pop())
    for block in reversed(range(len(layers))):
        gradients, leaving = _back_through(walk, layers[block], block, entering.pop(), leaving)
        found |= gradients
        progress(1)
    return found


@torch.enable_grad()
def _head_gradients(walk: Walk, hidden: Hidden) -> Hidden:
    """Return the gradient with respect to what leaves the last block, a tensor (windows, T, d) per batch."""
    tokens = sum(ids[:, 1:].numel() for ids in walk.batches)
    step = max(1, walk.tokens_per_chunk // _LOGITS_COPIES)
    found: Hidden = []
    for left, ids in zip(hidden, walk.batches, strict=True):
        leaf, targets = left.detach().requires_grad_(), ids[:, 1:].flatten()
        entering = walk.entering_head(leaf)
        pieces: list[torch.Tensor] = []
        for first in range(0, len(targets), step):
            piece = entering[first : first + step].detach().requires_grad_()
            losses = functional.cross_entropy(walk.logits(piece), targets[first : first + step], reduction="sum")
            pieces += torch.autograd.grad(losses / tokens, piece)
        found += torch.autograd.grad(entering, leaf, torch.cat(pieces))
    return found


@torch.enable_grad()
def _back_through(
    walk: Walk, layer: torch.nn.Module, block: int, entering: Hidden, leaving: Hidden
) -> tuple[dict[str, torch.Tensor], Hidden]:
    """Return the gradients of a block's matrices and of what enters it, given that of what leaves it."""
    tensors = walk.spec.block_matrices(block)
    matrices = [layer.get_parameter(tensor.name_in_block).requires_grad_() for tensor in tensors]
    sums = [torch.zeros_like(matrix, dtype=torch.float32, requires_grad=False) for matrix in matrices]
    passed: Hidden = []
    for hidden, gradient in zip(entering, leaving, strict=True):
        leaf = hidden.detach().requires_grad_()
        first, *found = torch.autograd.grad(walk.run(layer, block, leaf), [leaf, *matrices], gradient)
        passed.append(first)
        for total, part in zip(sums, found, strict=True):
            total.add_(part)
    for matrix in matrices:
        matrix.requires_grad_(False)
    return {tensor.name: total.cpu() for tensor, total in zip(tensors, sums, strict=True)}, passed
