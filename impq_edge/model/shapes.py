"""What a model is by its shapes alone: for planning, before anything is downloaded.

``config.json`` fixes every tensor of a dense decoder. A hub id costs that file and the headers of the safetensors
files, no weights; for some models it ships with the package and costs nothing.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from impq_edge.data import data_path
from impq_edge.errors import ModelError
from impq_edge.model import hub
from impq_edge.model.config import HyperParameters, read_hyperparameters
from impq_edge.model.source import DEMO, demo_directory
from impq_edge.model.spec import (
    ModelSpec,
    TensorSpec,
    implied_inventory,
    read_config,
    read_headers,
    require_float,
    tensor_inventory,
)
from impq_edge.model.vocabulary import Vocabulary, count_vocabulary, guess_vocabulary
from impq_edge.records import Record

NO_CONTENT = ""
"""``content_sha256`` of a model whose weights nobody has seen."""


@dataclasses.dataclass(frozen=True)
class ShippedShapes(Record):
    """A model as it ships with the package: its numbers, no weights."""

    SCHEMA: ClassVar[str] = "impq-edge.shapes/1"

    model: str  # hub id
    aliases: tuple[str, ...]  # hub ids of models of the same shapes
    config: dict[str, Any]  # as in config.json
    vocabulary: Vocabulary
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A model that was found, by its shapes."""

    spec: ModelSpec  # its content is :data:`NO_CONTENT`
    vocabulary: Vocabulary
    vocabulary_known: bool  # else guessed from its size
    origin: str  # where the shapes come from, for people


def find_shapes(model: str, revision: str | None = None) -> Shapes:
    """Find a model's shapes without downloading its weights.

    Parameters
    ----------
    model
        :data:`~impq_edge.model.source.DEMO`, a directory with a ``config.json``, the name of a model whose shapes ship
        (:func:`shipped_names`), or a hub id. A name that ships is not asked for on the hub, unless with a revision.
    revision
        Branch, tag or commit of a hub id.

    Raises
    ------
    ModelError
        When the name is none of these, the hub cannot be reached or refuses, the architecture is not supported, or
        the tensors are not those that the configuration implies.
    """
    directory = demo_directory() if model == DEMO else Path(model)
    if model and _is_directory(directory):
        if revision is not None:
            raise ModelError(f"Revision {revision!r} was given, but {model!r} is a directory; leave the revision out.")
        return _from_directory(directory)
    if revision is None and (shipped := _shipped(model)):
        return _from_shipped(shipped, model)
    return _from_hub(model, revision)


@functools.cache
def shipped_shapes() -> tuple[ShippedShapes, ...]:
    """Return the models whose shapes ship, by name."""
    return tuple(ShippedShapes.load(path) for path in sorted(data_path("shapes").glob("*.json")))


def shipped_names() -> tuple[str, ...]:
    """Return the names of the models whose shapes ship, without their owners."""
    return tuple(_base_name(shipped.model) for shipped in shipped_shapes())


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def _from_directory(directory: Path) -> Shapes:
    hyper = read_hyperparameters(read_config(directory / "config.json"))
    tensors, origin = implied_inventory(hyper), f"config.json in {directory}"
    # The base install has no safetensors; config.json implies every shape, the headers only confirm it.
    if importlib.util.find_spec("safetensors") and any(directory.glob("*.safetensors")):
        tensors = tensor_inventory(read_headers(directory), hyper, str(directory))
        origin = f"config.json and safetensors headers in {directory}"
    counted = count_vocabulary(directory, hyper)
    return _shapes(directory.resolve().name, hyper, tensors, counted, origin)


def _from_shipped(shipped: ShippedShapes, asked: str) -> Shapes:
    hyper = read_hyperparameters(shipped.config)
    name = next(name for name in (shipped.model, *shipped.aliases) if _matches(name, asked))
    origin = f"the shapes of {name} that ship with impq-edge; the hub was not asked"
    return _shapes(_base_name(name), hyper, implied_inventory(hyper), shipped.vocabulary, origin)


def _from_hub(model: str, revision: str | None) -> Shapes:
    ships = f"Shapes ship for {', '.join(shipped_names())}."
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelError(
            f"{model!r} is neither a directory nor a model whose shapes ship, and hub ids need huggingface_hub; "
            f"pip install 'impq-edge[workstation]'. {ships}"
        )
    if not hub.is_repository_name(model):
        raise ModelError(f"{model!r} is neither a directory, a hub id, nor a model whose shapes ship. {ships}")
    cached = hub.cached(model, revision)
    try:
        path, found = hub.headers(model, revision)
    except ModelError as error:
        if cached is None:
            raise ModelError(f"{error} {ships}") from error
        kept = _from_directory(cached)
        spec = dataclasses.replace(kept.spec, name=_base_name(model))
        return dataclasses.replace(kept, spec=spec, origin=f"{model} in the hub's cache (no answer from the hub)")
    hyper = read_hyperparameters(read_config(path))
    headers: dict[str, dict[str, tuple[int, ...]]] = {}
    for shard, tensors in found.items():
        for name, (dtype, _) in tensors.items():
            require_float(name, dtype, f"{shard} of {model}")
        headers[shard] = {name: shape for name, (_, shape) in tensors.items()}
    origin = f"config.json and safetensors headers of {model} on the hub; no weights were downloaded"
    known = next((s.vocabulary for s in shipped_shapes() if _same_vocabulary(s, hyper)), None)
    return _shapes(_base_name(model), hyper, tensor_inventory(headers, hyper, model), known, origin)


def _shapes(
    name: str, hyper: HyperParameters, tensors: tuple[TensorSpec, ...], vocabulary: Vocabulary | None, origin: str
) -> Shapes:
    spec = ModelSpec(name, hyper, tensors, NO_CONTENT)
    return Shapes(spec, vocabulary or guess_vocabulary(hyper), vocabulary is not None, origin)


def _same_vocabulary(shipped: ShippedShapes, hyper: HyperParameters) -> bool:
    ours = read_hyperparameters(shipped.config)
    return (ours.architecture, ours.vocabulary) == (hyper.architecture, hyper.vocabulary)


def _shipped(model: str) -> ShippedShapes | None:
    for shipped in shipped_shapes():
        if any(_matches(name, model) for name in (shipped.model, *shipped.aliases)):
            return shipped
    return None


def _matches(name: str, asked: str) -> bool:
    return asked.lower() in {name.lower(), _base_name(name).lower()}


def _base_name(model: str) -> str:
    return model.rpartition("/")[2]
