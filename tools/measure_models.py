"""Measure what builds make of several models: the mix of each way to choose it, and all blocks at 4 and at 2 bit.

    python tools/measure_models.py --average-bits 3 MODEL [MODEL …]

MODEL is what ``impq-edge build --model`` takes. Every file is compared with the model's F16 by llama.cpp. Prints one
Markdown row per file: bytes, perplexity with its error, the difference of the loss to F16, taken window by window, the
KL divergence from F16, and for a mix how many evaluations chose it and how long its build took.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

import impq_edge
from impq_edge.conversion.artifact import Artifact
from impq_edge.releases.report import paired_difference
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.profile import SensitivityProfile
from impq_edge.validation.validate import compare

WAYS = {
    "mix": GameOptions(),
    "mix, `--players blocks`": GameOptions(players="blocks"),
    "mix, `--method impq`": GameOptions(method="impq"),
}


def main(
    models: list[str],
    average_bits: Annotated[float, typer.Option()] = 3.0,
    device: Annotated[str, typer.Option()] = "laptop-16gb",
) -> None:
    """Build each model in each way and print the table."""
    print("| model | file | bytes | bits/weight | perplexity | Δ loss to F16 | KL divergence to F16 | made by |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            _measure(model, Path(folder), average_bits, device)


def _measure(model: str, folder: Path, average_bits: float, device: str) -> None:
    f16 = folder / "f16.gguf"
    impq_edge.convert(model, type="f16", out=f16)
    for number, (name, game) in enumerate(WAYS.items()):
        started = time.monotonic()
        made = impq_edge.build(device, model=model, out=folder / str(number), average_bits=average_bits, game=game)
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        if not number:
            for bits in (4, 2):
                _tell(model, f"all blocks at {bits} bit", made.uniform[bits][0], folder / str(number), f16, "")
        assert isinstance(made.profile, SensitivityProfile)
        how = f"{len(made.profile.evaluations)} evaluations, {minutes} min {seconds} s"
        _tell(model, name, made.artifact, folder / str(number), f16, how)


def _tell(model: str, name: str, artifact: Artifact, folder: Path, f16: Path, how: str) -> None:
    score, divergence = compare(folder / artifact.artifact, f16)
    difference, error = paired_difference(score.window_nlls, divergence.reference_window_nlls)
    print(
        f"| {model} | {name} | {artifact.file_bytes:,} | {artifact.bits_per_weight:.2f} "
        f"| {score.perplexity:.3f} ± {score.stderr:.3f} | {difference:+.4f} ± {error:.4f} "
        f"| {divergence.kld_mean:.4f} ± {divergence.kld_stderr:.4f} | {how} |",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
