"""What a file occupies when llama.cpp runs it on a device's CPU, buffer by buffer.

Sources (llama.cpp as vendored in llama-cpp-python 0.3.36): the KV cache from ``src/llama-kv-cache.cpp`` and
``llama-kv-cache-iswa.cpp``, the output buffer from ``llama_context::output_reserve`` (``src/llama-context.cpp``),
the work buffer from ``ggml_graph_plan`` (``ggml/src/ggml-cpu/ggml-cpu.c``), repacking from
``ggml_repack_get_optimal_repack_type`` (``ggml/src/ggml-cpu/repack.cpp``) and what is copied when from
``llama_model_loader`` (``src/llama-model-loader.cpp``).
"""

import dataclasses
from typing import ClassVar

import pydantic

from impq_edge.devices.graph import GraphShape, compute_buffer_bytes
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import DeviceError
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import TensorTypes, data_bytes, padded
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import STRICT

CELL_GROUP = 256
"""llama.cpp pads the context to a multiple of this many tokens."""

CACHE_TYPES = (TensorType.F16, TensorType.Q8_0)

# Vocabulary tables in bytes per token, measured as the growth of anonymous memory over vocabularies of 32k, 128k
# and 256k: 150 per token and 132 per merge. Llama-3 has 2.2 merges a token, Qwen-3 one, Gemma-2's model none.
_TOKENIZER_BYTES_PER_TOKEN = {"llama": 440, "qwen3": 285, "gemma2": 150}
_Q8_K_BYTES, _Q8_K_WEIGHTS = 292, 256  # block_q8_K, to which activations are rounded before a K-quant product
_ATTENTION_TILE = 64  # GGML_FA_TILE_Q and GGML_FA_TILE_KV in ggml/src/ggml-cpu/common.h
_TILED_SLOT_BYTES = 512 * 2**10  # a thread's slot of ggml/src/ggml-cpu/tiled, x86 only
_F32_BYTES, _F16_BYTES = 4, 2

