"""Compare the encoders at equal types: plain ggml, ggml with an importance matrix, GPTQ onto the same grids.

    python tools/compare_encoders.py [MODEL …] --text evaluation.txt

MODEL is what ``impq-edge convert --model`` takes. For every encoder the blocks are all at 2 bit, all at 4 bit, and in
one mix of 3.00 bits on average, the same for all. Prints one Markdown row per file, measured by llama.cpp: bytes,
perplexity, and the mean KL divergence to the F16 file with its standard error.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import impq_edge
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.data import data_path
from impq_edge.ggml.encode import ENCODERS
from impq_edge.validation.validate import compare

_CALIBRATION, _EVALUATION = (data_path("demo", f"{name}.txt") for name in ("calibration", "evaluation"))


def main(
    models: Annotated[list[str] | None, typer.Argument()] = None,
    calibration: Annotated[Path, typer.Option()] = _CALIBRATION,
    text: Annotated[Path, typer.Option(help="Of evaluation.")] = _EVALUATION,
    windows: Annotated[int, typer.Option(help="Of 512 tokens, for evaluation.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of calibration.")] = 16384,
    compute: Annotated[str | None, typer.Option(help="cuda or cpu, where text passes through the model.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of llama.cpp.")] = None,
) -> None:
    """Convert every way and print the table."""
    print("| model | blocks | encoder | bytes | perplexity | KL divergence to F16, nats/token | against rtn |")
    print("|---|---|---|---:|---:|---:|---:|")
    for model in models or ["demo"]:
        with tempfile.TemporaryDirectory() as folder:
            encode = EncodeOptions("rtn", calibration, tokens, compute=compute)
            _compare(model, Path(folder), encode, text, windows, threads)


def _compare(model: str, folder: Path, encode: EncodeOptions, text: Path, windows: int, threads: int | None) -> None:
    reference = folder / "f16.gguf"
    impq_edge.convert(model, type="f16", out=reference)
    game = impq_edge.GameOptions(
        method="impq", permutations=2, backend_settings={"encode": "rtn"}, compute=encode.compute,
        calibration=encode.calibration,
    )  # fmt: skip
    profile = impq_edge.profile(model, out=folder / "profile.json", game=game)
    mix = impq_edge.allocate(profile, device="laptop-16gb", average_bits=3)
    wanted: dict[str, dict[str, Any]] = {
        "2 bit": {"type": "q2_k"},
        "mix": {"allocation": mix},
        "4 bit": {"type": "q4_k"},
    }
    for name, types in wanted.items():
        plain = 0.0
        for encoder in ENCODERS:
            path = folder / f"{encoder}.gguf"
            made = impq_edge.convert(model, out=path, encode=dataclasses.replace(encode, encode=encoder), **types)
            _, found = compare(path, reference, text=text, windows=windows, threads=threads)
            plain = plain or found.kld_mean
            perplexity = found.reference_perplexity * found.perplexity_ratio
            print(
                f"| {Path(model).name} | {name} | {encoder} | {made.file_bytes:,} | {perplexity:.3f} "
                f"| {found.kld_mean:.5f} ± {found.kld_stderr:.5f} | {found.kld_mean / plain - 1:+.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
