"""What enters a block's matrices: the statistics that some backends quantise by."""

from typing import Any, Self

import torch

from impq_edge.backends import Inputs, Statistics
from impq_edge.spqe.walk import Hidden, Walk


class Observer:
    """Watches every matrix of a block while text passes through it; a context manager.

    ``mean_square`` is llama.cpp's importance matrix (tools/imatrix/imatrix.cpp: the sum of squares of each
    column over tokens, divided by their number), ``second_moment`` GPTQ's Hessian up to a factor.
    """

    def __init__(self, layer: torch.nn.Module, statistics: Statistics) -> None:
        self._statistics = statistics
        self._matrices: dict[torch.nn.Module, str] = {
            module: name
            for name, module in layer.named_modules()
            if statistics != "none" and isinstance(module, torch.nn.Linear)
        }
        self._hooks: list[Any] = []
        self._tokens: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        self._hooks = [module.register_forward_pre_hook(self._see) for module in self._matrices]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._latest = None

    def take(self, name: str) -> Inputs | None:
        """Return the statistics of a matrix and let go of them; None if none were asked for.

        ``name`` is that of its weight in the block. The moment of a wide layer is as large as its weights.
        """
        if self._statistics == "none":
            return None
        module = name.removesuffix(".weight")
        return _inputs(self._tokens[module], self._sums.pop(module))

    def _see(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        name = self._matrices[module]
        rows = arguments[0].shape[:-1].numel()
        self._tokens[name] = self._tokens.get(name, 0) + rows
        found = self._sum(arguments[0])
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def _sum(self, entering: torch.Tensor) -> torch.Tensor:
        if self._latest is not None and self._latest[0] is entering:  # query, key and value see the same
            return self._latest[1]
        found = _sum(entering, self._statistics)
        self._latest = (entering, found)
        return found


def entering_head(walk: Walk, hidden: Hidden, statistics: Statistics) -> Inputs | None:
    """Return the statistics of what enters the head, given what leaves the last block; None if none are asked for.

    A tied head is also the embedding, of which tokens are looked up: an error then counts in every column alike, and
    as much again on average is added to every column.
    """
    if statistics == "none":
        return None
    tokens, total = 0, torch.zeros(())
    for batch in hidden:
        entering = walk.entering_head(batch)
        tokens += len(entering)
        total = _sum(entering, statistics) + total.to(entering.device)
    found = _inputs(tokens, total)
    if not walk.spec.hyperparameters.tied_embeddings:
        return found
    looked_up = found.mean_square.mean()
    moment = found.second_moment
    if moment is not None:
        moment = moment + looked_up * torch.eye(len(moment), device=moment.device)
    return Inputs(tokens, found.mean_square + looked_up, moment)


def _sum(entering: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    flat = entering.flatten(0, -2).float()
    return flat.square().sum(dim=0) if statistics == "squares" else flat.T @ flat


def _inputs(tokens: int, total: torch.Tensor) -> Inputs:
    mean = total / tokens
    return Inputs(tokens, mean, None) if mean.dim() == 1 else Inputs(tokens, mean.diagonal().clone(), mean)
