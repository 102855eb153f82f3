"""Measure what a build makes of several models: F16, all blocks at 4 bit, the mix, all blocks at 2 bit.

    python tools/measure_models.py --average-bits 3 MODEL [MODEL …]

MODEL is what ``impq-edge build --model`` takes. Prints one Markdown row per file: bytes, perplexity with its error,
and the difference of the loss to F16, taken window by window.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

import impq_edge
from impq_edge.releases.comparison import Scored
from impq_edge.releases.report import paired_difference


def main(
    models: list[str],
    average_bits: Annotated[float, typer.Option()] = 3.0,
    permutations: Annotated[int | None, typer.Option(help="As those of build.")] = None,
    device: Annotated[str, typer.Option()] = "laptop-16gb",
) -> None:
    """Build each model and print the table."""
    print("| model | file | bytes | bits/weight | perplexity | Δ loss to F16, nats/token |")
    print("|---|---|---:|---:|---:|---:|")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            for name, file, reference in _measure(model, Path(folder), average_bits, permutations, device):
                difference, error = paired_difference(file, reference)
                print(
                    f"| {model} | {name} | {file.file_bytes:,} | {file.bits_per_weight:.2f} "
                    f"| {file.perplexity:.3f} ± {file.perplexity_stderr:.3f} | {difference:+.4f} ± {error:.4f} |",
                    flush=True,
                )


def _measure(
    model: str, folder: Path, average_bits: float, permutations: int | None, device: str
) -> list[tuple[str, Scored, Scored]]:
    f16 = impq_edge.convert(model, type="f16", out=folder / "f16.gguf")
    reference = Scored.of(f16, impq_edge.validate(folder / "f16.gguf", device=impq_edge.load_device(device), fill_s=0))
    made = impq_edge.build(
        device,
        model=model,
        out=folder / "build",
        average_bits=average_bits,
        game=impq_edge.GameOptions(permutations=permutations),
    )
    return [
        ("F16", reference, reference),
        ("all blocks at 4 bit", Scored.of(*made.uniform[4]), reference),
        (f"mix, {made.allocation.average_bits:.2f} bits", Scored.of(made.artifact, made.validation), reference),
        ("all blocks at 2 bit", Scored.of(*made.uniform[2]), reference),
    ]


if __name__ == "__main__":
    typer.run(main)
