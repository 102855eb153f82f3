"""The isolated metrics that the paper compares with: one score a player, from the unquantised model alone.

Each function makes of what was measured of one player (:mod:`impq_edge.spqe.isolated`) the harm of having it at 2 bit.
A harm is never negative, so that none looks like a gain; the scales of two metrics have nothing to do with each other.
The definitions are of layers. Here a player is the layer, and a player of several matrices is judged as a whole.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from impq_edge.errors import AllocationError
from impq_edge.impq.allocate import bits_at
from impq_edge.model.players import Player

Metric = Literal["llm-mq", "lim", "zd", "activation"]

METRICS: tuple[Metric, ...] = get_args(Metric)


def llm_mq(at_2: ArrayLike, at_4: ArrayLike) -> float:
    """Return max(0, Σ_m s_m2 − Σ_m s_m4) with s_mb = |g_mᵀ(W_m − Q_b(W_m))|, nats per token.

    LLM-MQ (Li et al. 2023, "LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment"): the first-order
    change of the loss, g being the gradient of the mean loss where nothing is quantised. Its layers are matrices, each
    with one inner product and one absolute value; its program chooses bits p to minimise Σ_m Σ_b p_mb s_mb within a
    budget. Over players at 2 or 4 bit that sum is a constant plus s_m2 − s_m4 for every matrix that is demoted. Errors
    of opposite signs cancel in an inner product, so that the difference can be negative; the program would then demote
    the player at no price, which zero says too.

    Parameters
    ----------
    at_2, at_4
        (M,), g_mᵀ(W_m − Q(W_m)) of the player's M matrices, of any sign, nats per token.
    """
    return float(np.maximum(np.abs(at_2).sum() - np.abs(at_4).sum(), 0.0))  # not max, which would hide NaN


def lim(cosine: float) -> float:
    """Return 1 − cos(in, out), from 0 to 2.

    Layer input modification (Dumitru et al. 2024, arXiv 2406.17415): the more a layer changes the residual stream, the
    more it matters. The paper's score is −cos; the constant keeps order and differences.

    Parameters
    ----------
    cosine
        Mean over tokens of the cosine between what enters and what leaves; rounding may put it beyond 1.
    """
    return float(np.maximum(1.0 - cosine, 0.0))


def zd(weights: NDArray[np.floating]) -> float:
    """Return 1 − |{w : (w − μ)/σ > 1}| / n, the share of the n weights that are not large; from 0 to 1.

    Z-score distribution (Dumitru et al. 2024, arXiv 2406.17415). The metric is the share of weights "much larger than
    average", with μ and σ of the layer's own weights and no absolute value, and the smaller it is, the more the layer
    matters: the abstract says "smaller is better". Hence its complement.

    Parameters
    ----------
    weights
        All of the player's, in any shape.
    """
    return 1.0 - float(np.count_nonzero(weights > weights.mean() + weights.std()) / weights.size)


def activation(squares: float) -> float:
    """Return ‖X‖ (Frobenius) of what enters a player, X being (tokens, channels).

    The activation baseline of IMPQ (arXiv 2509.15455).

    Parameters
    ----------
    squares
        Sum of the squares of X.
    """
    return float(np.sqrt(squares))


def baseline_bits(
    players: Sequence[Player], harm: NDArray[np.float64], target_average_bits: Fraction
) -> tuple[int, ...]:
    """Return the bits, 2 or 4, of the N players that harm least together within a limit on average bits.

    The program and the solver are IMPQ's (:func:`impq_edge.impq.allocate.bits_at`) without covariances.

    Parameters
    ----------
    harm
        (N,), of having a player at 2 bit instead of 4; its unit does not matter.

    Raises
    ------
    AllocationError
        When the harms are not N finite numbers from 0 on, or the limit is below 2.
    """
    if harm.shape != (len(players),) or not (np.isfinite(harm) & (harm >= 0)).all():
        raise AllocationError(
            f"The scores, of shape {harm.shape}, are not {len(players)} finite numbers from 0 on, one for every "
            "player; measure them anew."
        )
    return bits_at(players, harm, np.zeros((len(players), len(players))), target_average_bits)
