"""Whole models whose blocks hold the weights that a backend stores."""

from pathlib import Path
from typing import Any

import torch

from impq_edge.backends import Backend, Bits
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model


def load(directory: Path, dtype: torch.dtype) -> Any:
    return load_model(directory, read_model(directory), torch.device("cpu"), dtype)


def block_linears(model: Any) -> dict[str, torch.nn.Linear]:
    found = model.named_modules()
    return {name: module for name, module in found if ".layers." in name and isinstance(module, torch.nn.Linear)}


def assemble(directory: Path, backend: Backend, bits: Bits, dtype: torch.dtype) -> Any:
    model = load(directory, dtype)
    for linear in block_linears(model).values():
        linear.weight.data = backend.quantise(linear.weight.data.float(), bits).weight.to(dtype)
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(10, 8000, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # Quanto's tensors cannot be read in inference mode
        return model(input_ids=tokens, use_cache=False).logits.float()
