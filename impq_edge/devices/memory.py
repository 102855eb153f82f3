"""What a file occupies when llama.cpp runs it on a device, buffer by buffer.

On the CPU that is exact. Of layers on a GPU weights and KV cache are exact; its compute buffer is taken to be as large
as the CPU's would be for the whole graph, and the CPU keeps that too.

Sources (llama.cpp as vendored in llama-cpp-python 0.3.36): the KV cache from ``src/llama-kv-cache.cpp`` and
``llama-kv-cache-iswa.cpp``, the output buffer from ``llama_context::output_reserve`` (``src/llama-context.cpp``),
the work buffer from ``ggml_graph_plan`` (``ggml/src/ggml-cpu/ggml-cpu.c``), repacking from
``ggml_repack_get_optimal_repack_type`` (``ggml/src/ggml-cpu/repack.cpp``) and what is copied when from
``llama_model_loader`` (``src/llama-model-loader.cpp``).
"""

import dataclasses
from typing import Any, ClassVar, cast, get_args

import pydantic
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from impq_edge.devices.graph import GraphShape, compute_buffer_bytes
from impq_edge.devices.offload import Offload, offload
from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import DeviceError
from impq_edge.ggml.cache import KvType, is_quantised
from impq_edge.ggml.types import TensorType, type_for_row
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import TensorTypes, data_bytes, padded
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import STRICT

CELL_GROUP = 256
"""llama.cpp pads the context to a multiple of this many tokens."""

CACHE_TYPES: tuple[str, ...] = get_args(KvType)

