"""Every way of choosing bits that the study compares: what it evaluates, and what it answers for each budget.

A method is given a game it may ask and the budgets; it returns one coalition per budget. Where a method has a program,
it is solved by the same solver under the same constraints.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import AllocationError
from impq_edge.impq.problem import Constraint, Problem, published_objective
from impq_edge.impq.solve import solve
from impq_edge.spqe.complements import interactions
from impq_edge.spqe.estimate import Estimate, complement_pairs, estimate
from impq_edge.spqe.playing import SHARE
from impq_edge.spqe.rounds import Room, best_measured, design, neighbours, search_rounds
from impq_edge.spqe.sampling import Coalition, alone, coalitions_of, draws, draws_for, evaluation_order
from impq_edge.spqe.surrogate import Prior
from impq_edge.study.lab import Asked

Array = NDArray[np.float64]

PERMUTATIONS = 100
"""M of the paper."""

_SOLVE_S = 1.0  # for one program; where interactions are strong, a proof takes minutes
_SEARCH_STARTS = 100
_POPULATION, _OFFSPRING = 6, 12


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods are given."""

    constraints: tuple[Constraint, ...]  # one budget each
    evaluations: int  # that methods which choose what to evaluate may use, for all budgets together
    seed: int

    @property
    def rooms(self) -> tuple[Room, ...]:
        """The budgets as matrices."""
        return tuple(Room.of([constraint]) for constraint in self.constraints)


Answers = list[Coalition]


def by_scores(harm: Array, setting: Setting) -> Answers:
    """Minimise Σ harm over the players at 2 bit."""
    return [_minimised(harm, np.zeros((len(harm),) * 2), constraint) for constraint in setting.constraints]


def singles(asked: Asked, _: Setting | None = None) -> Array:
    """Return the measured increase of each player alone at 2 bit, (N,)."""
    base = asked.anchors()[0]
    return asked(alone(2, asked.n_players)) - base


def leave_one_out(asked: Asked, _: Setting | None = None) -> Array:
    """Return what each player saves when it alone is at 4 bit, (N,)."""
    worst = asked.anchors()[1]
    return worst - asked(alone(4, asked.n_players))


def shapley(asked: Asked, setting: Setting, permutations: int = PERMUTATIONS) -> Estimate:
    """Return the published estimate."""
    n = asked.n_players
    orders = draws("permutations", n, permutations, setting.seed)
    asked(evaluation_order("permutations", orders, n))
    return estimate("permutations", n, orders, asked.seen)


def impq(found: Estimate, setting: Setting, alpha: float) -> Answers:
    """Solve the published program."""
    linear, quadratic = published_objective(found.phi, found.covariance, alpha)
    return [_minimised(linear, quadratic, constraint) for constraint in setting.constraints]


def shuffled(found: Estimate, setting: Setting, alpha: float) -> Answers:
    """Solve it with the off-diagonals of C dealt out anew: what is left if pairs say something about themselves."""
    upper = np.triu_indices(len(found.phi), 1)
    covariance = np.diag(np.diag(found.covariance))
    covariance[upper] = np.random.default_rng(setting.seed).permutation(found.covariance[upper])
    covariance.T[upper] = covariance[upper]
    return impq(dataclasses.replace(found, covariance=covariance), setting, alpha)


def with_variance(found: Estimate, setting: Setting, alpha: float) -> Answers:
    """Minimise φ + (2 − α) diag C, what the published program is without its off-diagonals."""
    return by_scores(found.phi + (2 - alpha) * np.diag(found.covariance), setting)


def pairwise(asked: Asked, setting: Setting) -> Answers:
    """Fit v = Σ a_i x_i + Σ I_ij x_i x_j to complement pairs and minimise it."""
    n = asked.n_players
    found = _stratified(asked, setting.evaluations, setting.seed)
    pairs = complement_pairs(n, found, asked.seen)
    phi = estimate("stratified", n, found, asked.seen).phi
    fitted = interactions(pairs, phi)
    return [_minimised(phi - fitted.sum(axis=1) / 2, fitted / 2, constraint) for constraint in setting.constraints]


def stratified(asked: Asked, setting: Setting) -> Answers:
    """Minimise φ of complement pairs."""
    found = _stratified(asked, setting.evaluations, setting.seed)
    return by_scores(estimate("stratified", asked.n_players, found, asked.seen).phi, setting)


def clado(asked: Asked, setting: Setting) -> Answers:
    """Measure every pair at 2 bit, everything else at 4 (Deng et al. 2023, CLADO), and minimise the quadratic form."""
    n = asked.n_players
    base, apart = asked.anchors()[0], singles(asked)
    first, second = np.triu_indices(n, 1)
    both = asked([tuple(2 if p in (i, j) else 4 for p in range(n)) for i, j in zip(first, second, strict=True)])
    found = np.zeros((n, n))
    found[first, second] = both - base - apart[first] - apart[second]
    return [_minimised(apart, (found + found.T) / 2, constraint) for constraint in setting.constraints]


def random_answers(n_players: int, setting: Setting, index: int) -> Answers:
    """Return one random allocation per budget, into which nothing more fits."""
    generator = np.random.default_rng([setting.seed, index])
    return [next(_randoms(generator, n_players, room)) for room in setting.rooms]


