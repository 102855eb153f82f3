"""Blocks that run with any choice between two versions of their matrices; what needs a GPU is in test_gpu.py."""

import pytest
import torch

from impq_edge.backends import Bits
from impq_edge.spqe.versions import Versions

N_BLOCKS = 3
NAMES = ["0.weight", "1.weight"]


class Block(torch.nn.Sequential):
    """Two matrices and a vector that is no player's."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=True))
        self.requires_grad_(False)
        self[1].bias.fill_(0.5)


def scale(block: int, matrix: int, bits: Bits) -> float:
    return bits + block / 8 + matrix / 16


def made() -> tuple[Versions, list[Block], list[list[dict[Bits, torch.Tensor]]]]:
    versions = Versions(N_BLOCKS, torch.device("cpu"))
    blocks = [Block() for _ in range(N_BLOCKS)]
    stored: list[list[dict[Bits, torch.Tensor]]] = [
        [{bits: scale(index, matrix, bits) * torch.eye(2) for bits in (2, 4)} for matrix in range(2)]
        for index in range(N_BLOCKS)
    ]
    for block, both in zip(blocks, stored, strict=True):
        versions.add(block, NAMES, both)
    return versions, blocks, stored


CHOICES: list[list[tuple[Bits, ...]]] = [
    [(2, 2), (2, 2), (2, 2)],
    [(4, 4), (4, 4), (4, 4)],
    [(2, 4), (4, 2), (4, 4)],
    [(4, 4), (2, 2), (2, 4)],
]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_every_block_runs_with_the_matrices_chosen_for_it(first: int) -> None:
    versions, blocks, _ = made()
    for bits in [*CHOICES, *CHOICES[::-1]]:
        x, expected, ran = torch.ones(1, 2), torch.ones(1, 2), []
        for index, layer in enumerate(versions.blocks(first, bits), first):
            x = layer(x)
            expected = scale(index, 1, bits[index][1]) * (scale(index, 0, bits[index][0]) * expected) + 0.5
            ran.append(layer)
        assert ran == blocks[first:]
        torch.testing.assert_close(x, expected)


def test_choosing_copies_nothing_and_changes_no_version() -> None:
    versions, blocks, stored = made()
    kept = [[{b: t.clone() for b, t in both.items()} for both in matrices] for matrices in stored]
    for bits in CHOICES:
        for index, layer in enumerate(versions.blocks(0, bits)):
            layer(torch.ones(1, 2))
            for name, both, b in zip(NAMES, stored[index], bits[index], strict=True):
                assert layer.get_parameter(name).data_ptr() == both[b].data_ptr()
    for matrices, copies in zip(stored, kept, strict=True):
        assert all(torch.equal(both[b], copy[b]) for both, copy in zip(matrices, copies, strict=True) for b in (2, 4))
    assert all(torch.equal(block[1].bias, torch.full((2,), 0.5)) for block in blocks)


def test_a_block_lets_its_own_matrices_go() -> None:
    versions, block = Versions(1, torch.device("cpu")), Block()
    own = block[0].weight.data_ptr()
    both: list[dict[Bits, torch.Tensor]] = [{2: torch.zeros(2, 2), 4: torch.ones(2, 2)} for _ in range(2)]
    versions.add(block, NAMES, both)
    assert block[0].weight.data_ptr() in {tensor.data_ptr() for tensor in both[0].values()} - {own}


def test_nothing_is_streamed_where_everything_stays() -> None:
    assert made()[0].streamed_blocks == 0
    assert Versions(N_BLOCKS, torch.device("cpu"), N_BLOCKS).streamed_blocks == 0
