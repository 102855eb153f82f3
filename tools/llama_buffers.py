"""What llama.cpp itself allocates for a file, read from its log: the truth that the memory model is held against.

A file is loaded, or, where it is too large to, only simulated (``no_alloc``): llama.cpp then reads nothing but the
header and plans its buffers without making them, so that a header with an empty (sparse) file behind it is enough.
"""

import ctypes
import dataclasses
import re
from pathlib import Path

import gguf
from llama_cpp import llama_cpp as api

from impq_edge.conversion.metadata import add_hyperparameters
from impq_edge.devices.profile import DeviceProfile
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec

LOGGED_BYTES = 0.0051 * 2**20
"""The log has MiB with two decimals: half of the last, and a little for its own rounding."""

_MIB = 2**20
_SILENT = api.llama_log_callback(lambda *_: None)  # llama.cpp calls the last one set for as long as the process lives
_BUFFER = re.compile(r"(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")
_CACHE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \(")


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Sizes in bytes, each rounded in the log to 0.01 MiB."""

    weights: float  # of the CPU, its repacked copies apart; where simulated, of the whole file
    repacked: float  # where simulated, 0
    kv_cache: float  # of all blocks, wherever they are
    caches: int  # as so many rounded numbers
    compute: float
    output: float
    gpu_weights: float = 0.0
    gpu_kv_cache: float = 0.0
    gpu_compute: float = 0.0


def allocate(path: Path, device: DeviceProfile, outputs: int = 1, *, simulate: bool = False) -> Buffers:
    """Load a file as a device would, or have llama.cpp simulate it, and return its buffers.

    Layers go to the first GPU that llama.cpp knows, if it knows one and the device has layers for it.

    Raises
    ------
    RuntimeError
        With the end of llama.cpp's log, when it refuses.
    """
    lines: list[str] = []
    callback = api.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    api.llama_log_set(callback, ctypes.c_void_p(0))
    model = context = None
    file_weights = 0.0
    try:
        model_parameters = api.llama_model_default_params()
        model_parameters.use_extra_bufts = device.use_extra_bufts
        mapped = device.mmap and not simulate
        model_parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if mapped else api.LLAMA_LOAD_MODE_NONE
        model_parameters.no_alloc = simulate
        model_parameters.n_gpu_layers = device.gpu_layers
        model = api.llama_model_load_from_file(str(path).encode(), model_parameters)
        context = model and api.llama_init_from_model(model, _context_parameters(device, outputs))
        if not context:
            raise RuntimeError("".join(lines[-5:]))
        file_weights = float(api.llama_model_size(model)) if simulate else 0.0
    finally:
        if context:
            api.llama_free(context)
        if model:
            api.llama_model_free(model)
        api.llama_log_set(_SILENT, ctypes.c_void_p(0))
    found = _parsed("".join(lines))
    return dataclasses.replace(found, weights=file_weights) if simulate else found


def _context_parameters(device: DeviceProfile, outputs: int) -> api.llama_context_params:
    parameters = api.llama_context_default_params()
    parameters.n_ctx = device.context_tokens
    parameters.n_batch, parameters.n_ubatch = device.batch_tokens, device.ubatch_tokens
    parameters.n_outputs_max = outputs
    parameters.type_k = parameters.type_v = gguf.GGMLQuantizationType[device.kv_type.upper()].value
    parameters.flash_attn_type = int(device.flash_attention)
    parameters.swa_full = parameters.op_offload = False
    return parameters


def _parsed(log: str) -> Buffers:
    sizes: dict[tuple[str, str], float] = {}
    for name, kind, mib in _BUFFER.findall(log):
        where = "repacked" if name == "CPU_REPACK" else "CPU" if name.startswith("CPU") else "GPU"
        sizes[where, kind] = sizes.get((where, kind), 0.0) + float(mib) * _MIB
    caches = _CACHE.findall(log)
    return Buffers(
        weights=sizes.get(("CPU", "model"), 0.0),
        repacked=sizes.get(("repacked", "model"), 0.0),
        kv_cache=sum(map(float, caches)) * _MIB,
        caches=len(caches),
        compute=sizes.get(("CPU", "compute"), 0.0),
        output=sizes.get(("CPU", "output"), 0.0),
        gpu_weights=sizes.get(("GPU", "model"), 0.0),
        gpu_kv_cache=sizes.get(("GPU", "KV"), 0.0),
        gpu_compute=sizes.get(("GPU", "compute"), 0.0),
    )


def write_hollow(path: Path, spec: ModelSpec, types: TensorTypes) -> Path:
    """Write a GGUF with the header of a model, no vocabulary, and a hole where the weights would be."""
    hyper = spec.hyperparameters
    writer = gguf.GGUFWriter(path, hyper.architecture)
    writer.add_tokenizer_model("no_vocab")
    add_hyperparameters(writer, hyper)
    for tensor in spec.tensors:
        kind = types[tensor.gguf_name]
        size = kind.tensor_bytes(tensor.shape)
        writer.add_tensor_info(tensor.gguf_name, tensor.shape, None, size, raw_dtype=kind.ggml)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = sum(gguf.GGUFWriter.ggml_pad(types[t.gguf_name].tensor_bytes(t.shape), 32) for t in spec.tensors)
    with path.open("r+b") as file:
        file.truncate(gguf.GGUFWriter.ggml_pad(path.stat().st_size, 32) + data)
    return path