def random_best(asked: Asked, setting: Setting) -> Answers:
    """Return the best of as many random allocations as others may evaluate."""
    generator = np.random.default_rng([setting.seed, 1 << 20])
    answers = []
    for room in setting.rooms:
        several = _randoms(generator, asked.n_players, room)
        drawn = [next(several) for _ in range(max(1, setting.evaluations // len(setting.constraints)))]
        values = asked(drawn)
        answers.append(drawn[int(np.argmin(values))])
    return answers


def evolution_from_singles(asked: Asked, setting: Setting) -> Answers:
    """Begin with what players alone at 2 bit, and alone at 4 bit, would have chosen."""
    return evolution(
        asked,
        setting,
        [by_scores(singles(asked), setting), by_scores(leave_one_out(asked), setting)],
    )


def evolution(asked: Asked, setting: Setting, start: Sequence[Answers] = ()) -> Answers:
    """Evolve a population for every budget: the fittest are crossed and swapped, and the best survive.

    The budgets share nothing but ``start``: allocations to begin with, one for each budget, instead of random ones.
    """
    spent = asked.evaluations
    each = max(1, (setting.evaluations - spent) // len(setting.constraints))
    answers = []
    for index, room in enumerate(setting.rooms):
        generator = np.random.default_rng([setting.seed, index, 7])
        fresh = _randoms(generator, asked.n_players, room)
        first = [given[index] for given in start] or [next(fresh) for _ in range(min(_OFFSPRING, each))]
        population = _rated(asked, first)
        limit = asked.evaluations + each - len(population)
        stalled = 0
        while asked.evaluations < limit and stalled < 20:
            before = asked.evaluations
            parents = sorted(population, key=population.__getitem__)[:_POPULATION]
            wanted = {_child(generator, parents, room) for _ in range(min(_OFFSPRING, limit - asked.evaluations))}
            population |= _rated(asked, sorted(wanted))
            stalled = 0 if asked.evaluations > before else stalled + 1
        answers.append(min(population, key=population.__getitem__))
    return answers


def rounds(asked: Asked, setting: Setting, share_of_evaluations: float = 1.0, prior: Prior | None = None) -> Answers:
    """Play the design and the rounds of :mod:`impq_edge.spqe.playing`."""
    evaluations = round(share_of_evaluations * setting.evaluations)
    asked(design(asked.n_players, max(2, evaluations), SHARE, setting.seed)[0])
    search_rounds(asked, asked.seen, setting.rooms, evaluations, prior=prior)
    return [best_measured(asked.seen, room) for room in setting.rooms]


def _rated(asked: Asked, coalitions: Sequence[Coalition]) -> dict[Coalition, float]:
    return dict(zip(coalitions, asked(coalitions).tolist(), strict=True))


def _child(generator: np.random.Generator, parents: Sequence[Coalition], room: Room) -> Coalition:
    one, other = (np.array(parents[i]) == 2 for i in generator.integers(len(parents), size=2))
    lowest = np.where(generator.random(len(one)) < 0.5, one, other) if generator.random() < 0.5 else one
    for _ in range(min(generator.integers(1, 4, size=2))):
        lowest = lowest.copy()
        lowest[generator.integers(len(lowest))] ^= True
        lowest[generator.integers(len(lowest))] ^= True
    return _filled(generator, lowest.astype(np.float64), room)


def _randoms(generator: np.random.Generator, n_players: int, room: Room) -> Iterator[Coalition]:
    while True:
        yield _filled(generator, np.ones(n_players), room)


def _filled(generator: np.random.Generator, lowest: Array, room: Room) -> Coalition:
    """Demote at random until the budgets are kept, then promote at random whatever still fits."""
    _demote(generator, lowest, room)
    for player in generator.permutation(len(lowest)):
        before = lowest[player]
        lowest[player] = 0
        if not room.fits(lowest[None])[0]:
            lowest[player] = before
    return tuple(2 if low else 4 for low in lowest)


def _demote(generator: np.random.Generator, lowest: Array, room: Room) -> None:
    for player in generator.permutation(len(lowest)):
        if room.fits(lowest[None])[0]:
            return
        lowest[player] = 1


def _stratified(asked: Asked, evaluations: int, seed: int) -> list[tuple[int, ...]]:
    """Evaluate so many coalitions in complement pairs; return the draws."""
    n = asked.n_players
    most = draws_for("stratified", n, evaluations)  # far more than there are evaluations: the number of all pairs
    found = draws("stratified", n, min(max(evaluations // 2, 1), most), seed)
    asked([c for draw in found for c in coalitions_of("stratified", draw, n)])
    return found


def _minimised(linear: Array, quadratic: Array, constraint: Constraint) -> Coalition:
    """Solve min aᵀx + xᵀKx; where optimality cannot be proven in time, search from many starts instead."""
    losses = tuple((float(a), 0.0) for a in linear)
    matrix = tuple(map(tuple, quadratic.tolist())) if np.any(quadratic) else ()
    problem = Problem(losses, matrix, (constraint,))
    try:
        choice = solve(problem, relative_gap=1e-6, time_limit_s=_SOLVE_S).choice
    except AllocationError:
        return _searched(linear, quadratic, constraint)
    return tuple(4 if kind else 2 for kind in choice)


def _searched(linear: Array, quadratic: Array, constraint: Constraint) -> Coalition:
    generator, room = np.random.default_rng(0), Room.of([constraint])
    found: list[tuple[float, Coalition]] = []
    for _ in range(_SEARCH_STARTS):
        lowest = np.asarray(generator.random(len(linear)) < generator.random(), dtype=np.float64)
        _demote(generator, lowest, room)
        value = float(linear @ lowest + lowest @ quadratic @ lowest)
        while True:
            around = neighbours(lowest, room)
            values = around @ linear + np.einsum("mi,ij,mj->m", around, quadratic, around)
            row = int(np.argmin(values))
            if values[row] >= value - 1e-12:
                break
            lowest, value = around[row], float(values[row])
        found.append((value, tuple(2 if low else 4 for low in lowest)))
    return min(found)[1]
