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
    generation_s: float  # per token, from an empty context
    later_s: float | None = None  # per token, after the prompt; None: not timed, as in large models
    prompt_s: float | None = None  # of the whole prompt


def fit_speeds(
    small: Sequence[Observation], large: Sequence[Observation], device: DeviceProfile, spread: float
) -> KernelSpeeds:
    """Fit what everything costs.

    Parameters
    ----------
    small
        Enough shapes of models to tell calls, operations, elements and attention apart, and every type in some; with
        prompts.
    large
        Models too large for caches, one of each type; none where the small ones already are. Their prompts count too.
    device
        Its settings they were made with.
    spread
        Of the times, for the record.

    What operations cost is taken from generation, where they are a larger part of the time.
    """
    timed = [pair for one in small for pair in _generation(one, device)]
    kinds = sorted({kind for work, _ in timed for kind in work.weights})
    # Of one token, elements take too little time to be told from operations, and would only carry their noise.
    columns = [[work.operations, *_row(dataclasses.replace(work, elements=0), kinds)] for work, _ in timed]
    times = np.array([seconds for _, seconds in timed])
    operation_s, *rest = _fit(np.array(columns, float), times, times)
    generation = _costs(rest, kinds)
    nothing = TokenCosts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(kinds, 0.0))
    found = KernelSpeeds(operation_s, generation, nothing, 0.0, 0.0, spread)
    ratios = [work.seconds(found, generation) / seconds for work, seconds in timed]

    # Large models' too: what a batch costs besides weights would else hide what those cost where they are few.
    prompts = [
        (one.prompt_s, prompt_work(one.spec, one.types, device, one.prompt_tokens))
        for one in (*small, *large)
        if one.prompt_s is not None
    ]
    measured = np.array([seconds for seconds, _ in prompts], float)
    known = np.array([prompt_seconds(found, *both) for _, both in prompts])
    columns = [_row(together, kinds) for _, (together, _) in prompts]
    found = dataclasses.replace(found, prompt=_costs(_fit(np.array(columns, float), measured - known, measured), kinds))
    predicted = np.array([prompt_seconds(found, *both) for _, both in prompts])

    timed = [pair for one in large for pair in _generation(one, device)]
    if timed:
        columns = [[work.weights.get(kind, 0) for kind in kinds] for work, _ in timed]
        times = np.array([seconds for _, seconds in timed])
        bare = dataclasses.replace(generation, weight_s=nothing.weight_s)
        known = np.array([work.seconds(found, bare) for work, _ in timed])
        values = dict(zip(kinds, _fit(np.array(columns, float), times - known, times), strict=True))
        of_large = dataclasses.replace(generation, weight_s=values)
        ratios += [work.seconds(found, of_large) / seconds for work, seconds in timed]
        found = dataclasses.replace(found, generation=dataclasses.replace(generation, large_weight_s=values))
    prompt_error = _error((predicted / measured).tolist())
    return dataclasses.replace(found, generation_error=_error(ratios), prompt_error=prompt_error)


def _generation(one: Observation, device: DeviceProfile) -> list[tuple[Work, float]]:
    timed = ((0, one.generation_s), (one.prompt_tokens, one.later_s))
    return [
        (generation_work(one.spec, one.types, device, one.generated_tokens, depth), seconds)
        for depth, seconds in timed
        if seconds is not None
    ]


def _row(work: Work, kinds: Sequence[TensorType]) -> list[float]:
    each = (work.weights.get(kind, 0) for kind in kinds)
    return [work.calls, work.elements, work.attended, work.scores, work.capped, work.logits, *each]


def _costs(values: Sequence[float], kinds: Sequence[TensorType]) -> TokenCosts:
    call_s, element_s, attention_s, score_s, softcap_s, logit_s, *each = values
    return TokenCosts(call_s, element_s, attention_s, score_s, softcap_s, logit_s, dict(zip(kinds, each, strict=True)))


def _fit(columns: NDArray[np.float64], target: NDArray[np.float64], scale: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in nonnegative_least_squares(columns / scale[:, None], target / scale)]


def _error(ratios: Sequence[float]) -> float:
    return math.sqrt(sum((ratio - 1) ** 2 for ratio in ratios) / len(ratios))
