"""The weights of a checkpoint: one tensor at a time for the writer, the whole model for the game."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_edge.model.config import CLASSES
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.model.watched import require_as_hashed
from impq_edge.model.weights import find_tensor, require_finite

if TYPE_CHECKING:
    import torch


def read_tensor(directory: Path, tensor: TensorSpec) -> NDArray[np.float32]:
    """Read one tensor of a checkpoint as float32, in its own shape.

    Raises
    ------
    ModelError
        When the shard cannot be read or a weight is NaN or infinite.
    """
    values = find_tensor(directory, tensor).rows(0, tensor.shape[0])
    require_finite(values, tensor.name)
    return values


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings about optional libraries of transformers, which nobody here uses, off the user's screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load_model(directory: Path, spec: ModelSpec, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Load the checkpoint as a ``transformers`` causal language model, in evaluation mode, on ``device``.

    Neither code nor pickles from the checkpoint are ever run.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _quiet():
        model: Any = _class_of(spec).from_pretrained(
            directory,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=_attention(spec),
            dtype=dtype,
            **({} if device.type == "cpu" else {"device_map": {"": device}}),  # straight from the file to the GPU
        )
    return model.eval().requires_grad_(False)


def load_outside(directory: Path, spec: ModelSpec, device: "torch.device", dtype: "torch.dtype") -> Any:
    """Load embedding, norm and head; the Transformer blocks are there without weights, for :func:`load_block`.

    Raises
    ------
    ModelError
        When a shard cannot be read.
    """
    import transformers
    from accelerate import init_empty_weights

    with _quiet():
        config = _class_of(spec).config_class.from_pretrained(directory, local_files_only=True)
        require_as_hashed(directory / "config.json")
        with init_empty_weights(include_buffers=False):  # rotary frequencies and the like are computed, not stored
            model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, attn_implementation=_attention(spec), dtype=dtype
            )
    for tensor in spec.tensors:
        if tensor.block is None and tensor.shard is not None:
            _put(model, tensor.name, _read_as_stored(directory, tensor), device, dtype)
    model.tie_weights()
    for module in (model.model.embed_tokens, model.model.rotary_emb):
        module.to(device)
    return model.eval().requires_grad_(False)


def load_block(
    directory: Path, spec: ModelSpec, layer: "torch.nn.Module", block: int, device: "torch.device", dtype: "torch.dtype"
) -> None:
    """Give a block of :func:`load_outside`'s model its weights.

    Raises
    ------
    ModelError
        When a shard cannot be read.
    """
    for tensor in spec.tensors:
        if tensor.block == block:
            _put(layer, tensor.name_in_block, _read_as_stored(directory, tensor), device, dtype)


def _class_of(spec: ModelSpec) -> Any:
    """Return the class of the architecture that was checked; transformers' Auto classes go by what the files say."""
    import transformers

    return getattr(transformers, CLASSES[spec.hyperparameters.architecture])


def _attention(spec: ModelSpec) -> str:
    # Scaled dot-product attention has no soft cap, so transformers itself asks for eager on Gemma-2.
    return "eager" if spec.hyperparameters.attention_softcap else "sdpa"


def _put(
    module: "torch.nn.Module", name: str, values: "torch.Tensor", device: "torch.device", dtype: "torch.dtype"
) -> None:
    import torch

    path, _, attribute = name.rpartition(".")
    parameter = torch.nn.Parameter(values.to(device).to(dtype), requires_grad=False)
    setattr(module.get_submodule(path), attribute, parameter)


def _read_as_stored(directory: Path, tensor: TensorSpec) -> "torch.Tensor":
    """Read a tensor into memory of its own: safetensors would map the file, and the game play what becomes of it."""
    import torch

    found = find_tensor(directory, tensor)
    values = torch.from_numpy(found.rows_as_stored(0, tensor.shape[0]))
    return values.view(torch.bfloat16) if found.format == "BF16" else values
