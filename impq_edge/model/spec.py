"""The record of a checkpoint: architecture, hyperparameters and the inventory of its tensors.

Everything here comes from ``config.json`` and the safetensors headers; no weight is read.
"""

import dataclasses
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map

from impq_edge.errors import ModelError
from impq_edge.model.config import HyperParameters, read_hyperparameters
from impq_edge.model.watched import State, changed, file_sha256, state_of
from impq_edge.records import (
    STRICT,
    PlainName,
    Record,
    from_json,
    is_plain_name,
    read_text,
    sha256_json,
    shown,
    shown_text,
)

Role = Literal["embedding", "head", "matrix", "vector"]

ROPE_FACTORS = "rope_freqs.weight"
"""GGUF name of the derived tensor that holds Llama-3's rope scaling."""

_GGUF_BLOCK = re.compile(r"^blk\.(\d{1,6})\.")
_FLOAT_DTYPES = {"F32", "F16", "BF16"}
_CONTENT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                  "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
_CONTENT_FOLDER = "additional_chat_templates"
_ADAPTER_FILE = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint, under its name there and its name in a GGUF."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    gguf_name: str
    shape: tuple[int, ...]  # (out, in) for a matrix, as the checkpoint stores it
    role: Role
    block: int | None  # index of the Transformer block, None outside the blocks
    shard: str | None  # file name within the checkpoint; None: derived from the configuration

    @property
    def name_in_block(self) -> str:
        """The checkpoint's name without that of the block, such as ``self_attn.q_proj.weight``."""
        return self.name.removeprefix(f"model.layers.{self.block}.")

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass(frozen=True)
class ModelSpec(Record):
    """What a checkpoint is, without its weights; ``content_sha256`` identifies those too."""

    SCHEMA: ClassVar[str] = "impq-edge.model/1"

    name: PlainName
    hyperparameters: HyperParameters
    tensors: tuple[TensorSpec, ...]
    content_sha256: str  # over configuration, tokenizer and every shard

    @property
    def n_blocks(self) -> int:
        """Number of Transformer blocks, L in the method's notation."""
        return self.hyperparameters.n_blocks

    @property
    def weights(self) -> int:
        """Number of weights in the whole checkpoint."""
        return sum(tensor.weights for tensor in self.tensors)

    def block_matrices(self, block: int) -> tuple[TensorSpec, ...]:
        """Return the matrices of one block: what a player of the game puts at 2 or 4 bit."""
        return tuple(t for t in self.tensors if t.block == block and t.role == "matrix")


def tensor_named(gguf_name: str, shape: tuple[int, ...]) -> TensorSpec:
    """Return a tensor known by its name in a GGUF alone, of a model that has no checkpoint here."""
    role: Role = "vector" if len(shape) == 1 else "matrix"
    if gguf_name == "token_embd.weight":
        role = "embedding"
    elif gguf_name == "output.weight":
        role = "head"
    block = _GGUF_BLOCK.match(gguf_name)
    return TensorSpec(gguf_name, gguf_name, shape, role, int(block[1]) if block else None, None)


