"""Hold the memory model of layers on a GPU against llama.cpp's own allocation, on a machine without a GPU.

    python tools/compare_offload.py --llama-cpp DIR --model ../shared/models/tiny-qwen3 --model …

llama.cpp's RPC backend is a GPU to it, with memory of its own, wherever the other end runs; here that is a second
process on this machine. DIR is llama.cpp's source of the version that is installed (``vendor/llama.cpp`` in the source
distribution of llama-cpp-python), from which that backend is compiled (some seconds). Checkpoints are loaded for real;
published shapes are simulated. Linux only.

One line per model, layers on the GPU, and way of loading: predicted / llama.cpp, in MiB. Weights and caches must agree,
with mmap within 1 %, and the compute buffers, of which each side is given that of the whole graph, be no larger.
"""

import argparse
import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from compare_memory import COMMON, SHAPES, Case, convert, types_of
from llama_buffers import LOGGED_BYTES, Buffers, allocate, write_hollow
from llama_cpp import llama_cpp as api

from impq_edge.devices.memory import MemoryPlan, memory_plan
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import data_bytes
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.validation.synthetic import model_of

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
SIMULATED = ("llama-3.1-8b", "qwen3-0.6b", "gemma-2-2b")
CASES = (Case(4096), Case(4096, flash_attention=False), Case(700, ubatch_tokens=64, kv_type="q8_0"))
_MIB = 2**20
_START_S = 30.0


def main() -> None:
    """Parse the options, start the other end, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source.")
    parser.add_argument("--model", type=Path, action="append", default=[], help="A checkpoint directory, to be loaded.")
    parser.add_argument("--serve", nargs=2, metavar=("LIBRARY", "ENDPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
    if options.llama_cpp is None:
        parser.error("--llama-cpp is needed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        library, endpoint = build(options.llama_cpp, folder), f"127.0.0.1:{free_port()}"
        server = subprocess.Popen([sys.executable, __file__, "--serve", library, endpoint], stdout=subprocess.DEVNULL)
        try:
            connect(library, endpoint)
            good = [show(line) for line in compare(options.model, folder)]
        finally:
            server.kill()
            server.wait()
    print(f"\n{sum(good)} of {len(good)} as predicted.")
    sys.exit(not all(good))


def build(source: Path, folder: Path) -> Path:
    """Compile the RPC backend against the ggml that llama-cpp-python ships."""
    library, ggml = folder / "libggml-rpc.so", source / "ggml"
    subprocess.run(
        [
            os.environ.get("CXX", "g++"), "-O1", "-std=c++17", "-fPIC", "-shared", "-DGGML_SHARED",
            "-DGGML_BACKEND_SHARED", "-DGGML_BACKEND_BUILD", f"-I{ggml}/include", f"-I{ggml}/src",
            f"-I{ggml}/src/ggml-rpc", f"{ggml}/src/ggml-rpc/ggml-rpc.cpp", f"{ggml}/src/ggml-rpc/transport.cpp",
            "-o", str(library), f"-L{LIBRARIES}", "-lggml-base", f"-Wl,-rpath,{LIBRARIES}", "-lpthread",
        ],
        check=True,
    )  # fmt: skip
    return library


def serve(library: str, endpoint: str) -> None:
    """Be the other end: a device that is this machine's CPU. Ends by being killed."""
    ggml, rpc = ctypes.CDLL(str(LIBRARIES / "libggml.so.0")), ctypes.CDLL(library)
    api.llama_backend_init()
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))  # GGML_BACKEND_DEVICE_TYPE_CPU
    one = ctypes.c_size_t(1)  # thread, and device
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, one, one, devices)


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def connect(library: Path, endpoint: str) -> None:
    """Make the other end a GPU of llama.cpp in this process."""
    host, port = endpoint.split(":")
    end = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            break
        except OSError:
            if time.monotonic() > end:
                sys.exit("The RPC server did not start.")
            time.sleep(0.2)
    ggml, rpc = ctypes.CDLL(str(LIBRARIES / "libggml.so.0")), ctypes.CDLL(str(library))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))


Line = tuple[str, Case, MemoryPlan, Buffers, bool]


def compare(models: list[Path], folder: Path) -> Iterator[Line]:
    """Compare checkpoints with their loading, and shapes with their simulation, for several numbers of layers."""
    for directory in models:
        spec, path = read_model(directory), convert(directory, folder)
        for mmap, extra in ((True, False), (False, False), (False, True)):
            for layers in _layers(spec):
                yield _line(spec, path, Case(700, mmap=mmap, use_extra_bufts=extra), layers, simulate=False)
    for name in SIMULATED:
        spec = model_of(name, HyperParameters(**{**COMMON, **SHAPES[name]}))
        path = write_hollow(folder / f"{name}.gguf", spec, types_of(spec))
        for case in CASES:
            for layers in _layers(spec):
                yield _line(spec, path, case, layers, simulate=True)


def _layers(spec: ModelSpec) -> tuple[int, ...]:
    return (0, 1, 2, spec.n_blocks // 2, spec.n_blocks, spec.n_blocks + 1)


def _line(spec: ModelSpec, path: Path, case: Case, layers: int, *, simulate: bool) -> Line:
    device = case.device(gpu="RPC", gpu_layers=layers, gpu_memory_bytes=1 << 45, gpu_reserve_bytes=1)
    types = types_of(spec)
    plan = memory_plan(spec, types, data_bytes(spec, types), device)
    return spec.name, case, plan, allocate(path, device, simulate=simulate), simulate


def show(line: Line) -> bool:
    """Print one comparison; return whether it is as predicted."""
    name, case, plan, found, simulated = line
    sizes = {"compute": (plan.compute_bytes, found.compute), "GPU compute": (plan.gpu_compute_bytes, found.gpu_compute)}
    good = all(allocated <= predicted + LOGGED_BYTES for predicted, allocated in sizes.values())
    if not simulated:  # where nothing is allocated, only the compute buffers are told apart
        held = {
            "weights": (plan.weights_bytes + plan.repack_bytes, found.weights + found.repacked),
            "KV": (plan.kv_cache_bytes, found.kv_cache - found.gpu_kv_cache),
            "GPU weights": (plan.gpu_weights_bytes, found.gpu_weights),
            "GPU KV": (plan.gpu_kv_cache_bytes, found.gpu_kv_cache),
        }
        roundings = 2 * found.caches + 2
        for predicted, allocated in held.values():
            mapped = 0.01 * allocated if case.mmap else 0.0
            good &= abs(predicted - allocated) <= roundings * LOGGED_BYTES + mapped
        sizes = held | sizes
    told = ", ".join(f"{key} {ours / _MIB:.2f} / {theirs / _MIB:.2f}" for key, (ours, theirs) in sizes.items())
    way = f"mmap {case.mmap}, repack {case.use_extra_bufts}, {case.kv_type}, flash attention {case.flash_attention}"
    print(f"{'ok ' if good else 'OFF'} {name}, {plan.gpu_layers} layers, {way}: {told}")
    return good


if __name__ == "__main__":
    main()
