"""The weights of a checkpoint: one tensor at a time for the writer, the whole model for the game."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from impq_edge.errors import ModelError
from impq_edge.model.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    import torch


def read_tensor(directory: Path, tensor: TensorSpec) -> NDArray[np.float32]:
    """Read one tensor of a checkpoint as float32, in its own shape.

    Raises
    ------
    ModelError
        When the shard cannot be read or a weight is NaN or infinite.
    """
    from safetensors import SafetensorError, safe_open

    assert tensor.shard is not None, f"{tensor.name} is derived, not stored"
    path = directory / tensor.shard
    try:
        with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16, torch does
            values: NDArray[np.float32] = file.get_tensor(tensor.name).float().numpy()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"Shard {path} cannot be read ({error}); download the checkpoint again.") from None
    require_finite(values, tensor.name)
    return values


def require_finite(values: NDArray[np.float32], name: str) -> None:
    """Refuse NaN and infinite weights: no format can store them and every loss would be NaN."""
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ModelError(f"Tensor {name!r} has {bad} NaN or infinite weights of {values.size}; use another checkpoint.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings about optional libraries of transformers, which nobody here uses, off the user's screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def load_model(
    directory: Path, spec: ModelSpec, device: "torch.device", dtype: "torch.dtype", *, blocks_on_host: bool = False
) -> Any:
    """Load the checkpoint as a ``transformers`` causal language model, in evaluation mode, on ``device``.

    With ``blocks_on_host`` its Transformer blocks stay in host memory, and ``accelerate`` moves each to the
    device while it runs: for models larger than the GPU. Neither code nor pickles from the checkpoint are
    ever run.
    """
    import transformers

    # Scaled dot-product attention has no soft cap, so transformers itself asks for eager on Gemma-2.
    attention = "eager" if spec.hyperparameters.attention_softcap else "sdpa"
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    dtype_argument = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=attention,
            **{dtype_argument: dtype},
            **({} if device.type == "cpu" else {"device_map": _device_map(spec, device, blocks_on_host)}),
        )
    return model.eval().requires_grad_(False)


def _device_map(spec: ModelSpec, device: "torch.device", blocks_on_host: bool) -> dict[str, Any]:
    if not blocks_on_host:
        return {"": device}  # straight from the file to the GPU
    parts: dict[str, Any] = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], device)
    return parts | {f"model.layers.{block}": "cpu" for block in range(spec.n_blocks)}
