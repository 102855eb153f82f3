"""The record of a ladder: how far the model moves when one player alone is stored at each of several types."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.ggml.types import LADDER
from impq_edge.impq.allocation import are_types
from impq_edge.model.players import Player, players_of
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT, Record
from impq_edge.spqe.profile import MAX_LOSS, GameSettings


@dataclasses.dataclass(frozen=True)
class Rung:
    """One player at one type, everything else unquantised."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    player: str
    bits: int
    divergences: tuple[
        float, ...
    ]  # per calibration window: mean KL divergence to the unquantised model, nats per token


@dataclasses.dataclass(frozen=True)
class LadderProfile(Record):
    """What every player costs at every type; embedding and head are players too.

    The divergence of the unquantised model p from the quantised q, E Σ p log (p / q), is zero where nothing changes and
    grows with the square of a small error, so that it tells 5 bit from 6 on few tokens, where the loss of the text
    itself tells nothing, and so that independent errors add up.
    """

    SCHEMA: ClassVar[str] = "impq-edge.ladder/1"

    model: ModelSpec
    header_bytes: int  # of a GGUF of this model, before its tensor data
    settings: GameSettings
    types: tuple[int, ...]  # ascending, of LADDER
    reference_losses: tuple[float, ...]  # per window, unquantised, nats per token
    rungs: tuple[Rung, ...]  # player by player, each at every type
    covariance: tuple[tuple[float, ...], ...] | None = None  # C of the players in the blocks, where a game was played
    game_sha256: str | None = None  # of the sensitivity profile that C comes from

    def __post_init__(self) -> None:
        check_types(self.types)
        wanted = [(player.name, bits) for player in self.who for bits in self.types]
        if [(rung.player, rung.bits) for rung in self.rungs] != wanted:
            raise SensitivityError(
                f"The ladder is not of {len(self.who)} players at {len(self.types)} types; make it anew."
            )
        if {len(rung.divergences) for rung in self.rungs} != {len(self.reference_losses)}:
            raise SensitivityError("The ladder's divergences are not all of the same windows; make it anew.")
        if not all((np.abs(rung.divergences) <= MAX_LOSS).all() for rung in self.rungs):
            raise SensitivityError(
                f"The ladder has divergences that are not finite or beyond {MAX_LOSS:g}; make it anew."
            )
        inside = sum(player.block is not None for player in self.who)
        if self.covariance is not None and {len(self.covariance), *map(len, self.covariance)} != {inside}:
            raise SensitivityError(f"The ladder's covariance is not of {inside} players; make it anew.")

    @property
    def who(self) -> tuple[Player, ...]:
        """The players: those of the blocks, then embedding and head."""
        return players_of(self.model, self.settings.players, outer=True)

    def divergences(self, types: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Return what every player costs at every type, or at some of them, (players, types), nats per token.

        Raises
        ------
        SensitivityError
            When a type was not measured.
        """
        chosen = self.types if types is None else tuple(types)
        missing = [bits for bits in chosen if bits not in self.types]
        if missing:
            raise SensitivityError(
                f"The ladder was measured at {', '.join(map(str, self.types))} bit, not at {missing[0]}; "
                "give --types among them, or measure anew."
            )
        table = np.array([np.mean(rung.divergences) for rung in self.rungs]).reshape(-1, len(self.types))
        return table[:, [self.types.index(bits) for bits in chosen]]


def check_types(types: Sequence[int]) -> None:
    """Refuse what is no ladder.

    Raises
    ------
    SensitivityError
        When a width is unknown, comes twice or out of order, or there are too few.
    """
    if not are_types(types):
        raise SensitivityError(
            f"--types {','.join(map(str, types))} is no ladder; give two or more of {','.join(map(str, LADDER))}, the "
            "smallest first."
        )
