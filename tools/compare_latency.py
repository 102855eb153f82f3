"""Compare predicted speeds with measured ones: pp512 and tg128 of GGUFs, timed in turns on this machine.

    impq-edge calibrate-device --device laptop-16gb --force -o my.toml
    python tools/compare_latency.py --device my.toml FILE.gguf [FILE.gguf …] [--rounds 5] [--json]

Prints one row per file: the predicted speed with its range, the median over rounds and repetitions, the interquartile
range over the median, and predicted over measured. Needs the base install alone.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from impq_edge import console
from impq_edge.devices.latency import GENERATED_TOKENS, PROMPT_TOKENS, Rate, predict_speeds
from impq_edge.devices.profile import load_device
from impq_edge.errors import ImpqError
from impq_edge.validation.process import run_child
from impq_edge.validation.results import Times
from impq_edge.validation.shapes import read_shapes
from impq_edge.validation.validate import device_settings

TIMEOUT_S = 3600.0


def main(
    files: list[Path],
    device: Annotated[str, typer.Option(help="A calibrated device: a TOML file.")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each file in a round.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure, predict, print."""
    try:
        found = compare(files, device, rounds, repetitions)
    except ImpqError as error:
        console.fail(str(error))
        sys.exit(3)
    if as_json:
        console.show_json({"device": device, "files": found})
        return
    print("| file | mode | predicted, tok/s | range | measured, tok/s | spread | predicted / measured |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in found:
        for mode in ("prompt", "generation"):
            told = row[mode]
            print(
                f"| {row['file']} | {mode} | {told['predicted']:.1f} | {told['low']:.1f}–{told['high']:.1f} "
                f"| {told['measured']:.1f} | {told['spread']:.1%} | {told['ratio']:.3f} |"
            )


def compare(files: list[Path], name: str, rounds: int, repetitions: int) -> list[dict[str, Any]]:
    """Return predicted and measured speeds of each file."""
    device = load_device(name)
    predicted = [predict_speeds(*read_shapes(file), device) for file in files]
    prompt_tokens = min(PROMPT_TOKENS, device.context_tokens)
    settings = dataclasses.replace(
        device_settings(device, device.threads), context_tokens=max(prompt_tokens, GENERATED_TOKENS)
    )
    task = {"prompt_tokens": prompt_tokens, "generated_tokens": GENERATED_TOKENS, "repetitions": repetitions}
    tasks = [{"file": str(file), **task} for file in files]
    job = {"kind": "speeds", "settings": dataclasses.asdict(settings)}
    visits: list[list[Times]] = []
    with console.progress() as advance:
        for done in range(rounds):
            advance("rounds", done, rounds)
            order = tasks if done % 2 == 0 else tasks[::-1]  # what drifts within a round cancels
            times = run_child({**job, "tasks": order}, timeout_s=TIMEOUT_S)["times"]
            made = [Times.from_json(one) for one in times]
            visits.append(made if done % 2 == 0 else made[::-1])
        advance("rounds", rounds, rounds)
    rows = []
    for file, speeds, times in zip(files, predicted, zip(*visits, strict=True), strict=True):
        prompts = [prompt_tokens / seconds for one in times for seconds in one.prompt_s]
        generations = [GENERATED_TOKENS / seconds for one in times for seconds in one.generation_s]
        prompt, generation = _told(speeds.prompt, prompts), _told(speeds.generation, generations)
        rows.append({"file": file.name, "basis": speeds.basis, "prompt": prompt, "generation": generation})
    return rows


def _told(rate: Rate | None, measured: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(measured, (0.25, 0.5, 0.75))
    likely = rate.likely_tok_per_s if rate else float("nan")
    return {
        "predicted": likely, "low": rate.low_tok_per_s if rate else likely,
        "high": rate.high_tok_per_s if rate else likely, "measured": float(median),
        "spread": float((high - low) / median), "ratio": likely / float(median),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
