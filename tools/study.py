r"""Play the cells of the study on this machine, several processes beside one another.

    python tools/study.py CELLS --models NAME=DIRECTORY --backends hqq,quanto --texts books=FILE --texts wiki=FILE \
        --held-out books=OTHER --held-out wiki=FILE

CELLS gets one JSON per cell (`impq_edge/study/cell.py`), and journals from which a killed run goes on. Calibration
text: the first half of each file, a stretch of its own for every seed; held out are `--held-out NAME=FILE`, and of a
file that is also calibrated on, its second half.
"""

import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from impq_edge.backends import NAMES as BACKENDS
from impq_edge.errors import ImpqError
from impq_edge.study.cells import Cell, cell_name, path_of
from impq_edge.study.transfer import LENT


def main(
    cells: Annotated[Path, typer.Argument(help="Folder of the results.")],
    models: Annotated[list[str], typer.Option(help="NAME=CHECKPOINT, several times.")],
    texts: Annotated[list[str], typer.Option(help="NAME=FILE to calibrate on, several times.")],
    held_out: Annotated[list[str], typer.Option(help="NAME=FILE to examine on, several times.")],
    backends: Annotated[str, typer.Option(help="Comma-separated.")] = "hqq,quanto,gptq",
    players: Annotated[str, typer.Option(help="Comma-separated: blocks, sublayers, tensors.")] = "blocks",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    tokens: Annotated[int, typer.Option(help="Of an evaluation.")] = 8192,
    calibration_tokens: Annotated[int, typer.Option(help="That encoders see.")] = 16384,
    exam_windows: Annotated[int, typer.Option(help="Of each held-out text.")] = 40,
    window_tokens: Annotated[int, typer.Option()] = 512,
    jobs: Annotated[int, typer.Option(help="Processes; they take turns on the GPUs there are.")] = 1,
    minutes: Annotated[float, typer.Option(help="No cell is begun after so many.")] = 1e9,
    compute: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    permutations: Annotated[
        int, typer.Option(help="Of the published estimator; others get a third of its cost.")
    ] = 100,
    skip: Annotated[str, typer.Option(help="Methods not to play, comma-separated.")] = "",
    lend: Annotated[
        str, typer.Option(help="Backends, comma-separated, whose choices are examined too; their cells must be there.")
    ] = "",
) -> None:
    """Play what is missing."""
    for option, values in (("--models", models), ("--texts", texts), ("--held-out", held_out)):
        for value in values:
            name, separator, path = value.partition("=")
            if not (name and separator and Path(path).exists()):
                raise SystemExit(
                    f"{option} {value} is not NAME=PATH of something that exists; write it like books=a.txt."
                )
    for option, value in (("--backends", backends), ("--lend", lend)):
        for name in filter(None, value.split(",")):
            if name not in BACKENDS:
                raise SystemExit(f"{option} {name} is unknown; choose among {', '.join(BACKENDS)}.")
    cells.mkdir(parents=True, exist_ok=True)
    wanted = [
        {"model": model, "backend": backend, "players": kind, "text": text, "seed": int(seed)}
        for seed in seeds.split(",")
        for model in models
        for backend in backends.split(",")
        for kind in players.split(",")
        for text in texts
    ]
    common = {
        "cells": str(cells), "texts": texts, "held_out": held_out, "tokens": tokens, "skip": skip, "compute": compute,
        "calibration_tokens": calibration_tokens, "exam_windows": exam_windows, "window_tokens": window_tokens,
        "permutations": permutations, "lend": lend,
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    for cell in wanted:
        if not path_of(cells, name_of(cell)).exists():
            queue.put(cell)
    deadline = time.time() + 60 * minutes
    workers = [context.Process(target=work, args=(queue, common, deadline, index)) for index in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    missing = [name_of(cell) for cell in wanted if not path_of(cells, name_of(cell)).exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there.", file=sys.stderr)
    raise typer.Exit(1 if missing else 0)


def name_of(cell: dict[str, Any], backend: str | None = None) -> str:
    """Return the name of a cell that was asked for, or of the same on another backend."""
    model, text = (cell[key].partition("=")[0] for key in ("model", "text"))
    return cell_name(model, backend or cell["backend"], cell["players"], text, cell["seed"])


def work(queue: Any, common: dict[str, Any], deadline: float, index: int) -> None:
    """Play cells until none is left or the time is over."""
    import queue as queues

    import torch

    if common["compute"] == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % max(1, torch.cuda.device_count()))
    while time.time() < deadline:
        try:
            cell = queue.get(timeout=1)
        except queues.Empty:
            return
        try:
            play(cell, common)
        except ImpqError as error:  # one cell must not end the others
            print(f"{cell}: {error}", file=sys.stderr, flush=True)
        except Exception:
            print(f"{cell}:", traceback.format_exc(), file=sys.stderr, flush=True)


def lent(cell: dict[str, Any], folder: Path, backends: str) -> set[str]:
    """Return the coalitions that methods chose in the same cell on other backends."""
    others = [Cell.load(path_of(folder, name_of(cell, name))) for name in filter(None, backends.split(","))]
    return {answer.coalition for other in others for answer in other.answers if answer.method in LENT}


def play(cell: dict[str, Any], common: dict[str, Any]) -> None:
    """Play one cell and save it."""
    from impq_edge.backends import load_backend
    from impq_edge.spqe.run import game_settings
    from impq_edge.spqe.table import Job
    from impq_edge.stages import open_model
    from impq_edge.study.cell import Plan, run_cell
    from impq_edge.study.texts import calibration_stretch, exam_stretch

    folder = Path(common["cells"])
    stem = name_of(cell)
    name, _, directory = cell["model"].partition("=")
    opened, spec = open_model(directory)
    backend = load_backend(cell["backend"])
    text_name, _, text = cell["text"].partition("=")
    seen = calibration_stretch(opened, Path(text), cell["seed"], common["calibration_tokens"], common["window_tokens"])
    windows = seen.first(common["tokens"])
    also = {each.partition("=")[2] for each in common["texts"]}
    held_out = {}
    for each in common["held_out"]:
        its_name, _, file = each.partition("=")
        held_out[its_name] = exam_stretch(
            opened, Path(file), common["exam_windows"], common["window_tokens"], second_half=file in also
        )
    settings = game_settings(
        cell["backend"], backend, windows, players=cell["players"], device=common["compute"], calibration=seen
    )
    kept = folder / "kept" / f"{name}-{text_name}-{cell['seed']}" if cell["backend"] == "kquant" else None
    job = Job(opened, spec, backend, windows, settings, seen, kept)
    plan = Plan(
        name, cell["backend"], text_name, cell["seed"], common["permutations"], frozenset(common["skip"].split(",")),
        lent(cell, folder, common["lend"]),
    )  # fmt: skip

    def progress(phase: str, done: int, total: int) -> None:
        if not total or done == total:
            print(f"{time.strftime('%H:%M:%S')} {stem} {phase} {done}", file=sys.stderr, flush=True)

    run_cell(plan, job, held_out, folder / "journals" / f"{stem}.journal", progress).save(path_of(folder, stem))


if __name__ == "__main__":
    typer.run(main)
