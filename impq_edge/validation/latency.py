"""Prompt and generation speed by llama-bench's conventions (llama.cpp, tools/llama-bench/llama-bench.cpp).

Random tokens from an empty context, one warm-up, then repetitions; tokens/s as mean and sample standard
deviation over the repetitions.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from impq_edge.validation.llama import Engine, Tokens
from impq_edge.validation.results import Speed, Times

WARM_UP_TOKENS = 8  # enough to fault in the weights and start the threads


def measure_speed(
    engine: Engine,
    prompt_tokens: int,
    generated_tokens: int,
    repetitions: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Speed, Speed]:
    """Time a prompt in one go and a generation token by token.

    Returns
    -------
    The speed of the prompt and of the generation.
    """
    times = measure_times(engine, prompt_tokens, generated_tokens, repetitions, progress=progress)
    return _speed(prompt_tokens, times.prompt_s), _speed(generated_tokens, times.generation_s)


def measure_times(
    engine: Engine,
    prompt_tokens: int,
    generated_tokens: int,
    repetitions: int,
    *,
    after_prompt: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Times:
    """Time prompts, if they have tokens, and generations from an empty context and, if asked to, after the prompt."""
    ids = np.random.default_rng(0).integers(
        engine.vocabulary, size=max(prompt_tokens, generated_tokens), dtype=np.int32
    )
    generated = ids[:generated_tokens]
    engine.clear()
    if prompt_tokens:
        engine.decode(ids[:prompt_tokens])
        engine.clear()
    _one_by_one(engine, ids[: min(WARM_UP_TOKENS, generated_tokens)])
    prompts_s, generations_s, later_s = [], [], []
    for repetition in range(repetitions):
        engine.clear()  # outside the clock: it also zeroes the cache
        if prompt_tokens:
            prompts_s.append(_seconds(lambda: engine.decode(ids[:prompt_tokens])))
        if after_prompt:
            later_s.append(_seconds(lambda: _one_by_one(engine, generated)))
        engine.clear()
        generations_s.append(_seconds(lambda: _one_by_one(engine, generated)))
        progress(repetition + 1, repetitions)
    return Times(tuple(prompts_s), tuple(generations_s), tuple(later_s))


def _one_by_one(engine: Engine, ids: Tokens) -> None:
    for index in range(len(ids)):
        engine.decode(ids[index : index + 1])  # waits for each, as sampling would


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _speed(tokens: int, seconds: tuple[float, ...]) -> Speed:
    rates = [tokens / duration for duration in seconds]
    return Speed(tokens, statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0)