def read_model(
    directory: Path, name: str | None = None, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> ModelSpec:
    """Read a checkpoint directory laid out as on the hub.

    Parameters
    ----------
    directory
        Holds ``config.json``, ``tokenizer.json`` and one or several safetensors files.
    name
        What reports call the model; the directory's name by default.
    progress
        Told how many bytes have been hashed, and how many there are.

    Raises
    ------
    ModelError
        When a file is missing, truncated or of a kind that cannot be used, when the architecture is
        not supported, or when the tensors are not those of the architecture.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; pass a checkpoint directory or a hub id.")
    name = name or directory.resolve().name
    if not is_plain_name(name):
        raise ModelError(
            f"The model is called {shown(name)} like its directory, and files are to be called after it; rename that."
        )
    before = _states(directory)
    config = read_config(directory / "config.json")
    if (directory / _ADAPTER_FILE).exists():  # transformers would load what it names, and put it over the weights
        raise ModelError(f"{directory} holds an adapter ({_ADAPTER_FILE}); merge it into the weights, or remove it.")
    hyperparameters = read_hyperparameters(config)
    tensors = tensor_inventory(read_headers(directory), hyperparameters, str(directory))
    content_sha256 = _content_sha256(directory, tensors, progress)
    after = _states(directory)
    if after != before:  # between parsing and hashing
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise changed(*(directory / name for name in names))
    return ModelSpec(name, hyperparameters, tensors, content_sha256)


def require_unchanged(directory: Path, spec: ModelSpec) -> None:
    """Refuse a checkpoint that is no longer what ``spec`` says; nothing is hashed again that nothing wrote to.

    Raises
    ------
    ModelError
        Naming the files.
    """
    now = _content_sha256(directory, spec.tensors, lambda _done, _total: None)
    if now != spec.content_sha256:
        raise changed(*(directory / name for name in changed_files(now, spec.content_sha256)))


def changed_files(*contents: str) -> list[str]:
    """Return the names of the files by which checkpoints differ; empty where this process did not hash them."""
    known = [_files.get(content, {}) for content in contents]
    names = sorted({name for files in known for name in files})
    return [name for name in names if len({files.get(name) for files in known}) > 1] if all(known) else []


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint, such as ``config.json``, with one sentence for every way this can fail."""
    if not path.exists():
        raise ModelError(f"{path.parent} has no config.json; pass a checkpoint directory laid out as on the hub.")
    try:
        config = from_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({shown_text(str(error))}); download the checkpoint again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, not an object; download the checkpoint again.")
    return config


Headers = Mapping[str, Mapping[str, tuple[int, ...]]]
"""File name of every shard → name of every tensor in it → its shape."""


def read_headers(directory: Path) -> Headers:
    """Read what a checkpoint's safetensors files hold, from their headers alone.

    Raises
    ------
    ModelError
        When a file is missing, truncated, a pickle, or holds tensors that are not of floats.
    """
    return {shard: _header(directory / shard) for shard in _shards(directory)}


def tensor_inventory(headers: Headers, hyperparameters: HyperParameters, where: str) -> tuple[TensorSpec, ...]:
    """Return the tensors of a checkpoint in the order of the file we write, checked against its configuration.

    Parameters
    ----------
    headers
        What its safetensors files hold.
    where
        What errors call it.

    Raises
    ------
    ModelError
        When tensors are missing, are none of the architecture's, or have other shapes than the configuration implies.
    """
    names = get_tensor_name_map(
        {arch.name.lower(): arch for arch in MODEL_ARCH}[hyperparameters.architecture],
        hyperparameters.n_blocks,
    )
    tensors = [
        _tensor(name, shape, shard, names)
        for shard, header in headers.items()
        for name, shape in header.items()
        if not name.endswith(".rotary_emb.inv_freq")  # a cache of rope, which GGUF derives itself
    ]
    if hyperparameters.rope_scaling:  # llama.cpp reads Llama-3's frequency factors from a tensor
        shape = (hyperparameters.head_dim // 2,)
        tensors.append(TensorSpec(ROPE_FACTORS, ROPE_FACTORS, shape, "vector", None, None))
    if hyperparameters.tied_embeddings:  # some checkpoints store the tied head a second time
        tensors = [tensor for tensor in tensors if tensor.role != "head"]
    _check_inventory(tensors, hyperparameters, where)
    return tuple(sorted(tensors, key=_file_order))


def implied_inventory(hyperparameters: HyperParameters) -> tuple[TensorSpec, ...]:
    """Return the tensors that a configuration implies, under their names in a GGUF, in the order of the file."""
    found = [tensor_named(name, shape) for name, shape in hyperparameters.expected_shapes().items()]
    return tuple(sorted(found, key=_file_order))


def _file_order(tensor: TensorSpec) -> tuple[int, int, str]:
    # The embedding follows the blocks because a tied one is also the head, and what enters the head is known only
    # when text has passed through all blocks.
    if tensor.block is not None:
        return (0, tensor.block, tensor.gguf_name)
    return (1, 0, tensor.gguf_name)


def _tensor(name: str, shape: tuple[int, ...], shard: str, names: TensorNameMap) -> TensorSpec:
    gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        raise ModelError(
            f"Tensor {shown(name)} in {shard} has no place in a GGUF of this architecture; remove it first."
        )
    return dataclasses.replace(tensor_named(gguf_name, shape), name=name, shard=shard)


def _shards(directory: Path) -> list[str]:
    """Return the file names of all shards, complete, without following any path out of the directory."""
    if (directory / "model.safetensors").exists():  # what transformers prefers where both are there
        return ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_config(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"{index} has no weight_map of file names; download the checkpoint again.")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard or not is_plain_name(shard):
                raise ModelError(
                    f"{index} names {shown(shard)}, which is not a plain file name; do not trust this model."
                )
            if not (directory / shard).exists():
                raise ModelError(f"Shard {shown_text(shard)} of {directory} is missing; download the checkpoint again.")
        return shards
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if not shards:
        if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
            raise ModelError(
                f"{directory} holds weights only as pickles, which can run code when loaded; "
                "convert them to safetensors with transformers' save_pretrained in a place you trust."
            )
        raise ModelError(f"{directory} holds no .safetensors file; pass a checkpoint laid out as on the hub.")
    numbered = re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", shards[0])
    if numbered is None:
        raise ModelError(
            f"{directory} has no model.safetensors and no index, but {shards[0]}; rename it as the hub does."
        )
    if len(shards) != int(numbered[1]):
        raise ModelError(f"{directory} has {len(shards)} of {int(numbered[1])} shards; download the checkpoint again.")
    raise ModelError(f"{directory} has shards but no model.safetensors.index.json; download the checkpoint again.")


def _require_regular(path: Path) -> None:
    if not path.is_file():  # a pipe may never end, nor a device
        raise ModelError(f"{path} is no regular file; download the checkpoint again.")


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    _require_regular(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, tensor in slices.items():
                require_float(name, tensor.get_dtype(), str(path))
            return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"Shard {path.name} of {path.parent} is truncated, malformed or unreadable ({shown_text(str(error))}); "
            "download it again."
        ) from None


def require_float(name: str, dtype: str, where: str) -> None:
    """Refuse a tensor of a type that weights are not trained in; ``where`` is what the error calls its file."""
    if dtype not in _FLOAT_DTYPES:
        raise ModelError(
            f"Tensor {shown(name)} in {where} is {dtype}, not one of {sorted(_FLOAT_DTYPES)}; "
            "start from an unquantised checkpoint."
        )


def _check_inventory(tensors: Sequence[TensorSpec], hyper: HyperParameters, directory: str) -> None:
    expected = hyper.expected_shapes()
    found = {tensor.gguf_name: tensor for tensor in tensors}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} tensors its config.json asks for, {missing[0]} first; "
            "download the checkpoint again."
        )
    surplus = sorted(found.keys() - expected.keys())
    if surplus:
        raise ModelError(
            f"Tensor {shown(found[surplus[0]].name)} of {directory} is not part of a dense "
            f"{hyper.architecture} model; this checkpoint cannot be converted."
        )
    for gguf_name, tensor in found.items():
        if tensor.shape != expected[gguf_name]:
            raise ModelError(
                f"Tensor {shown(tensor.name)} of {directory} has shape {shown(list(tensor.shape))}, but its "
                f"config.json implies {list(expected[gguf_name])}; the two do not belong together."
            )


