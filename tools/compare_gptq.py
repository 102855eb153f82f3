"""Compare GPTQ on full-precision inputs, as our blocks are made, with gptqmodel's own sequential loop.

    python tools/compare_gptq.py [CHECKPOINT …]

The game needs every block before any coalition is known, so our Hessians come from the model as it is. The library
goes from block to block, and collects each Hessian behind what it has quantised before. Both see the same tokens.
Prints one Markdown row per checkpoint, width and way: mean loss in nats per token on other text, and its difference
to full precision and to the library, window by window, with standard errors. Runs on the CPU in float32.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn import functional

from impq_edge.backends import BITS, Backend, Bits, Inputs, load_backend, undisturbed
from impq_edge.data import data_path
from impq_edge.model.calibration import read_windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model
from impq_edge.spqe.observe import Observer

_ROWS = 4  # windows per forward pass
_CALIBRATION, _EVALUATION = (data_path("demo", f"{name}.txt") for name in ("calibration", "evaluation"))


def main(
    checkpoints: Annotated[list[Path] | None, typer.Argument()] = None,
    calibration: Annotated[Path, typer.Option()] = _CALIBRATION,
    evaluation: Annotated[Path, typer.Option()] = _EVALUATION,
    tokens: Annotated[int, typer.Option(help="Of calibration.")] = 16384,
    windows: Annotated[int, typer.Option(help="Of evaluation.")] = 24,
    window_tokens: Annotated[int, typer.Option()] = 512,
    group_size: Annotated[int, typer.Option()] = 128,
    symmetric: Annotated[bool, typer.Option()] = True,
) -> None:
    """Quantise each checkpoint every way and print the table."""
    backend = load_backend("gptq", group_size=group_size, sym=symmetric)
    print("| model | bits/weight | blocks | loss, nats/token | − full precision | − library's loop |")
    print("|---|---:|---|---:|---:|---:|")
    for checkpoint in [path.resolve() for path in checkpoints or [data_path("demo", "tiny-llama3")]]:
        seen = read_windows(checkpoint, calibration, tokens, window_tokens).tokens
        unseen = read_windows(checkpoint, evaluation, windows * window_tokens, window_tokens).tokens
        model = _load(checkpoint)
        full = _losses(model, unseen)
        observed = _observe(model, backend, seen)
        print(f"| {checkpoint.name} | 16 | full precision | {_with_error(full)} | | |", flush=True)
        for bits in BITS:
            library = _losses(_by_the_library(checkpoint, backend, bits, seen), unseen)
            print(_row(checkpoint, str(bits), "gptqmodel's sequential loop", library, full, library), flush=True)
            blind = {name: _without_hessian(inputs) for name, inputs in observed.items()}
            for name, inputs in (("ours, full-precision inputs", observed), ("no inputs: rounded to nearest", blind)):
                model = _load(checkpoint)
                used = _quantise(model, backend, bits, inputs)
                print(_row(checkpoint, f"{used:.3f}", name, _losses(model, unseen), full, library), flush=True)


def _load(checkpoint: Path) -> Any:
    return load_model(checkpoint, read_model(checkpoint), torch.device("cpu"), torch.float32)


def _matrices(model: Any) -> dict[tuple[int, str], torch.nn.Linear]:
    return {
        (block, name): module
        for block, layer in enumerate(model.model.layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@torch.no_grad()
def _observe(model: Any, backend: Backend, windows: NDArray[np.int64]) -> dict[tuple[int, str], Inputs]:
    observers = [Observer(layer, backend.statistics) for layer in model.model.layers]
    with contextlib.ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        for rows in torch.from_numpy(windows).split(_ROWS):
            model.model(input_ids=rows, use_cache=False)
    found = {(block, name): observers[block].take(f"{name}.weight") for block, name in _matrices(model)}
    return {key: inputs for key, inputs in found.items() if inputs is not None}


def _without_hessian(inputs: Inputs) -> Inputs:
    """Columns of equal weight that have nothing to do with each other: GPTQ then rounds to nearest."""
    ones = torch.ones_like(inputs.mean_square)
    return Inputs(inputs.tokens, ones, ones.diag())


def _quantise(model: Any, backend: Backend, bits: Bits, observed: dict[tuple[int, str], Inputs]) -> float:
    """Put every matrix of the blocks at ``bits``; return the bits per weight really used."""
    used = weights = 0.0
    for key, linear in _matrices(model).items():
        stored = backend.quantise(linear.weight.data, bits, observed[key])
        linear.weight.data = stored.weight
        used += stored.bits_per_weight * stored.weight.numel()
        weights += stored.weight.numel()
    return used / weights


def _by_the_library(checkpoint: Path, backend: Any, bits: Bits, windows: NDArray[np.int64]) -> Any:
    """Run gptqmodel's own loop and return a plain model with the weights of its packed layers."""
    # Its pools ask for two workers, and on two cores it gives itself only one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    text = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    model = _load(checkpoint)
    with undisturbed(), tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it writes a log there
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        config = QuantizeConfig(
            bits=bits,
            group_size=backend.group_size,
            damp_percent=backend.damp_percent,
            desc_act=backend.desc_act,
            sym=backend.sym,
            offload_to_disk=False,
        )
        theirs = GPTQModel.load(str(checkpoint), config, device="cpu", dtype=torch.float32)
        theirs.quantize(text, batch_size=_ROWS, calibration_sort=None, backend=BACKEND.TORCH)
        for (block, name), linear in _matrices(model).items():
            packed = theirs.model.model.layers[block].get_submodule(name)
            if packed.qzero_format() == 1:  # as in files, where a zero is one less
                convert_gptq_v1_to_v2_format_module(packed, bits, torch.int32)
            linear.weight.data = packed.dequantize_weight().T.float().contiguous()
    return model


@torch.no_grad()
def _losses(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean loss per token of each window, shape (windows,)."""
    losses = []
    for rows in torch.from_numpy(windows).split(_ROWS):
        logits = model(input_ids=rows, use_cache=False).logits.float()[:, :-1]
        losses.append(functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(dim=1))
    return torch.cat(losses).double().numpy()


def _row(
    checkpoint: Path, bits: str, name: str, losses: NDArray[Any], full: NDArray[Any], library: NDArray[Any]
) -> str:
    apart = "" if losses is library else _with_error(losses - library, "+")
    return (
        f"| {checkpoint.name} | {bits} | {name} | {_with_error(losses)} | {_with_error(losses - full, '+')} | {apart} |"
    )


def _with_error(values: NDArray[np.float64], sign: str = "") -> str:
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    typer.run(main)
