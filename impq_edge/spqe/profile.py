"""The record of one run of SPQE: every loss that was measured, and the published estimate from them."""

import dataclasses
from typing import ClassVar, Self

import numpy as np
import pydantic
from numpy.typing import NDArray

from impq_edge.errors import SensitivityError
from impq_edge.model.spec import ModelSpec
from impq_edge.records import STRICT, Record
from impq_edge.spqe.estimate import Estimate, estimate, marginals
from impq_edge.spqe.journal import from_text
from impq_edge.spqe.sampling import Coalition, evaluation_order


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The losses of one coalition."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    coalition: str  # one digit per block: its bits
    losses: tuple[float, ...]  # per calibration window, nats per token


@dataclasses.dataclass(frozen=True)
class GameSettings:
    """Everything besides the model and the text that the losses depend on."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    backend: dict[str, str | int | float | bool]  # name, library version, settings
    text_sha256: str
    tokens: int
    window_tokens: int
    permutations: int
    seed: int
    device: str  # cpu or cuda
    dtype: str


@dataclasses.dataclass(frozen=True)
class SensitivityProfile(Record):
    """How a model's blocks suffer at 2 bit. Expensive to make, and reused for every device.

    φ and C are stored for readers; they follow from the evaluations and are checked against them.
    """

    SCHEMA: ClassVar[str] = "impq-edge.sensitivity/1"

    model: ModelSpec
    header_bytes: int  # of a GGUF of this model, before its tensor data
    settings: GameSettings
    bits_per_weight: tuple[float, float]  # of the blocks' matrices in the backend's storage, at 2 and 4 bit
    reference_losses: tuple[float, ...]  # per window, unquantised, nats per token
    orders: tuple[tuple[int, ...], ...]  # M permutations of the L blocks
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
        bits_per_weight: tuple[float, float],
        reference_losses: NDArray[np.float64],
        orders: NDArray[np.int64],
        losses: dict[Coalition, NDArray[np.float64]],
    ) -> Self:
        """Build the record from measured losses of shape (windows,) for each coalition of ``orders``."""
        kept = [Evaluation("".join(map(str, c)), tuple(losses[c].tolist())) for c in evaluation_order(orders)]
        result = estimate(marginals(orders, {c: float(values.mean()) for c, values in losses.items()}))
        return cls(
            model=model,
            header_bytes=header_bytes,
            settings=settings,
            bits_per_weight=bits_per_weight,
            reference_losses=tuple(reference_losses.tolist()),
            orders=tuple(tuple(order) for order in orders.tolist()),
            evaluations=tuple(kept),
            phi=tuple(result.phi.tolist()),
            phi_stderr=tuple(result.phi_stderr.tolist()),
            covariance=tuple(tuple(row) for row in result.covariance.tolist()),
        )

    def __post_init__(self) -> None:
        n_blocks = self.model.n_blocks
        if any(sorted(order) != list(range(n_blocks)) for order in self.orders) or not self.orders:
            raise SensitivityError(f"The profile's orders are not permutations of {n_blocks} blocks; make it anew.")
        shapes = {len(self.phi), len(self.phi_stderr), len(self.covariance), *map(len, self.covariance)}
        if shapes != {n_blocks}:
            raise SensitivityError(f"The profile's estimates are not of {n_blocks} blocks; make it anew.")

    @property
    def losses(self) -> dict[Coalition, float]:
        """Mean loss of every evaluated coalition, nats per token."""
        return {from_text(e.coalition): float(np.mean(e.losses)) for e in self.evaluations}

    def estimate(self) -> Estimate:
        """Recompute φ and C from the stored losses.

        Raises
        ------
        SensitivityError
            When a coalition of the walks is missing, or the stored φ does not follow from the losses.
        """
        losses = self.losses
        missing = [c for c in evaluation_order(np.array(self.orders)) if c not in losses]
        if missing:
            raise SensitivityError(f"The profile lacks {len(missing)} evaluations of its own walks; make it anew.")
        result = estimate(marginals(np.array(self.orders), losses))
        if not np.allclose(result.phi, self.phi, rtol=1e-9, atol=1e-12):
            raise SensitivityError("The profile's φ does not follow from its own losses; it was edited: make it anew.")
        return result
