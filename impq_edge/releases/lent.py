"""What an allocation costs that was chosen on what one backend measured and ships as K-quants."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from impq_edge.backends import Backend, load_recorded
from impq_edge.backends.kquant import KQuant
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.impq.allocate import bits_within
from impq_edge.impq.allocation import Allocation
from impq_edge.records import Record
from impq_edge.spqe.journal import to_text
from impq_edge.spqe.playing import as_coalition
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.spqe.run import COMPUTE_DTYPES
from impq_edge.spqe.sampling import alone, uniform
from impq_edge.spqe.table import Job, Progress, Table, set_table
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


def measure_lent(
    directory: Path,
    found: SensitivityProfile,
    allocation: Allocation,
    encoding: EncodeOptions,
    path: Path,
    progress: Progress,
) -> BackendLosses:
    """Compare the profile's backend with the K-quants that ship, or load from ``path`` what that gave before.

    Takes N + 4 evaluations on K-quants and 4 on the backend.
    """
    if path.exists():
        kept = BackendLosses.load(path)
        if (kept.allocation_sha256, kept.profile_sha256) == (allocation.identity(), found.identity()):
            return kept
    compute = require_compute(encoding.compute)
    settings = dataclasses.replace(found.settings, device=compute, dtype=COMPUTE_DTYPES[compute])
    longest = max(found.settings.tokens, encoding.calibration_tokens)
    text = calibration_windows(directory, encoding.calibration, longest, found.settings.window_tokens)
    windows, seen = text.first(found.settings.tokens), text.first(encoding.calibration_tokens)

    def table(backend: Backend) -> Table:
        return set_table(Job(directory, found.model, backend, windows, settings, seen), progress)

    mix = as_coalition(allocation.player_bits)
    n_players = len(mix)
    extremes = [mix, uniform(4, n_players), uniform(2, n_players)]
    shipped = table(KQuant(encoding.encoder))
    on_kquants = [shipped.losses(coalition) for coalition in extremes]
    base = on_kquants[1].mean()
    singles = np.array([shipped.losses(coalition).mean() - base for coalition in alone(2, n_players)])
    own = as_coalition(bits_within(allocation.problem.constraints, singles, np.zeros((n_players, n_players))))
    on_kquants.append(shipped.losses(own))
    del shipped  # two models at once are not held
    other = table(load_recorded(found.settings.backend))
    differences = on_kquants[0] - on_kquants[-1]
    count = len(differences)
    made = BackendLosses(
        allocation.identity(),
        found.identity(),
        tuple(map(to_text, [*extremes, own])),
        tuple(float(other.losses(coalition).mean()) for coalition in [*extremes, own]),
        tuple(float(losses.mean()) for losses in on_kquants),
        float(differences.mean()),
        float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
        spearman(found.phi, singles.tolist()),
    )
    made.save(path)
    return made
