"""The record of one run of SPQE: every loss that was measured, and the estimate from them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.impq.allocation import Objective
from impq_edge.model.players import Player, PlayerKind, players_of
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT, Record
from impq_edge.spqe.estimate import Estimate, estimate
from impq_edge.spqe.journal import from_text, to_text
from impq_edge.spqe.playing import Rounds
from impq_edge.spqe.sampling import Coalition, Draw, Estimator, evaluation_order


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The losses of one coalition."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    coalition: str  # one digit per player: its bits
    losses: tuple[float, ...]  # v of every calibration window, nats per token


@dataclasses.dataclass(frozen=True)
class GameSettings:
    """Everything besides the model that the losses depend on."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    backend: dict[str, str | int | float | bool]  # name, library version, settings
    players: PlayerKind
    text_sha256: str
    tokens: int
    window_tokens: int
    device: str  # cpu or cuda
    dtype: str
    calibration_tokens: int = 0  # of the same text, that the backend's statistics come from; 0: it needs none
    # Records of the published objective do not name it: their identities are older than the other one.
    objective: Annotated[Objective, pydantic.Field(exclude_if="loss".__eq__)] = "loss"

    def identity(self) -> dict[str, Any]:
        """Return all of it, as it is told to a journal."""
        told: dict[str, Any] = pydantic.TypeAdapter(type(self)).dump_python(self)
        return told

    def calibration(self) -> dict[str, Any]:
        """Return what an encoding depends on besides the model: the encoder, the text, and where it was passed on."""
        return {key: value for key, value in self.identity().items() if key not in ("players", "tokens", "objective")}


