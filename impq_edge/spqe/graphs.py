"""CUDA graphs of small blocks, whose kernels are over before the next one could be launched."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

MAX_FLOP = 1e12
"""Blocks of more work per run keep the GPU busy without graphs (measured, see docs/speed.md)."""

_MAX_GRAPHS = 512  # with tensors as players a block has 128 versions; those met first are recorded
_WARM_UP_RUNS = 1  # libraries choose kernels and allocate workspaces on a first run, which a graph cannot record


class Graphs:
    """Records what a function does to one input shape on its second call, and replays it from then on.

    A replay launches the same kernels on the same addresses, so it changes no bit of a result. Input and
    output pass through two buffers that all graphs of a shape share.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Any] = {}
        self._buffers: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._pool: Any = None

    def run(
        self, key: Hashable, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return ``function(hidden)``, whose result has the input's shape.

        ``key`` stands for everything the function reads besides: the same key, the same tensors at the same
        addresses.
        """
        graph = self._graphs.get(key)
        if graph is None:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if seen <= _WARM_UP_RUNS or len(self._graphs) >= _MAX_GRAPHS:
                return function(hidden)
            graph = self._graphs[key] = self._record(function, hidden)
        entering, leaving = self._buffers[tuple(hidden.shape)]
        entering.copy_(hidden)
        graph.replay()
        return leaving.clone()

    def _record(self, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> Any:
        shape = tuple(hidden.shape)
        if shape not in self._buffers:
            self._buffers[shape] = (torch.empty_like(hidden), torch.empty_like(hidden))
        entering, leaving = self._buffers[shape]
        entering.copy_(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            leaving.copy_(function(entering))
        self._pool = graph.pool()
        return graph
