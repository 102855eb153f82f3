"""Cells of the study without a model: a seeded game with main effects and pairs, and methods of known strength."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from impq_edge.study.cells import Answer, Cell, Exam, Unquantised

BITS = tuple(2.25 + step / 4 for step in range(7))
TEXTS = ("books", "wikitext")
WINDOWS = 12

EVALUATIONS = {
    "llm-mq": 1, "lim": 1, "zd": 0, "activation": 1, "singles": 12, "leave-one-out": 12, "phi": 1000,
    "phi-variance": 1000, "impq-0": 1000, "impq-0.5": 1000, "impq-1": 1000, "impq-shuffled": 1000, "pairwise": 700,
    "clado": 60, "random-best": 300, "evolution": 300, "ours": 300, **{f"random-mean-{k}": 1 for k in range(5)},
}  # fmt: skip
_NOISE = {
    "llm-mq": 1.0, "lim": 1.5, "zd": 2.0, "activation": 1.8, "singles": 0.5, "leave-one-out": 0.5, "phi": 0.25,
    "phi-variance": 0.3, "impq-0": 0.3, "impq-0.5": 0.3, "impq-1": 0.3, "impq-shuffled": 0.35, "pairwise": 0.15,
    "clado": 0.4, "random-best": 0.8, "evolution": 0.1, "ours": 0.0, **{f"random-mean-{k}": 9.0 for k in range(5)},
}  # fmt: skip
"""How far a method's score of an allocation is off, as a share of the spread of losses; ours knows the loss."""


def exam_of(loss: float, seed: int = 0, windows: int = WINDOWS) -> Exam:
    """Windows of one text share their difficulty; their mean is the loss."""
    losses = loss + np.random.default_rng(seed).normal(0, 0.3, windows) * (1 + 0.01 * np.arange(windows))
    losses += loss - losses.mean()
    stderr = float(losses.std(ddof=1) / np.sqrt(windows))
    return Exam(loss, stderr, max(loss - 3.0, 0.01), stderr / 3, tuple(map(float, losses)))


def cell_of(
    losses: Mapping[str, Mapping[float, float]],
    *,
    evaluations: Mapping[str, int] = EVALUATIONS,
    texts: Mapping[str, Callable[[float], float]] | None = None,
    scores: Mapping[str, tuple[float, ...]] | None = None,
    **which: object,
) -> Cell:
    """A cell whose methods have these losses at these bits: equal losses are equal coalitions.

    ``texts`` says what a held-out loss is, given the calibration loss.
    """
    texts = texts or {"books": lambda loss: loss}
    values = sorted({loss for found in losses.values() for loss in found.values()})
    n_players = 12
    names = ["".join(bits) for bits in itertools.islice(itertools.product("24", repeat=n_players), 1, 1 + len(values))]
    name_of = dict(zip(values, names, strict=True))
    exams = {names[i]: {t: exam_of(f(v)) for t, f in texts.items()} for i, v in enumerate(values)}
    exams |= {"2" * n_players: {t: exam_of(9.0) for t in texts}, "4" * n_players: {t: exam_of(3.1) for t in texts}}
    answers = tuple(
        Answer(method, bits, name_of[loss], evaluations.get(method, 0), loss, max(loss - 3.0, 0.0))
        for method, found in losses.items()
        for bits, loss in found.items()
    )
    return Cell(
        **{"model": "toy", "backend": "hqq", "players": "blocks", "text": "books", "seed": 0, **which},  # type: ignore[arg-type]
        backend_settings={"group_size": 64}, tokens=8192, window_tokens=512, device="cpu", versions={"numpy": "2"},
        player_names=tuple(f"blk.{i}" for i in range(n_players)), player_weights=(100,) * n_players,
        scores=dict(scores or {}), answers=answers, exams=exams, unquantised={t: Unquantised(3.0) for t in texts},
        seconds=1.0,
    )  # fmt: skip


def played(
    model: str = "toy", backend: str = "hqq", players: str = "blocks", text: str = "books", seed: int = 0,
    *, n_players: int = 10, hardness: float = 3.0, windows: int = WINDOWS, noise: Mapping[str, float] = _NOISE,
) -> Cell:  # fmt: skip
    """A cell of a simulated game: every method takes the allocation that its own noisy score holds for the best."""
    board = np.random.default_rng([n_players, *map(ord, model + players)])
    random = np.random.default_rng([seed, *map(ord, model + backend + players + text)])
    effects = board.exponential(1.0, n_players) * np.exp(random.normal(0, 0.15, n_players))
    pairs = np.triu(board.normal(0, 0.15, (n_players, n_players)), 1)
    at_two = np.array([*itertools.product((0.0, 1.0), repeat=n_players)])
    harm = at_two @ effects + ((at_two @ pairs) * at_two).sum(axis=1)
    harm = hardness * np.maximum(harm - harm.min(), 0) / (harm.max() - harm.min())
    bits = 4 - 2 * at_two.mean(axis=1)
    names = ["".join("2" if two else "4" for two in row) for row in at_two]
    singles = harm[[1 << (n_players - 1 - i) for i in range(n_players)]]

    answers = []
    for method, off in noise.items():
        guess = harm + random.normal(0, off * harm.std(), len(harm)) if off else harm
        for average in BITS:
            chosen = int(np.argmin(np.where(bits <= average, guess, np.inf)))
            answers.append(
                Answer(method, average, names[chosen], EVALUATIONS.get(method, 0), 3.0 + harm[chosen], harm[chosen])
            )
    wanted = {answer.coalition for answer in answers} | {"2" * n_players, "4" * n_players}
    exams = {
        name: {t: exam_of(3.0 + (1 + 0.1 * k) * harm[at], k, windows) for k, t in enumerate(TEXTS)}
        for at, name in enumerate(names)
        if name in wanted
    }
    return Cell(
        model=model, backend=backend, backend_settings={"group_size": 64}, players=players, text=text, seed=seed,
        tokens=8192, window_tokens=512, device="cpu", versions={"numpy": "2"},
        player_names=tuple(f"blk.{i}" for i in range(n_players)), player_weights=(100,) * n_players,
        scores={name: _scored(singles, off, random) for name, off in
                (("llm-mq", 1.0), ("lim", 1.5), ("zd", 2.0), ("activation", 2.0), ("singles", 0.05),
                 ("leave-one-out", 0.1), ("phi", 0.1))},
        answers=tuple(answers), exams=exams, unquantised={t: Unquantised(2.9) for t in TEXTS}, seconds=10.0,
    )  # fmt: skip


def _scored(singles: NDArray[np.float64], off: float, random: np.random.Generator) -> tuple[float, ...]:
    return tuple(map(float, singles + random.normal(0, off * singles.std(), len(singles))))
