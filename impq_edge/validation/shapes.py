"""The record of a model read back from its GGUF, as far as memory and speed depend on it."""

from pathlib import Path
from typing import get_args

from impq_edge.errors import ValidationError
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import Architecture, HyperParameters
from impq_edge.model.spec import ModelSpec, tensor_named
from impq_edge.validation.file import FileFacts, read_facts

_UNKNOWN_NUMBER = 1.0  # of what neither memory nor speed depends on


def read_shapes(path: Path) -> tuple[ModelSpec, dict[str, TensorType]]:
    """Return what a GGUF holds as a model and the types of its tensors; its content hash is left empty.

    Raises
    ------
    ValidationError
        When the file is no sound GGUF, or not a dense model of an architecture that is known here.
    """
    facts = read_facts(path)
    if facts.architecture not in get_args(Architecture):
        raise ValidationError(
            f"{path} holds a {facts.architecture} model; speeds are predicted for {', '.join(get_args(Architecture))}."
        )
    shapes = {tensor.name: tensor.shape for tensor in facts.tensors}
    try:
        hyper = _hyperparameters(facts, shapes)
        types = {tensor.name: TensorType(tensor.type) for tensor in facts.tensors}
    except (KeyError, ValueError, IndexError) as error:
        raise ValidationError(
            f"{path} is not a dense {facts.architecture} model of known formats ({error}); pass another file."
        ) from None
    tensors = tuple(tensor_named(name, shape) for name, shape in shapes.items())
    return ModelSpec(path.stem, hyper, tensors, ""), types


def _hyperparameters(facts: FileFacts, shapes: dict[str, tuple[int, ...]]) -> HyperParameters:
    architecture: Architecture = facts.architecture  # type: ignore[assignment]

    def number(key: str, default: int | None = None) -> int:
        value = facts.keys.get(f"{architecture}.{key}", default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{architecture}.{key} is {value!r}")
        return value

    vocabulary, hidden = shapes["token_embd.weight"]
    heads = number("attention.head_count")
    gemma = architecture == "gemma2"
    return HyperParameters(
        architecture=architecture,
        n_blocks=number("block_count"),
        hidden=hidden,
        ffn=shapes["blk.0.ffn_gate.weight"][0],
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        head_dim=shapes["blk.0.attn_q.weight"][0] // heads,
        vocabulary=vocabulary,
        context=number("context_length"),
        rms_epsilon=_UNKNOWN_NUMBER,
        rope_theta=_UNKNOWN_NUMBER,
        rope_scaling=None,
        tied_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        sliding_window=number("attention.sliding_window") if gemma else None,
        attention_softcap=_UNKNOWN_NUMBER if gemma else None,
        final_softcap=_UNKNOWN_NUMBER if gemma else None,
    )