@dataclasses.dataclass(frozen=True)
class Design:
    """Which coalitions are evaluated, and when enough of them have been."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    estimator: Estimator
    permutations: int  # M, or as many evaluations in other draws
    seed: int
    until_stable: str = ""  # what must have stopped changing: "order", average bits, or a request's identity
    # What was evaluated besides the draws; None: the paper's game, and draws alone, as all records before rounds.
    rounds: Annotated[Rounds | None, pydantic.Field(exclude_if=lambda rounds: rounds is None)] = None


MAX_LOSS = 1e6
"""Nats per token. A uniform guess among 2^20 tokens loses 14; squares of far larger numbers would overflow."""

StoppedBy = Literal["permutations", "stability", "time", "evaluations"]
"""Draws, or all that rounds may evaluate, were done; or what came first."""


@dataclasses.dataclass(frozen=True)
class SensitivityProfile(Record):
    """How a model's players suffer at 2 bit. Expensive to make, and reused for every device.

    φ, its errors and C are stored for readers; they follow from the evaluations and are checked against them.
    """

    SCHEMA: ClassVar[str] = "impq-edge.sensitivity/2"

    model: ModelSpec
    header_bytes: int  # of a GGUF of this model, before its tensor data
    settings: GameSettings
    design: Design
    stopped_by: StoppedBy
    bits_per_weight: tuple[float, float]  # of the blocks' matrices in the backend's storage, at 2 and 4 bit
    reference_losses: tuple[float, ...]  # −log p of every window, unquantised, nats per token; whatever the objective
    draws: tuple[Draw, ...]  # orders of the N players, or sets of them that are at 4 bit
    evaluations: tuple[Evaluation, ...]
    phi: tuple[float, ...]
    phi_stderr: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    @classmethod
    def from_losses(
        cls,
        *,
        model: ModelSpec,
        header_bytes: int,
        settings: GameSettings,
        design: Design,
        stopped_by: StoppedBy,
        bits_per_weight: tuple[float, float],
        reference_losses: NDArray[np.float64],
        draws: list[Draw],
        losses: Mapping[Coalition, NDArray[np.float64]],
        also: Iterable[Coalition] = (),
    ) -> Self:
        """Build the record from measured losses of shape (windows,) for each coalition the draws need.

        ``also`` names others whose losses are kept: what was measured for an earlier design.
        """
        n_players = len(players_of(model, settings.players))
        wanted = evaluation_order(design.estimator, draws, n_players)
        kept = dict.fromkeys([*wanted, *sorted(also)])
        means = {coalition: float(losses[coalition].mean()) for coalition in wanted}
        result = estimate(design.estimator, n_players, draws, means)
        return cls(
            model=model,
            header_bytes=header_bytes,
            settings=settings,
            design=design,
            stopped_by=stopped_by,
            bits_per_weight=bits_per_weight,
            reference_losses=tuple(reference_losses.tolist()),
            draws=tuple(tuple(int(player) for player in draw) for draw in draws),
            evaluations=tuple(Evaluation(to_text(c), tuple(losses[c].tolist())) for c in kept),
            phi=tuple(result.phi.tolist()),
            phi_stderr=tuple(result.phi_stderr.tolist()),
            covariance=tuple(tuple(row) for row in result.covariance.tolist()),
        )

    def __post_init__(self) -> None:
        n_players = self.n_players
        full = set(range(n_players))
        sizes = range(1, n_players) if self.design.estimator == "stratified" else (n_players,)
        for draw in self.draws:
            if len(set(draw)) != len(draw) or not set(draw) <= full or len(draw) not in sizes:
                raise SensitivityError(f"The profile's draws are not of {n_players} players; make it anew.")
        shapes = {len(self.phi), len(self.phi_stderr), len(self.covariance), *map(len, self.covariance)}
        if shapes != {n_players}:
            raise SensitivityError(f"The profile's estimates are not of {n_players} players; make it anew.")
        if any(len(e.coalition) != n_players or not set(e.coalition) <= {"2", "4"} for e in self.evaluations):
            raise SensitivityError(f"The profile's evaluations are not of {n_players} players; make it anew.")
        budgets = self.design.rounds.budgets if self.design.rounds else ()
        costs = [constraint.costs for budget in budgets for constraint in budget]
        if any(len(table) != n_players or {len(row) for row in table} != {2} for table in costs):
            raise SensitivityError(f"The profile's rounds were not played with {n_players} players; make it anew.")
        windows = {len(losses) for losses in (self.reference_losses, *(e.losses for e in self.evaluations))}
        if len(windows) > 1 or 0 in windows:
            raise SensitivityError("The profile's losses are not all of the same windows; make it anew.")
        largest = max(abs(loss) for e in self.evaluations for loss in e.losses) if self.evaluations else 0.0
        if largest > MAX_LOSS:
            raise SensitivityError(
                f"The profile has a loss of {largest:g} nats per token, beyond {MAX_LOSS:g}; make it anew."
            )

    @property
    def who(self) -> tuple[Player, ...]:
        """The N players."""
        return players_of(self.model, self.settings.players)

    @property
    def n_players(self) -> int:
        """N."""
        return len(self.who)

    @property
    def window_losses(self) -> dict[Coalition, NDArray[np.float64]]:
        """V of every evaluated coalition, (windows,), nats per token."""
        return {from_text(e.coalition): np.array(e.losses) for e in self.evaluations}

    @property
    def losses(self) -> dict[Coalition, float]:
        """Mean v of every evaluated coalition, nats per token."""
        return {from_text(e.coalition): float(np.mean(e.losses)) for e in self.evaluations}

    def estimate(self) -> Estimate:
        """Recompute φ, its errors and C from the stored losses, once.

        Raises
        ------
        SensitivityError
            When a coalition is missing, or what is stored does not follow from the losses.
        """
        return self._estimate

    @functools.cached_property
    def _estimate(self) -> Estimate:
        losses = self.losses
        draws = list(self.draws)
        missing = [c for c in evaluation_order(self.design.estimator, draws, self.n_players) if c not in losses]
        if missing:
            raise SensitivityError(f"The profile lacks {len(missing)} evaluations of its own draws; make it anew.")
        result = estimate(self.design.estimator, self.n_players, draws, losses)
        stored = {"φ": (result.phi, self.phi), "errors": (result.phi_stderr, self.phi_stderr)}
        for name, (found, claimed) in (stored | {"covariance": (result.covariance, self.covariance)}).items():
            if not np.allclose(found, claimed, rtol=1e-6, atol=1e-12):
                raise SensitivityError(
                    f"The profile's {name} does not follow from its own losses; it was edited: make it anew."
                )
        return result
