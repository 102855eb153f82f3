"""What enters a block's matrices: the statistics that some backends quantise by."""

from typing import Any, Self

import torch

from impq_edge.backends import Inputs, Statistics


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
        mean = self._sums.pop(module) / self._tokens[module]
        if self._statistics == "squares":
            return Inputs(self._tokens[module], mean, None)
        return Inputs(self._tokens[module], mean.diagonal().clone(), mean)

    def _see(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        name = self._matrices[module]
        rows = arguments[0].shape[:-1].numel()
        self._tokens[name] = self._tokens.get(name, 0) + rows
        found = self._sum(arguments[0])
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def _sum(self, entering: torch.Tensor) -> torch.Tensor:
        if self._latest is not None and self._latest[0] is entering:  # query, key and value see the same
            return self._latest[1]
        flat = entering.flatten(0, -2).float()
        found = flat.square().sum(dim=0) if self._statistics == "squares" else flat.T @ flat
        self._latest = (entering, found)
        return found
