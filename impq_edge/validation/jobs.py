"""What the child process does: one function per kind of job, plain JSON values in and out."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from impq_edge.validation import llama
from impq_edge.validation.chat import try_chat
from impq_edge.validation.divergence import measure_divergence
from impq_edge.validation.latency import measure_speed, measure_times
from impq_edge.validation.llama import Engine
from impq_edge.validation.memory import anonymous_bytes, fill_context, peak_rss_bytes
from impq_edge.validation.perplexity import measure_perplexity
from impq_edge.validation.results import Build, Run
from impq_edge.validation.settings import RunSettings

Progress = Callable[[str, int, int], None]

OPENING = "Once upon a time"
LONGEST_PROMPT_TOKENS = 512  # pp512, what speeds are compared by


def score(progress: Progress, *, file: str, settings: dict[str, Any], text: str, windows: int) -> dict[str, Any]:
    """Perplexity of a file on a text."""
    with Engine(Path(file), RunSettings(**settings)) as engine:
        result = measure_perplexity(engine, text, windows, lambda done, total: progress("perplexity", done, total))
    return dataclasses.asdict(result)


def compare(
    progress: Progress, *, file: str, reference: str, settings: dict[str, Any], text: str, windows: int
) -> dict[str, Any]:
    """Perplexity of a file on a text, and its divergence from a reference: both models are loaded side by side."""
    how = RunSettings(**settings)
    with Engine(Path(reference), how) as other, Engine(Path(file), how) as engine:
        score, divergence = measure_divergence(
            engine, other, text, windows, lambda done, total: progress("divergence", done, total)
        )
    return {
        "score": dataclasses.asdict(score),
        "divergence": dataclasses.asdict(divergence) if divergence else None,
    }


def run(
    progress: Progress,
    *,
    file: str,
    settings: dict[str, Any],
    generated_tokens: int,
    repetitions: int,
    chat_tokens: int,
    fill_s: float,
) -> dict[str, Any]:
    """Run a file as the device would: speed, a continuation, a chat, and the memory all that took."""
    process_bytes, start = peak_rss_bytes(), time.perf_counter()
    with Engine(Path(file), RunSettings(**settings)) as engine:
        load_s = time.perf_counter() - start
        context = engine.settings.context_tokens
        prompt, generation = measure_speed(
            engine,
            min(LONGEST_PROMPT_TOKENS, context),
            min(generated_tokens, context),
            repetitions,
            lambda done, total: progress("speed", done, total),
        )
        continuation = _continue(engine, min(generated_tokens, context // 2))
        chat = try_chat(engine, min(chat_tokens, context // 2))
        filled = fill_context(engine, fill_s, lambda done, total: progress("context", done, total))
        result = Run(
            load_s=load_s,
            prompt=prompt,
            generation=generation,
            continuation=continuation,
            chat=chat,
            filled_tokens=filled,
            process_bytes=process_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            anonymous_bytes=anonymous_bytes(),
        )
    return dataclasses.asdict(result)


def _continue(engine: Engine, limit_tokens: int) -> str:
    engine.clear()
    opening = engine.tokenize(OPENING, add_special=True)
    return OPENING + engine.text(engine.generate(opening, limit_tokens).tokens)


def speeds(progress: Progress, *, tasks: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Time one file after another, each loaded anew; a task is a file and arguments of :func:`measure_times`."""
    times = []
    for done, task in enumerate(tasks):
        progress("speed", done, len(tasks))
        with Engine(Path(task.pop("file")), RunSettings(**settings)) as engine:
            times.append(dataclasses.asdict(measure_times(engine, **task)))
    return {"times": times}


def describe(_progress: Progress) -> dict[str, Any]:
    """Say which llama.cpp this is and what it was built for."""
    return dataclasses.asdict(Build(llama.version(), llama_cpp.__version__, llama.system_info()))


def decode(_progress: Progress, *, file: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Decode a batch and then a token, the shortest run that uses every kernel."""
    with Engine(Path(file), RunSettings(**settings)) as engine:
        tokens = np.arange(min(engine.vocabulary, engine.settings.context_tokens // 2), dtype=np.int32)
        engine.decode(tokens[:-1])
        engine.decode(tokens[-1:])
        return {"tokens": engine.position}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "score": score,
    "compare": compare,
    "run": run,
    "speeds": speeds,
    "describe": describe,
    "decode": decode,
}
