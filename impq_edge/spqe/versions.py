"""Both versions of every matrix of a model's blocks, and blocks that run with any choice between them.

A block is one module; choosing bits sets pointers. On a GPU whose memory does not hold both versions of
every matrix, those of the first blocks (an evaluation seldom starts there) stay in pinned host memory and
are copied to one of two places on the GPU while the block before them is computed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from impq_edge.backends import BITS, Bits

PLACES = 2  # on the device, for blocks that wait in host memory: one is read while the other is written


class Versions:
    """What every coalition is made of.

    Parameters
    ----------
    n_blocks
        L.
    device
        Where blocks run.
    resident
        How many of the last blocks keep both versions on ``device``; all of them by default.
    """

    def __init__(self, n_blocks: int, device: torch.device, resident: int | None = None) -> None:
        self._device = device
        self._first_resident = 0 if resident is None else n_blocks - resident
        self._blocks: list[tuple[torch.nn.Module, list[torch.nn.Parameter], list[dict[Bits, torch.Tensor]]]] = []
        self._stream: Any = torch.cuda.Stream() if self._first_resident > 0 else None  # type: ignore[no-untyped-call]
        self._places: list[list[torch.Tensor]] = []
        self._free: list[Any] = []  # per place: after which it may be overwritten

    @property
    def streamed_blocks(self) -> int:
        """How many blocks are copied to the device for every evaluation."""
        return self._first_resident

    def add(self, layer: torch.nn.Module, names: Sequence[str], stored: Sequence[dict[Bits, torch.Tensor]]) -> None:
        """Keep a block: the module, its matrices' names in it, and the two versions of each.

        The module's own matrices are let go.
        """
        index = len(self._blocks)
        if index < self._first_resident:
            stored = [{bits: _pinned(tensor) for bits, tensor in both.items()} for both in stored]
            if not self._places:
                self._places = [[torch.empty_like(b[4], device=self._device) for b in stored] for _ in range(PLACES)]
                self._free = [torch.cuda.Event() for _ in range(PLACES)]  # type: ignore[no-untyped-call]
        parameters = [layer.get_parameter(name) for name in names]
        self._blocks.append((layer, parameters, list(stored)))
        self._point(index, [both[BITS[0]] for both in stored])

    def blocks(self, first: int, bits: Sequence[tuple[Bits, ...]]) -> Iterator[torch.nn.Module]:
        """Yield the blocks from ``first`` on, each ready to run with its matrices at the bits given for it.

        A block is to be run before the next one is asked for. ``bits`` has one tuple, of one entry per
        matrix, for every block of the model.
        """
        ahead = self._copied(first, bits[first]) if first < self._first_resident else None
        for index in range(first, len(self._blocks)):
            layer, _, stored = self._blocks[index]
            if ahead is None:
                self._point(index, [both[b] for both, b in zip(stored, bits[index], strict=True)])
                yield layer
                continue
            place, event = ahead
            more = index + 1 < self._first_resident
            ahead = self._copied(index + 1, bits[index + 1]) if more else None
            torch.cuda.current_stream().wait_event(event)
            self._point(index, self._places[place])
            yield layer
            self._free[place].record()

    def _copied(self, index: int, bits: tuple[Bits, ...]) -> tuple[int, Any]:
        """Start copying a block's matrices to a place; return the place and the event of the copy's end."""
        place = index % PLACES
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[place])
            for target, both, b in zip(self._places[place], self._blocks[index][2], bits, strict=True):
                target.copy_(both[b], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return place, event

    def _point(self, index: int, tensors: Sequence[torch.Tensor]) -> None:
        for parameter, tensor in zip(self._blocks[index][1], tensors, strict=True):
            parameter.data = tensor


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
