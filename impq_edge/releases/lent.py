"""What an allocation costs that was chosen on what one backend measured and ships as K-quants."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from impq_edge.backends import Backend, load_recorded
from impq_edge.backends.kquant import KQuant
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.impq.allocation import Allocation
from impq_edge.records import Record
from impq_edge.releases.agreement import is_what_ships
from impq_edge.releases.telling import Say
from impq_edge.spqe.journal import to_text
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.playing import additive_answer, as_coalition
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.run import COMPUTE_DTYPES
from impq_edge.spqe.sampling import Coalition, alone, uniform
from impq_edge.spqe.table import Job, Progress, set_table
from impq_edge.stages import calibration_windows, require_compute
from impq_edge.study.transfer import spearman

CLEAR_ERRORS = 2.0
"""A cost is said to matter from so many standard errors on, of the differences between windows."""


@dataclasses.dataclass(frozen=True)
class BackendLosses(Record):
    """v of one allocation, loss or divergence, on the profile's backend and on the K-quants that ship.

    Beside it stands what K-quants would have chosen by themselves, from N measurements: every player alone at 2 bit,
    and the program without interactions. It is no better method, only the right backend; where even it does better,
    the profile's backend has ranked the players wrongly for this file.
    """

    SCHEMA: ClassVar[str] = "impq-edge.backend-losses/2"

    allocation_sha256: str
    profile_sha256: str
    coalitions: tuple[str, ...]  # the mix, all at 4 bit, all at 2 bit, K-quants' own choice
    backend: tuple[float, ...]  # nats per token
    kquant: tuple[float, ...]  # nats per token
    lost: float  # nats per token that the mix loses to K-quants' own choice, on K-quants
    lost_stderr: float  # of the differences between windows
    rank_correlation: float | None  # of φ with players alone at 2 bit on K-quants; None where either has no order

    @property
    def matters(self) -> bool:
        """Whether the mix is clearly worse than K-quants' own choice."""
        return self.lost > CLEAR_ERRORS * self.lost_stderr

    def warning(self, backend: str) -> str:
        """Return the sentence for who should know."""
        return (
            f"Allocated by what {backend} measured, the file loses {self.lost:.4f} ± {self.lost_stderr:.4f} nats/token "
            "to what K-quants themselves choose from one measurement a player: play the game with --backend kquant."
        )


def backend_name(profile: SensitivityProfile | LadderProfile) -> str:
    """Return the name of a profile's backend, with its encoder where it has several."""
    recorded = profile.settings.backend
    return " ".join(str(recorded[key]) for key in ("name", "encode") if key in recorded)


def lent_losses(
    directory: Path,
    found: SensitivityProfile | LadderProfile,
    allocations: dict[Path, Allocation],
    encoding: EncodeOptions,
    say: Say,
    progress: Progress,
) -> tuple[BackendLosses, ...]:
    """Compare the profile's backend with the K-quants that ship, and warn where its allocations are clearly worse.

    Parameters
    ----------
    allocations
        Where the record of each is, or is to be, and the allocation.

    Returns
    -------
    tuple of BackendLosses
        One an allocation; none where sensitivity was measured with what ships.
    """
    if isinstance(found, LadderProfile) or is_what_ships(found, encoding):
        return ()
    made = measure_lent(directory, found, allocations, encoding, progress)
    for losses, allocation in zip(made, allocations.values(), strict=True):
        if losses.matters:
            whose = f"For {allocation.device} at {allocation.context_tokens:,} tokens: " if len(made) > 1 else ""
            say(whose + losses.warning(backend_name(found)))
    return made


def measure_lent(
    directory: Path,
    found: SensitivityProfile,
    allocations: dict[Path, Allocation],
    encoding: EncodeOptions,
    progress: Progress,
) -> tuple[BackendLosses, ...]:
    """Make the record of every allocation that has none at its path.

    Takes N + 2 evaluations on K-quants and 2 on the backend, and for every allocation at most two more on each.
    """
    missing = {path: allocation for path, allocation in allocations.items() if not _is_there(path, found, allocation)}
    if missing:
        measured = _measured(directory, found, list(missing.values()), encoding, progress)
        for path, losses in zip(missing, measured, strict=True):
            losses.save(path)
    return tuple(BackendLosses.load(path) for path in allocations)


def _is_there(path: Path, found: SensitivityProfile, allocation: Allocation) -> bool:
    if not path.exists():
        return False
    kept = BackendLosses.load(path)
    return (kept.allocation_sha256, kept.profile_sha256) == (allocation.identity(), found.identity())


def _measured(
    directory: Path,
    found: SensitivityProfile,
    allocations: list[Allocation],
    encoding: EncodeOptions,
    progress: Progress,
) -> list[BackendLosses]:
    compute = require_compute(encoding.compute)
    settings = dataclasses.replace(found.settings, device=compute, dtype=COMPUTE_DTYPES[compute])
    longest = max(found.settings.tokens, encoding.calibration_tokens)
    text = calibration_windows(directory, encoding.calibration, longest, found.settings.window_tokens)
    windows, seen = text.first(found.settings.tokens), text.first(encoding.calibration_tokens)

    def losses_on(backend: Backend) -> Callable[[Coalition], NDArray[np.float64]]:
        table = set_table(Job(directory, found.model, backend, windows, settings, seen), progress)
        return functools.cache(table.losses)

    n_players = len(allocations[0].player_bits)
    all_4, all_2 = uniform(4, n_players), uniform(2, n_players)
    on_kquants = losses_on(KQuant(encoding.encoder))
    base = on_kquants(all_4).mean()
    singles = np.array([on_kquants(coalition).mean() - base for coalition in alone(2, n_players)])
    compared, shipped = [], []
    for allocation in allocations:
        own = additive_answer(singles, allocation.problem.constraints)
        compared.append((as_coalition(allocation.player_bits), all_4, all_2, own))
        shipped.append([on_kquants(coalition) for coalition in compared[-1]])
    del on_kquants  # two models at once are not held
    on_backend = losses_on(load_recorded(found.settings.backend))
    order = spearman(found.phi, singles.tolist())
    made = []
    for allocation, coalitions, theirs in zip(allocations, compared, shipped, strict=True):
        differences = theirs[0] - theirs[-1]
        count = len(differences)
        made.append(
            BackendLosses(
                allocation.identity(),
                found.identity(),
                tuple(map(to_text, coalitions)),
                tuple(float(on_backend(coalition).mean()) for coalition in coalitions),
                tuple(float(losses.mean()) for losses in theirs),
                float(differences.mean()),
                float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
                order,
            )
        )
    return made
