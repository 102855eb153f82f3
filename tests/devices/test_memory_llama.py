"""The memory plan against the buffers llama.cpp itself reports for files it has loaded."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as api

from impq_edge.devices.memory import MemoryPlan, memory_plan
from impq_edge.devices.profile import DeviceProfile
from impq_edge.ggml.types import TensorType
from impq_edge.model.recipe import tensor_types
from impq_edge.model.spec import ModelSpec, read_model

MakeDevice = Callable[..., DeviceProfile]
LOGGED_MIB = 0.0051  # half of the log's last decimal, and a little for its own rounding
_SILENT = api.llama_log_callback(lambda *_: None)  # llama.cpp calls the last one set for as long as the process lives
_CACHE_TYPES = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}


def buffers_mib(path: Path, device: DeviceProfile, outputs: int = 1) -> dict[str, float]:
    """Load a file as the device would; return the size of each kind of buffer from llama.cpp's log."""
    lines: list[str] = []
    callback = api.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        model_parameters = api.llama_model_default_params()
        model_parameters.use_extra_bufts = device.use_extra_bufts
        model_parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if device.mmap else api.LLAMA_LOAD_MODE_NONE
        model = api.llama_model_load_from_file(str(path).encode(), model_parameters)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = device.context_tokens
        parameters.n_batch, parameters.n_ubatch = device.batch_tokens, device.ubatch_tokens
        parameters.n_outputs_max = outputs
        parameters.type_k = parameters.type_v = _CACHE_TYPES[device.kv_type]
        parameters.flash_attn_type = int(device.flash_attention)
        parameters.swa_full = False
        context = api.llama_init_from_model(model, parameters)
        assert context, "".join(lines[-5:])
        api.llama_free(context)
        api.llama_model_free(model)
    finally:
        api.llama_log_set(_SILENT, ctypes.c_void_p(0))
    found = re.findall(
        r"(\S+) (model|KV|compute|output) buffer size = +([\d.]+) MiB", re.sub(r"  +", " ", "".join(lines))
    )
    sizes: dict[str, float] = {}
    for buffer, kind, size in found:
        name = "repack" if buffer == "CPU_REPACK" else kind
        sizes[name] = sizes.get(name, 0.0) + float(size)
    return sizes


def plan_for(spec: ModelSpec, path: Path, kind: TensorType, device: DeviceProfile, outputs: int = 1) -> MemoryPlan:
    outer = kind if kind == TensorType.F16 else TensorType.Q6_K
    types = tensor_types(spec, [kind] * spec.n_blocks, outer)
    return memory_plan(spec, types, path.stat().st_size, device, outputs=outputs)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize(("flash_attention", "kv_type"), [(True, "f16"), (True, "q8_0"), (False, "f16")])
@pytest.mark.parametrize(
    ("context", "batch", "outputs"), [(256, 64, 1), (700, 512, 1), (2048, 512, 1), (300, 512, 1), (2048, 128, 128)]
)
def test_the_buffers_are_what_llama_cpp_allocates(
    checkpoints: dict[str, Path], tiny_ggufs: dict[str, Path], make_device: MakeDevice, architecture: str,
    flash_attention: bool, kv_type: str, context: int, batch: int, outputs: int,
) -> None:  # fmt: skip
    device = make_device(
        context_tokens=context,
        batch_tokens=batch,
        ubatch_tokens=batch,
        flash_attention=flash_attention,
        kv_type=kv_type,
    )
    path = tiny_ggufs[architecture]
    logged = buffers_mib(path, device, outputs)
    plan = plan_for(read_model(checkpoints[architecture]), path, TensorType.F16, device, outputs)
    caches = 2 if architecture == "gemma2" else 1  # each cache is rounded in the log
    assert plan.kv_cache_bytes / 2**20 == pytest.approx(logged["KV"], abs=caches * LOGGED_MIB)
    assert plan.compute_bytes / 2**20 == pytest.approx(logged["compute"], abs=LOGGED_MIB)
    if outputs == 1:  # the buffer for more is made by the first batch that asks for them
        assert plan.output_bytes / 2**20 == pytest.approx(logged["output"], abs=LOGGED_MIB)


@pytest.mark.parametrize("use_extra_bufts", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_the_copies_are_what_llama_cpp_repacks(
    demo: Path, demo_gguf: Path, make_device: MakeDevice, use_extra_bufts: bool, mmap: bool
) -> None:
    device = make_device(isa=isa_of_this_build(), mmap=mmap, use_extra_bufts=use_extra_bufts)
    logged = buffers_mib(demo_gguf, device)
    plan = plan_for(read_model(demo), demo_gguf, TensorType.Q4_K, device)
    repacked = logged.get("repack", 0.0)
    if mmap:
        assert plan.repack_bytes / 2**20 == pytest.approx(repacked, abs=LOGGED_MIB)
    else:  # what exists only repacked is no copy
        held = logged["model"] + repacked
        header_mib = 1.0  # metadata is no tensor; the rest is exact
        assert (plan.weights_bytes + plan.repack_bytes) / 2**20 == pytest.approx(held, abs=header_mib)


def isa_of_this_build() -> str:
    """Return what the installed llama.cpp was compiled for, as a profile would say it."""
    info = api.llama_print_system_info().decode()
    if "NEON = 1" in info:
        features = {"DOTPROD": "dotprod", "MATMUL_INT8": "i8mm"}
        return "".join(["aarch64", *(f"+{ours}" for theirs, ours in features.items() if f"{theirs} = 1" in info)])
    features = {"AVX2": "avx2", "AVX512": "avx512"}
    return "".join(["x86-64", *(f"+{ours}" for theirs, ours in features.items() if f"{theirs} = 1" in info)])