def _content_sha256(directory: Path, tensors: tuple[TensorSpec, ...], progress: Callable[[int, int], None]) -> str:
    templates = sorted(f"{_CONTENT_FOLDER}/{path.name}" for path in (directory / _CONTENT_FOLDER).glob("*.jinja"))
    names = [*_CONTENT_FILES, *templates, *sorted({tensor.shard for tensor in tensors if tensor.shard})]
    files = {name: directory / name for name in names if (directory / name).exists()}
    for path in files.values():
        _require_regular(path)
    total = sum(size for _, _, size, _, _ in map(state_of, files.values()))
    done, lock = 0, threading.Lock()

    def advance(size: int) -> None:
        nonlocal done
        with lock:  # shards are hashed side by side
            done += size
            progress(done, total)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(lambda path: file_sha256(path, advance), files.values())
        found = dict(zip(files, hashes, strict=True))
    content = sha256_json(found)
    _files[content] = found
    return content


_files: dict[str, dict[str, str]] = {}  # content of a checkpoint → name → hash of each of its files


def _states(directory: Path) -> dict[str, State]:
    """Return the states of all files that a record of the checkpoint depends on."""
    folders = [*(directory / _CONTENT_FOLDER).glob("*.jinja"), *directory.glob("*.safetensors")]
    paths = [*(directory / name for name in (*_CONTENT_FILES, "model.safetensors.index.json")), *folders]
    return {path.relative_to(directory).as_posix(): state_of(path) for path in paths if path.exists()}