# Vocabulary tables in bytes per token, measured as the growth of anonymous memory over vocabularies of 32k, 128k
# and 256k: 150 per token and 132 per merge. Llama-3 has 2.2 merges a token, Qwen-3 one, Gemma-2's model none.
_TOKENIZER_BYTES_PER_TOKEN = {"llama": 440, "qwen3": 285, "gemma2": 150}
_Q8_K_BYTES, _Q8_K_WEIGHTS = 292, 256  # block_q8_K, to which activations are rounded before a K-quant product
_Q8_1_BYTES, _Q8_1_WEIGHTS = 36, 32  # block_q8_1, or block_q8_0 of 34 bytes, for the older formats
_CACHE_BLOCK = 32  # numbers in a block of every quantised cache type
_LINE_BYTES = 64  # to which threads' slots are aligned
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
    gpu_layers: int = 0  # of this model; the head counts as one
    gpu_memory_bytes: int | None = None  # the GPU's own; None: there is none, or it shares main memory
    gpu_reserve_bytes: int = 0
    gpu_weights_bytes: int = 0  # in its own memory, like the next
    gpu_kv_cache_bytes: int = 0
    gpu_compute_bytes: int = 0  # an allowance: at most what the CPU would need for the whole graph

    def parts(self) -> dict[str, int]:
        """Return what main memory is held for, by a name for people, in bytes."""
        shared = self.gpu_layers > 0 and self.gpu_memory_bytes is None
        return {
            "weights": self.weights_bytes,
            "repacked copies of weights": self.repack_bytes,
            f"{self.kv_type} KV cache of {self.context_tokens} tokens": self.kv_cache_bytes,
            "compute buffer": self.compute_bytes,
            "work buffer": self.work_bytes,
            "output buffer": self.output_bytes,
            "tokenizer": self.tokenizer_bytes,
            "process": self.process_bytes,
            **({"GPU compute buffer": self.gpu_compute_bytes, "GPU driver": self.gpu_reserve_bytes} if shared else {}),
            "system reserve": self.system_reserve_bytes,
        }

    def gpu_parts(self) -> dict[str, int]:
        """Return what a GPU's own memory is held for, in bytes; empty where it has none or no layers."""
        if self.gpu_memory_bytes is None or self.gpu_layers == 0:
            return {}
        return {
            f"weights of {self.gpu_layers} layers": self.gpu_weights_bytes,
            f"their {self.kv_type} KV cache of {self.context_tokens} tokens": self.gpu_kv_cache_bytes,
            "compute buffer": self.gpu_compute_bytes,
            "driver": self.gpu_reserve_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """Everything in main memory, the system's reserve included."""
        return sum(self.parts().values())

    @property
    def free_bytes(self) -> int:
        """What is left of the device's main memory; negative when the model does not fit."""
        return self.memory_bytes - self.total_bytes

    @property
    def gpu_free_bytes(self) -> int | None:
        """What is left of the GPU's own memory, negative when its layers do not fit; None where it has none."""
        return None if self.gpu_memory_bytes is None else self.gpu_memory_bytes - sum(self.gpu_parts().values())

    @property
    def fits(self) -> bool:
        """Whether everything fits, in either memory."""
        return self.free_bytes >= 0 and (self.gpu_free_bytes or 0) >= 0


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
        When the context is not positive, or the cache type is unknown, needs flash attention, or blocks that do not
        divide the heads.
    """
    plan = _plan_without_weights(spec.hyperparameters, device, context_tokens, kv_type, outputs)
    where = offload(spec.hyperparameters, device)
    gone = sum(_tensor_bytes(t, types) for t in spec.tensors if where.leaves(t))
    copies = resident_bytes(spec, types, device) - (data_bytes(spec, types) - gone)
    return dataclasses.replace(
        plan,
        work_bytes=max(plan.work_bytes, _widest_product_bytes(spec, types, _batch(device, plan.context_tokens))),
        weights_bytes=file_bytes - gone,
        repack_bytes=copies,
        gpu_weights_bytes=gpu_resident_bytes(spec, types, device),
    )


def weight_budget_bytes(
    hyper: HyperParameters,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
    outputs: int = 1,
) -> int:
    """Return the bytes of main memory left for the file and its copies: the limit on header + :func:`resident_bytes`.

    Negative when the context alone does not fit. Arguments and errors as for :func:`memory_plan`.
    """
    return _plan_without_weights(hyper, device, context_tokens, kv_type, outputs).free_bytes


def gpu_weight_budget_bytes(
    hyper: HyperParameters,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
    outputs: int = 1,
) -> int | None:
    """Return the bytes of a GPU's own memory left for weights: the limit on :func:`gpu_resident_bytes`.

    None where no layers are on a GPU with memory of its own. Arguments and errors as for :func:`memory_plan`.
    """
    plan = _plan_without_weights(hyper, device, context_tokens, kv_type, outputs)
    return plan.gpu_free_bytes if plan.gpu_parts() else None


def resident_bytes(spec: ModelSpec, types: TensorTypes, device: DeviceProfile) -> int:
    """Return the bytes of main memory for the weights and the copies llama.cpp makes of them on this device.

    A sum over tensors: the cost of promoting a block is the difference of two calls.

    With mmap, the file's pages and the repacked copy are both counted. Those pages can be evicted, but until
    then the memory is taken. Without it a tensor is read straight into its repacked form, and only a tied
    embedding, needed in both forms, is held twice. On a GPU nothing is repacked. Where it shares main memory a tied
    embedding is held twice as well, for the CPU looks it up; where it does not, the GPU's tensors are not counted here,
    but with mmap they are unless all blocks are the GPU's (:meth:`Offload.leaves`).
    """
    where, tied = offload(spec.hyperparameters, device), spec.hyperparameters.tied_embeddings
    total = 0
    for tensor in spec.tensors:
        by_cpu, by_gpu = where.used_by_cpu(tensor), where.used_by_gpu(tensor, tied)
        multiplied = tensor.role in ("matrix", "head") or (tensor.role == "embedding" and tied and not by_gpu)
        repacked = by_cpu and multiplied and is_repacked(types[tensor.gguf_name], tensor.shape[0], device)
        copies = (repacked and (device.mmap or tensor.role == "embedding")) + (by_gpu and by_cpu and not where.apart)
        total += (1 - where.leaves(tensor) + copies) * _tensor_bytes(tensor, types)
    return total


def gpu_resident_bytes(spec: ModelSpec, types: TensorTypes, device: DeviceProfile) -> int:
    """Return the bytes of weights in a GPU's own memory, a sum over tensors; 0 where it shares main memory."""
    where, tied = offload(spec.hyperparameters, device), spec.hyperparameters.tied_embeddings
    return sum(_tensor_bytes(t, types) for t in spec.tensors if where.apart and where.used_by_gpu(t, tied))


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
    return sum(_block_caches_bytes(hyper, device, context_tokens, _cache_type(hyper, device, kv_type)))


def _block_caches_bytes(hyper: HyperParameters, device: DeviceProfile, context: int, kv_type: KvType) -> list[int]:
    cells, window_cells = _cells(hyper, device, context)
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
    row = hyper.n_kv_heads * hyper.head_dim // weights * size
    return [2 * row * (window_cells if hyper.block_window(i) else cells) for i in range(hyper.n_blocks)]


def largest_context_tokens(
    spec: ModelSpec, types: TensorTypes, file_bytes: int, device: DeviceProfile, *, kv_type: str | None = None
) -> int:
    """Return the largest context that fits, at most what the model was made for; 0 when none does."""
    low, high = 0, -(-spec.hyperparameters.context // CELL_GROUP)  # groups that fit; groups that may
    while low < high:
        middle = (low + high + 1) // 2
        context = middle * CELL_GROUP
        plan = memory_plan(spec, types, file_bytes, device, context_tokens=context, kv_type=kv_type)
        low, high = (middle, high) if plan.fits else (low, middle - 1)
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
    if plan.fits:
        return plan
    largest = largest_context_tokens(spec, types, file_bytes, device, kv_type=kv_type)
    remedy = (
        f"the largest context that fits is {largest} tokens"
        if largest
        else "no context fits: choose fewer bits, a smaller model or a larger device"
    )
    held, parts, memory = plan.total_bytes, plan.parts(), "memory"
    if plan.free_bytes >= 0:
        parts, memory = plan.gpu_parts(), "GPU memory"
        held = sum(parts.values())
        layers = largest_gpu_layers(spec, types, file_bytes, device, context_tokens=context_tokens, kv_type=kv_type)
        remedy += f", and with gpu_layers at {layers} this one fits the GPU"
    needs = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
    limit = plan.memory_bytes if memory == "memory" else plan.gpu_memory_bytes
    raise DeviceError(
        f"{spec.name} needs {_mib(held)} of {memory} ({needs}), but {device.name} has {_mib(limit or 0)}; {remedy}."
    )


def largest_gpu_layers(
    spec: ModelSpec,
    types: TensorTypes,
    file_bytes: int,
    device: DeviceProfile,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
) -> int:
    """Return the most layers that a GPU's own memory holds, whether or not main memory holds the rest.

    At most all blocks and the head, as where it shares main memory. Arguments as for :func:`memory_plan`.

    Raises
    ------
    DeviceError
        As :func:`memory_plan`, and when the profile does not say enough of a GPU.
    """
    if device.gpu is None or device.gpu_reserve_bytes is None:
        raise DeviceError(f"{device.name} names no gpu with its gpu_reserve_bytes; add both to a copy of its TOML.")
    low, high = 0, spec.n_blocks + 1
    while low < high:
        middle = (low + high + 1) // 2
        tried = dataclasses.replace(device, gpu_layers=middle)
        plan = memory_plan(spec, types, file_bytes, tried, context_tokens=context_tokens, kv_type=kv_type)
        low, high = (middle, high) if (plan.gpu_free_bytes or 0) >= 0 else (low, middle - 1)
    return low


def _plan_without_weights(
    hyper: HyperParameters, device: DeviceProfile, context: int | None, kv_type: str | None, outputs: int
) -> MemoryPlan:
    context = device.context_tokens if context is None else context
    if context < 1:
        raise DeviceError(f"A context of {context} tokens is not possible; ask for at least 1.")
    cache_type, where = _cache_type(hyper, device, kv_type), offload(hyper, device)
    cells, window_cells = _cells(hyper, device, context)
    batch = _batch(device, context)
    shape = GraphShape(
        batch=batch,
        outputs=min(outputs, batch),
        cells=cells,
        window_cells=window_cells,
        flash_attention=device.flash_attention,
        quantised_cache=is_quantised(cache_type),
        wide_cache=cache_type == "f32",
    )
    compute_bytes = compute_buffer_bytes(hyper, shape)
    caches = _block_caches_bytes(hyper, device, context, cache_type)
    gpu_caches = sum(caches[where.first_block :]) if where.apart else 0
    return MemoryPlan(
        device=device.name,
        context_tokens=context,
        kv_type=cache_type,
        memory_bytes=device.memory_bytes,
        system_reserve_bytes=device.system_reserve_bytes,
        process_bytes=device.python_process_bytes,
        tokenizer_bytes=hyper.vocabulary * _TOKENIZER_BYTES_PER_TOKEN[hyper.architecture],
        kv_cache_bytes=sum(caches) - gpu_caches,
        compute_bytes=compute_bytes,
        work_bytes=_work_buffer_bytes(hyper, device, shape, cache_type),
        output_bytes=outputs * hyper.vocabulary * _F32_BYTES,
        weights_bytes=0,
        repack_bytes=0,
        **(_gpu_parts(device, where, gpu_caches, compute_bytes) if where.layers else {}),
    )


def _gpu_parts(device: DeviceProfile, where: Offload, caches_bytes: int, compute_bytes: int) -> dict[str, Any]:
    return {
        "gpu_layers": where.layers,
        "gpu_memory_bytes": device.gpu_memory_bytes,
        "gpu_reserve_bytes": device.gpu_reserve_bytes or 0,
        "gpu_kv_cache_bytes": caches_bytes,
        "gpu_compute_bytes": compute_bytes,
    }


def _cache_type(hyper: HyperParameters, device: DeviceProfile, kv_type: str | None) -> KvType:
    name = kv_type or device.kv_type
    if name not in CACHE_TYPES:
        raise DeviceError(f"KV cache type {name!r} is not one of {', '.join(CACHE_TYPES)}.")
    if is_quantised(name):
        if not device.flash_attention:
            raise DeviceError(
                f"A {name} KV cache needs flash attention, which {device.name} has off; use f16, or turn it on."
            )
        if hyper.head_dim % _CACHE_BLOCK:
            raise DeviceError(
                f"A {name} KV cache holds blocks of {_CACHE_BLOCK} numbers, which do not divide this model's heads of "
                f"{hyper.head_dim}; use f16."
            )
    return cast(KvType, name)


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


def _work_buffer_bytes(hyper: HyperParameters, device: DeviceProfile, shape: GraphShape, kv_type: KvType) -> int:
    """Return the largest scratch any operation asks for, with matrices of K-quants where rows are whole blocks."""
    rows = (hyper.hidden, hyper.ffn, hyper.n_heads * hyper.head_dim)
    product = shape.batch * max(_activation_bytes(type_for_row(TensorType.Q2_K, row), row) for row in rows)
    if device.architecture == "x86-64":
        product += _LINE_BYTES + device.threads * _TILED_SLOT_BYTES
    if shape.flash_attention:
        tiles = _ATTENTION_TILE * (4 * hyper.head_dim + 2 * _ATTENTION_TILE)
        token = hyper.n_heads * (hyper.head_dim + 2) + 3 * hyper.head_dim
        attention = device.threads * max(tiles, token) * _F32_BYTES
    else:  # the scores, rounded to the cache's type before they weigh the values
        attention = 0 if kv_type == "f32" else shape.cells * hyper.n_heads * shape.batch * _F16_BYTES
    return max(product, attention)


def _widest_product_bytes(spec: ModelSpec, types: TensorTypes, batch: int) -> int:
    """Return the largest scratch of a block's products: F16 and BF16 matrices take more than K-quants."""
    return batch * max(_activation_bytes(types[t.gguf_name], t.shape[-1]) for t in spec.tensors if t.role == "matrix")


def _activation_bytes(kind: TensorType, row: int) -> int:
    """Return the bytes of one token's row, rounded to what a matrix of that type is multiplied with.

    ``vec_dot_type`` of ``type_traits_cpu`` (``ggml/src/ggml-cpu/ggml-cpu.c``).
    """
    if kind == TensorType.F32:
        return 0
    if kind in (TensorType.F16, TensorType.BF16):
        return row * _F16_BYTES
    if kind.block_weights == _Q8_K_WEIGHTS:
        return row // _Q8_K_WEIGHTS * _Q8_K_BYTES
    return row // _Q8_1_WEIGHTS * _Q8_1_BYTES


def _tensor_bytes(tensor: TensorSpec, types: TensorTypes) -> int:
    return padded(types[tensor.gguf_name].tensor_bytes(tensor.shape))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
