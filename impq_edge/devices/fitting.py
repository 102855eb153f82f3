"""Costs from measured times: least squares of relative errors, no cost below 0."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from impq_edge.devices.latency import Work, generation_work, prompt_seconds, prompt_work
from impq_edge.devices.nonnegative import nonnegative_least_squares
from impq_edge.devices.profile import DeviceProfile
from impq_edge.devices.speeds import KernelSpeeds, TokenCosts
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Observation:
    """A model and how long it took."""

    spec: ModelSpec
    types: TensorTypes
    prompt_tokens: int
    generated_tokens: int
    prompt_s: float  # of the whole prompt
    generation_s: float  # per token, from an empty context
    later_s: float  # per token, after the prompt


def fit_speeds(observations: Sequence[Observation], device: DeviceProfile, spread: float) -> KernelSpeeds:
    """Fit what everything costs.

    Parameters
    ----------
    observations
        Enough shapes of models to tell calls, operations, elements and attention apart, and every type in some.
    device
        Its settings they were made with.
    spread
        Of the times, for the record.

    The overheads of a batch are taken from generation, where they are a larger part of the time.
    """
    works = [pair for one in observations for pair in _generation(one, device)]
    kinds = sorted({kind for work, _ in works for kind in work.weights})
    columns = [[work.calls, work.operations, work.elements, work.attended, *_row(work, kinds)] for work, _ in works]
    times = np.array([seconds for _, seconds in works])
    call_s, operation_s, *rest = _fit(np.array(columns, float), times, times)
    generation = _costs(rest, kinds)
    nothing = TokenCosts(0.0, 0.0, dict.fromkeys(kinds, 0.0))
    overheads = KernelSpeeds(call_s, operation_s, generation, nothing, 0.0, 0.0, spread)

    prompts = [prompt_work(one.spec, one.types, device, one.prompt_tokens) for one in observations]
    known = np.array([prompt_seconds(overheads, *both) for both in prompts])
    columns = [[together.elements, together.attended, *_row(together, kinds)] for together, _ in prompts]
    measured = np.array([one.prompt_s for one in observations])
    prompt = _costs(_fit(np.array(columns, float), measured - known, measured), kinds)
    found = dataclasses.replace(overheads, prompt=prompt)
    return dataclasses.replace(
        found,
        generation_error=_error([work.seconds(found, generation) / seconds for work, seconds in works]),
        prompt_error=_error(
            [prompt_seconds(found, *both) / seconds for both, seconds in zip(prompts, measured, strict=True)]
        ),
    )


def _generation(one: Observation, device: DeviceProfile) -> list[tuple[Work, float]]:
    return [
        (generation_work(one.spec, one.types, device, one.generated_tokens, depth), seconds)
        for depth, seconds in ((0, one.generation_s), (one.prompt_tokens, one.later_s))
    ]


def _row(work: Work, kinds: Sequence[TensorType]) -> list[float]:
    return [work.weights.get(kind, 0) for kind in kinds]


def _costs(values: Sequence[float], kinds: Sequence[TensorType]) -> TokenCosts:
    return TokenCosts(values[0], values[1], dict(zip(kinds, values[2:], strict=True)))


def _fit(columns: NDArray[np.float64], target: NDArray[np.float64], scale: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in nonnegative_least_squares(columns / scale[:, None], target / scale)]


def _error(ratios: Sequence[float]) -> float:
    return math.sqrt(sum((ratio - 1) ** 2 for ratio in ratios) / len(ratios))
