"""Which coalitions are evaluated, in which order. A coalition is the tuple of its blocks' bits."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from impq_edge.backends import Bits

Coalition = tuple[Bits, ...]
"""Bits of each of the L blocks: the paper's S is the set of blocks at 4."""


def uniform(bits: Bits, n_blocks: int) -> Coalition:
    """Return the coalition with every block at the same bits."""
    return (bits,) * n_blocks


def permutations(n_blocks: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw ``count`` independent orders of ``n_blocks`` players, shape (count, n_blocks)."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(n_blocks) for _ in range(count)])


def walk(order: NDArray[np.int64]) -> Iterator[Coalition]:
    """Yield the L + 1 coalitions of one progressive quantisation: all at 4 bit, then one block less each time."""
    bits: list[Bits] = [4] * len(order)
    yield tuple(bits)
    for block in order:
        bits[block] = 2
        yield tuple(bits)


def evaluation_order(orders: NDArray[np.int64]) -> list[Coalition]:
    """Return the coalitions that walks need, each once, in an order that lets activations be reused.

    The two extremes come first: every walk begins and ends there.
    """
    n_blocks = orders.shape[1]
    extremes = [uniform(4, n_blocks), uniform(2, n_blocks)]
    return list(dict.fromkeys([*extremes, *(coalition for order in orders for coalition in walk(order))]))