# Weight rows a type is interleaved by, where it is repacked at all.
_REPACKED_BY_AVX2 = {TensorType.Q4_0: 8, TensorType.Q4_K: 8}
_REPACKED_BY_AVX512 = {TensorType.Q2_K: 8}
_REPACKED_BY_NEON = {TensorType.Q4_0: 4, TensorType.Q8_0: 4, TensorType.Q4_K: 8, TensorType.Q5_K: 8, TensorType.Q6_K: 8}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device and where it goes, in bytes."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    device: str
    context_tokens: int
    kv_type: str
    memory_bytes: int
    system_reserve_bytes: int
    process_bytes: int  # Python and llama.cpp without the model
    tokenizer_bytes: int
    kv_cache_bytes: int
    compute_bytes: int  # llama.cpp logs it as "compute buffer"
    work_bytes: int  # activations rounded for a product; not logged
    output_bytes: int
    weights_bytes: int
    repack_bytes: int  # second copies of weights

    def parts(self) -> dict[str, int]:
        """Return what is held for what, by a name for people, in bytes."""
        return {
            "weights": self.weights_bytes,
            "repacked copies of weights": self.repack_bytes,
            f"{self.kv_type} KV cache of {self.context_tokens} tokens": self.kv_cache_bytes,
            "compute buffer": self.compute_bytes,
            "work buffer": self.work_bytes,
            "output buffer": self.output_bytes,
            "tokenizer": self.tokenizer_bytes,
            "process": self.process_bytes,
            "system reserve": self.system_reserve_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """Everything, the system's reserve included."""
        return sum(self.parts().values())

    @property
    def free_bytes(self) -> int:
        """What is left of the device's memory; negative when the model does not fit."""
        return self.memory_bytes - self.total_bytes


def memory_plan(
    spec: ModelSpec,
    types: TensorTypes,
    file_bytes: int,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
    outputs: int = 1,
) -> MemoryPlan:
    """Return where the memory of a device goes when it runs a model, whether it fits or not.

    Parameters
    ----------
    types
        GGUF name → type of every tensor.
    file_bytes
        Size of the GGUF: its tensors and its header.
    context_tokens, kv_type
        The device's own by default.
    outputs
        Tokens of a batch whose logits are wanted (``n_outputs_max``): 1 to generate, more to measure perplexity.

    Raises
    ------
    DeviceError
        When the context is not positive, or the cache type is unknown or needs flash attention.
    """
    plan = _plan_without_weights(spec.hyperparameters, device, context_tokens, kv_type, outputs)
    copies = resident_bytes(spec, types, device) - data_bytes(spec, types)
    return dataclasses.replace(plan, weights_bytes=file_bytes, repack_bytes=copies)


def weight_budget_bytes(
    hyper: HyperParameters,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
    outputs: int = 1,
) -> int:
    """Return the bytes left for the file and its repacked copies: the limit on header + :func:`resident_bytes`.

    Negative when the context alone does not fit. Arguments and errors as for :func:`memory_plan`.
    """
    return _plan_without_weights(hyper, device, context_tokens, kv_type, outputs).free_bytes


def resident_bytes(spec: ModelSpec, types: TensorTypes, device: DeviceProfile) -> int:
    """Return the bytes of the weights and of the copies llama.cpp makes of them on this device.

    A sum over tensors: the cost of promoting a block is the difference of two calls.

    With mmap, the file's pages and the repacked copy are both counted. Those pages can be evicted, but until
    then the memory is taken. Without it a tensor is read straight into its repacked form, and only a tied
    embedding, needed in both forms, is held twice.
    """
    tied = spec.hyperparameters.tied_embeddings
    total = 0
    for tensor in spec.tensors:
        size = _tensor_bytes(tensor, types)
        multiplied = tensor.role in ("matrix", "head") or (tensor.role == "embedding" and tied)
        copied = multiplied and is_repacked(types[tensor.gguf_name], tensor.shape[0], device)
        total += size * (2 if copied and (device.mmap or tensor.role == "embedding") else 1)
    return total


def is_repacked(kind: TensorType, rows: int, device: DeviceProfile) -> bool:
    """Tell whether llama.cpp interleaves a matrix of that type and number of rows (outputs) on this device."""
    features = device.isa_features
    multiples: dict[TensorType, int] = {}
    if "avx2" in features or "avx512" in features:
        multiples |= _REPACKED_BY_AVX2
    if "avx512" in features:
        multiples |= _REPACKED_BY_AVX512
    if "dotprod" in features or "i8mm" in features:
        multiples |= _REPACKED_BY_NEON
    return device.use_extra_bufts and kind in multiples and rows % multiples[kind] == 0


def kv_cache_bytes(
    hyper: HyperParameters, device: DeviceProfile, context_tokens: int, kv_type: str | None = None
) -> int:
    """Return the bytes of the KV cache: Σ over blocks of cells × (K row + V row).

    A block with a sliding window keeps window + ``n_ubatch`` cells, padded, and never more than the context
    (``swa_full = False``).
    """
    cells, window_cells = _cells(hyper, device, context_tokens)
    row = _cache_type(device, kv_type).tensor_bytes((hyper.n_kv_heads * hyper.head_dim,))
    return sum(2 * row * (window_cells if hyper.block_window(i) else cells) for i in range(hyper.n_blocks))


def largest_context_tokens(
    spec: ModelSpec, types: TensorTypes, file_bytes: int, device: DeviceProfile, *, kv_type: str | None = None
) -> int:
    """Return the largest context that fits, at most what the model was made for; 0 when none does."""
    low, high = 0, -(-spec.hyperparameters.context // CELL_GROUP)  # groups that fit; groups that may
    while low < high:
        middle = (low + high + 1) // 2
        context = middle * CELL_GROUP
        plan = memory_plan(spec, types, file_bytes, device, context_tokens=context, kv_type=kv_type)
        low, high = (middle, high) if plan.free_bytes >= 0 else (low, middle - 1)
    return min(low * CELL_GROUP, spec.hyperparameters.context)


def require_fit(
    spec: ModelSpec,
    types: TensorTypes,
    file_bytes: int,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
) -> MemoryPlan:
    """Return the plan of a model that fits the device. Arguments as for :func:`memory_plan`.

    Raises
    ------
    DeviceError
        When it does not: what is needed for what, and the largest context that would fit.
    """
    plan = memory_plan(spec, types, file_bytes, device, context_tokens=context_tokens, kv_type=kv_type)
    if plan.free_bytes >= 0:
        return plan
    largest = largest_context_tokens(spec, types, file_bytes, device, kv_type=kv_type)
    needs = ", ".join(f"{name} {_mib(size)}" for name, size in plan.parts().items() if size)
    remedy = (
        f"the largest context that fits is {largest} tokens"
        if largest
        else "no context fits: choose fewer bits, a smaller model or a larger device"
    )
    raise DeviceError(
        f"{spec.name} needs {_mib(plan.total_bytes)} ({needs}), but {device.name} has "
        f"{_mib(plan.memory_bytes)}; {remedy}."
    )


def _plan_without_weights(
    hyper: HyperParameters, device: DeviceProfile, context: int | None, kv_type: str | None, outputs: int
) -> MemoryPlan:
    context = device.context_tokens if context is None else context
    if context < 1:
        raise DeviceError(f"A context of {context} tokens is not possible; ask for at least 1.")
    cache_type = _cache_type(device, kv_type)
    cells, window_cells = _cells(hyper, device, context)
    batch = _batch(device, context)
    shape = GraphShape(
        batch=batch,
        outputs=min(outputs, batch),
        cells=cells,
        window_cells=window_cells,
        flash_attention=device.flash_attention,
        quantised_cache=cache_type != TensorType.F16,
    )
    return MemoryPlan(
        device=device.name,
        context_tokens=context,
        kv_type=cache_type.value,
        memory_bytes=device.memory_bytes,
        system_reserve_bytes=device.system_reserve_bytes,
        process_bytes=device.python_process_bytes,
        tokenizer_bytes=hyper.vocabulary * _TOKENIZER_BYTES_PER_TOKEN[hyper.architecture],
        kv_cache_bytes=kv_cache_bytes(hyper, device, context, cache_type),
        compute_bytes=compute_buffer_bytes(hyper, shape),
        work_bytes=_work_buffer_bytes(hyper, device, shape),
        output_bytes=outputs * hyper.vocabulary * _F32_BYTES,
        weights_bytes=0,
        repack_bytes=0,
    )


def _cache_type(device: DeviceProfile, kv_type: str | None) -> TensorType:
    name = kv_type or device.kv_type
    if name not in CACHE_TYPES:
        raise DeviceError(f"KV cache type {name!r} is not one of {', '.join(CACHE_TYPES)}.")
    if name != TensorType.F16 and not device.flash_attention:
        raise DeviceError(
            f"A {name} KV cache needs flash attention, which {device.name} has off; use f16, or turn it on."
        )
    return TensorType(name)


def _batch(device: DeviceProfile, context: int) -> int:
    return min(device.ubatch_tokens, device.batch_tokens, context)


def _cells(hyper: HyperParameters, device: DeviceProfile, context: int) -> tuple[int, int]:
    """Return the KV cells of a block that sees everything and of a sliding one."""
    cells = _grouped(context)
    if hyper.sliding_window is None:
        return cells, cells
    return cells, _grouped(min(cells, hyper.sliding_window + _batch(device, context)))


def _grouped(tokens: int) -> int:
    return -(-tokens // CELL_GROUP) * CELL_GROUP


def _work_buffer_bytes(hyper: HyperParameters, device: DeviceProfile, shape: GraphShape) -> int:
    """Return the largest scratch any operation asks for, with matrices of K-quants."""
    widest = max(hyper.hidden, hyper.ffn, hyper.n_heads * hyper.head_dim)
    product = shape.batch * -(-widest // _Q8_K_WEIGHTS) * _Q8_K_BYTES
    if device.architecture == "x86-64":
        product += device.threads * _TILED_SLOT_BYTES
    if shape.flash_attention:
        tiles = _ATTENTION_TILE * (4 * hyper.head_dim + 2 * _ATTENTION_TILE)
        token = hyper.n_heads * (hyper.head_dim + 2) + 3 * hyper.head_dim
        attention = device.threads * max(tiles, token) * _F32_BYTES
    else:  # the scores, rounded to f16 before they weigh the values
        attention = shape.cells * hyper.n_heads * shape.batch * _F16_BYTES
    return max(product, attention)


def _tensor_bytes(tensor: TensorSpec, types: TensorTypes) -> int:
    return padded(types[tensor.gguf_name].tensor_bytes(tensor.shape))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
