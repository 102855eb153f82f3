"""How well allocations are chosen from profiles of simulated games: by the paper's program, and by a model of the game.

No checkpoint and no GPU; about two minutes of one core:

    python tools/simulate_rounds.py
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from impq_edge.impq.allocate import bits_within
from impq_edge.impq.problem import Constraint
from impq_edge.spqe.choice import Proposals
from impq_edge.spqe.estimate import Estimate, estimate
from impq_edge.spqe.playing import CURVE, Budget, Rounds, as_coalition, evaluations_for, play_rounds
from impq_edge.spqe.rounds import Room, design, fitting
from impq_edge.spqe.sampling import Coalition, draws, evaluation_order, uniform

PLAYERS = 24
PERMUTATIONS = (8, 33)
BETWEEN = [Fraction(bits) for bits in ("2.4", "2.65", "2.9", "3.15", "3.4", "3.6")]  # where no rounds are played
SHAPES = ((0.1, 1.0, 1.0), (0.35, 1.0, 6.0), (0.7, 1.0, 6.0), (0.1, 1.5, 1.0), (0.35, 1.5, 6.0), (0.7, 1.5, 6.0))
"""Size of interactions, power by which damage bends, and damage of all players together."""

Losses = dict[Coalition, float]


def game(seed: int) -> tuple[Callable[[Coalition], float], list[int]]:
    """Return the loss of a coalition, saturating at 7 nats above 3.6, and what players cost at 4 bit."""
    generator = np.random.default_rng(seed)
    pairs_size, power, damage = SHAPES[seed % len(SHAPES)]
    alone = generator.gamma(0.5, 1, PLAYERS)
    alone /= alone.sum()
    pairs = generator.normal(0, 1, (PLAYERS, PLAYERS)) * np.sqrt(np.outer(alone, alone))
    pairs = (pairs + pairs.T) / 2 * (1 - np.eye(PLAYERS))

    def loss(coalition: Coalition) -> float:
        x = (np.array(coalition) == 2).astype(float)
        harm = max(damage * (alone @ x) + pairs_size * x @ pairs @ x, 1e-3) ** power
        return float(3.6 + 7 * (1 - np.exp(-harm / 3)))

    return loss, generator.integers(5, 12, PLAYERS).tolist()


def budget(costs: Sequence[int], target: Fraction) -> Budget:
    """Return what average bits leave, if bytes and bits were the same."""
    return (Constraint("size", "bytes", tuple((0, cost) for cost in costs), int((target - 2) / 2 * sum(costs))),)


def profiles(seed: int) -> Iterator[tuple[str, Losses, Estimate, Sequence[Fraction]]]:
    """Yield what a profile holds, how it is named, its estimate, and where allocations are asked of it."""
    loss, costs = game(seed)
    for permutations in PERMUTATIONS:
        orders = draws("permutations", PLAYERS, permutations, seed)
        seen = {c: loss(c) for c in evaluation_order("permutations", orders, PLAYERS)}
        yield f"{permutations} permutations", seen, estimate("permutations", PLAYERS, orders, seen), CURVE
        evaluations, asked = evaluations_for(PLAYERS, permutations), Losses()

        def ask(
            coalitions: Sequence[Coalition], asked: Losses = asked, loss: Callable[[Coalition], float] = loss
        ) -> NDArray[np.float64]:
            asked.update((c, loss(c)) for c in coalitions)
            return np.array([asked[c] for c in coalitions])

        rounds = Rounds.within([budget(costs, target) for target in CURVE], evaluations)
        first, pairs = design(PLAYERS, evaluations, rounds.share, seed)
        ask(first)
        play_rounds(ask, asked, pairs, rounds, evaluations)
        found = estimate("stratified", PLAYERS, pairs, asked)
        yield f"rounds, E of {permutations} permutations", asked, found, BETWEEN


def regrets(seed: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the loss increases of the program's and the model's choice and of the best measured, over the least."""
    loss, costs = game(seed)
    all_4 = loss(uniform(4, PLAYERS))
    for name, seen, found, targets in profiles(seed):
        for target in targets:
            within = budget(costs, target)
            room = Room.of(within)
            measured, published = fitting(seen, room), as_coalition(bits_within(within, found.phi, found.covariance))
            chosen = [published, Proposals(seen, room).best(measured, published), measured[0]]
            increases = np.array([loss(c) - all_4 for c in chosen])
            yield name, (increases / increases.min()).tolist()


def main() -> None:
    """Print the table of docs/method.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=len(SHAPES))
    options = parser.parse_args()
    rows: dict[str, list[list[float]]] = {}
    for seed in range(options.games):
        for name, values in regrets(seed):
            rows.setdefault(name, []).append(values)
    print("| profile | IMPQ: mean, median | model | best measured |\n|---|---:|---:|---:|")
    for name, values in rows.items():
        cells = (f"{np.mean(column):.2f}, {np.median(column):.2f}" for column in zip(*values, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
