"""Hold the memory model against llama.cpp's own allocation, and against the peak memory of real runs.

    python tools/compare_memory.py                               # the published shapes, simulated: nothing is loaded
    python tools/compare_memory.py --model ../shared/models/tiny-qwen3 --contexts 512,2048      # a checkpoint, loaded
    python tools/compare_memory.py --model DIR --peaks --contexts 512,8192      # … and run with its context filled

One line per case: shape × context × physical batch × cache type × flash attention × outputs; of every buffer what is
predicted and what llama.cpp says, in MiB, and predicted / llama.cpp of the total and of the buffer that is furthest
off. A shape has Q4_K blocks and a Q6_K embedding. Sizes that agree to the 0.01 MiB of llama.cpp's log count as equal.
The worst is told at the end, and the status is 1 where something is off by more than 2 %, or 1 % too low.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_buffers import LOGGED_BYTES, Buffers, allocate, write_hollow
from llama_cpp import llama_cpp as api

import impq_edge
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import DeviceProfile
from impq_edge.ggml.cache import is_quantised
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters, Llama3Rope
from impq_edge.model.recipe import TensorTypes, data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec, read_model
from impq_edge.validation.process import run_child
from impq_edge.validation.settings import RunSettings
from impq_edge.validation.synthetic import model_of

OVER, UNDER = 0.02, 0.01
"""What is tolerated: 2 % too much, 1 % too little."""

_MIB = 2**20
_LLAMA: dict[str, Any] = {"architecture": "llama", "context": 131072, "rope_scaling": Llama3Rope(32, 1, 4, 8192)}
_QWEN3: dict[str, Any] = {"architecture": "qwen3", "context": 40960, "head_dim": 128, "vocabulary": 151936}
_GEMMA2: dict[str, Any] = {
    "architecture": "gemma2", "context": 8192, "head_dim": 256, "vocabulary": 256000, "sliding_window": 4096,
    "attention_softcap": 50.0, "final_softcap": 30.0, "tied_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    name: {
        **base, "n_blocks": blocks, "hidden": hidden, "ffn": ffn, "n_heads": heads, "n_kv_heads": kv, **rest,
    }
    for name, base, blocks, hidden, ffn, heads, kv, rest in (
        ("smollm2-135m", _LLAMA, 30, 576, 1536, 9, 3,
         {"head_dim": 64, "vocabulary": 49152, "context": 8192, "tied_embeddings": True, "rope_scaling": None}),
        ("llama-3.2-1b", _LLAMA, 16, 2048, 8192, 32, 8,
         {"head_dim": 64, "vocabulary": 128256, "tied_embeddings": True}),
        ("llama-3.2-3b", _LLAMA, 28, 3072, 8192, 24, 8,
         {"head_dim": 128, "vocabulary": 128256, "tied_embeddings": True}),
        ("llama-3.1-8b", _LLAMA, 32, 4096, 14336, 32, 8,
         {"head_dim": 128, "vocabulary": 128256, "tied_embeddings": False, "rope_scaling": Llama3Rope(8, 1, 4, 8192)}),
        ("qwen3-0.6b", _QWEN3, 28, 1024, 3072, 16, 8, {"tied_embeddings": True}),
        ("qwen3-8b", _QWEN3, 36, 4096, 12288, 32, 8, {"tied_embeddings": False}),
        ("gemma-2-2b", _GEMMA2, 26, 2304, 9216, 8, 4, {}),
        ("gemma-2-9b", _GEMMA2, 42, 3584, 14336, 16, 8, {}),
    )
}  # fmt: skip
"""Published shapes: blocks, hidden size, feed-forward size, heads, KV heads (config.json of each model)."""

COMMON: dict[str, Any] = {
    "rms_epsilon": 1e-5, "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False, "sliding_window": None,
    "attention_softcap": None, "final_softcap": None,
}  # fmt: skip
_BUFFERS = ("weights", "kv_cache", "compute", "output")


@dataclasses.dataclass(frozen=True)
class Case:
    """How a model is run."""

    context_tokens: int
    ubatch_tokens: int = 512
    kv_type: str = "f16"
    flash_attention: bool = True
    outputs: int = 1
    mmap: bool = True
    use_extra_bufts: bool = False

    def device(self, **changes: Any) -> DeviceProfile:
        """Return this machine's processor with memory enough for anything, and these settings."""
        settings = {key: value for key, value in dataclasses.asdict(self).items() if key != "outputs"}
        threads = len(os.sched_getaffinity(0))
        device = DeviceProfile(
            name="here", title="Here", memory_bytes=1 << 45, system_reserve_bytes=1, cores=threads, threads=threads,
            isa=isa_of_this_build(), memory_bandwidth_bytes_per_s=1e10, batch_tokens=max(512, self.ubatch_tokens),
            **settings,
        )  # fmt: skip
        return dataclasses.replace(device, **changes)


@dataclasses.dataclass(frozen=True)
class Row:
    """One case: what was predicted and what llama.cpp allocates, in bytes."""

    model: str
    case: Case
    predicted: dict[str, int]
    allocated: dict[str, float]
    ratios: dict[str, float]  # predicted / allocated, of each buffer and of the total; 1 where the log cannot tell

    @property
    def worst(self) -> str:
        """The buffer, or the total, that is furthest off."""
        return max(self.ratios, key=lambda name: abs(self.ratios[name] - 1))


def main() -> None:
    """Parse the options, compare, print."""
    options = _options()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # speed is not measured, and another process may be busy
    rows, peaks = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for directory in options.model:
            path = convert(directory, folder)
            rows += compare_loaded(directory, path, options)
            peaks += [peak(read_model(directory), path, case) for case in _run_cases(options)] if options.peaks else []
        for name in options.shapes:
            rows += compare_shape(name, folder, options)
    if options.json:
        print(json.dumps({"rows": [_told(row) for row in rows], "peaks": peaks}, indent=1))
    else:
        print(table(rows) + (peak_table(peaks) if peaks else ""))
    if any(not within(ratio) for row in rows for ratio in row.ratios.values()):
        sys.exit("The memory model is off by more than it may be.")
    if any(p["predicted_bytes"] < p["peak_rss_bytes"] for p in peaks):
        sys.exit("A run took more memory than was predicted.")


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="A checkpoint directory, to be loaded.")
    parser.add_argument("--shapes", help=f"Of {','.join(SHAPES)}; all by default, none with --model.")
    parser.add_argument("--contexts", type=numbers, default=[256, 2048, 8192, 32768], metavar="TOKENS,…")
    parser.add_argument("--ubatches", type=numbers, default=[64, 512], metavar="TOKENS,…")
    parser.add_argument("--outputs", type=numbers, default=[1], metavar="TOKENS,…")
    parser.add_argument("--kv-types", default="f16,q8_0,q4_0", metavar="TYPE,…")
    parser.add_argument("--peaks", action="store_true", help="Run each --model too, and measure its peak memory.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args()
    options.shapes = [*SHAPES] if options.shapes is None and not options.model else (options.shapes or "").split(",")
    options.shapes = [name for name in options.shapes if name]
    options.kv_types = options.kv_types.split(",")
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Return every combination that llama.cpp accepts."""
    for context, ubatch, kv_type, flash, outputs in itertools.product(
        options.contexts, options.ubatches, options.kv_types, (True, False), options.outputs
    ):
        if outputs <= min(ubatch, context) and (flash or not is_quantised(kv_type)):
            yield Case(context, ubatch, kv_type, flash, outputs)


def compare_shape(name: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    """Compare a published shape with llama.cpp's simulation of it."""
    spec = model_of(name, HyperParameters(**{**COMMON, **SHAPES[name]}))
    types = tensor_types(spec, [TensorType.Q4_K] * spec.n_blocks, TensorType.Q6_K)
    path = write_hollow(folder / f"{name}.gguf", spec, types)
    rows = [
        row(spec, types, case, allocate(path, case.device(), case.outputs, simulate=True)) for case in cases(options)
    ]
    path.unlink()
    return rows


def compare_loaded(directory: Path, path: Path, options: argparse.Namespace) -> list[Row]:
    """Compare a checkpoint's file with what llama.cpp allocates when it loads it, mapped or not, repacked or not."""
    spec = read_model(directory)
    types = types_of(spec)
    rows = []
    for case, mmap, extra in itertools.product(cases(options), (True, False), (True, False)):
        how = dataclasses.replace(case, mmap=mmap, use_extra_bufts=extra)
        rows.append(row(spec, types, how, allocate(path, how.device(), how.outputs)))
    return rows


def types_of(spec: ModelSpec) -> TensorTypes:
    """Return the types of what :func:`convert` writes."""
    return tensor_types(spec, [TensorType.Q4_K] * spec.n_blocks, TensorType.Q6_K)


def convert(directory: Path, folder: Path) -> Path:
    """Write a checkpoint as a GGUF of Q4_K blocks."""
    path = folder / f"{directory.resolve().name}.gguf"
    impq_edge.convert(str(directory), type="q4_k", out=path, encode=EncodeOptions("rtn"), allow_fallback=True)
    return path


def row(spec: ModelSpec, types: TensorTypes, case: Case, found: Buffers) -> Row:
    """Compare one case. The file's header is left out: llama.cpp's buffers hold tensors alone."""
    plan = memory_plan(spec, types, data_bytes(spec, types), case.device(), outputs=case.outputs)
    predicted = {
        "weights": plan.weights_bytes + plan.repack_bytes,
        "kv_cache": plan.kv_cache_bytes,
        "compute": plan.compute_bytes,
        "output": plan.output_bytes,
    }
    allocated = {
        "weights": found.weights + found.repacked,
        "kv_cache": found.kv_cache,
        "compute": found.compute,
        # The first batch that asks for more makes the buffer larger (output_reserve in llama.cpp): by as many rows.
        "output": found.output * case.outputs,
    }
    numbers = {"weights": 2, "kv_cache": found.caches, "compute": 1, "output": case.outputs}
    ratios = {name: _ratio(predicted[name], allocated[name], numbers[name]) for name in _BUFFERS}
    predicted["total"], allocated["total"] = sum(predicted.values()), sum(allocated.values())
    ratios["total"] = _ratio(predicted["total"], allocated["total"], sum(numbers.values()))
    return Row(spec.name, case, predicted, allocated, ratios)


def _ratio(predicted: int, allocated: float, rounded: int) -> float:
    """Return 1 where the difference is what the rounding of so many logged numbers can make."""
    return 1.0 if abs(predicted - allocated) <= rounded * LOGGED_BYTES else predicted / allocated


def within(ratio: float) -> bool:
    """Whether a prediction is as near as it must be."""
    return 1 - UNDER <= ratio <= 1 + OVER


def _run_cases(options: argparse.Namespace) -> Iterator[Case]:
    for context, kv_type in itertools.product(options.contexts, options.kv_types):
        for mmap, extra in ((True, False), (False, True)):
            yield Case(context, kv_type=kv_type, mmap=mmap, use_extra_bufts=extra)


def peak(spec: ModelSpec, path: Path, case: Case, fill_s: float = 1800.0) -> dict[str, Any]:
    """Run a file with its context filled, as ``impq-edge validate`` does, and compare its peak with the plan.

    The plan counts a parent process that waits for it as well (31 MiB of PYTHON_PROCESS_BYTES), the peak does not.
    """
    device = case.device()
    plan = memory_plan(spec, types_of(spec), path.stat().st_size, device)
    settings = RunSettings(
        case.context_tokens, device.threads, ubatch_tokens=case.ubatch_tokens, kv_type=case.kv_type,  # type: ignore[arg-type]
        flash_attention=case.flash_attention, use_extra_bufts=case.use_extra_bufts, mmap=case.mmap,
    )  # fmt: skip
    done = run_child(
        {
            "kind": "run", "file": str(path), "settings": dataclasses.asdict(settings), "generated_tokens": 8,
            "repetitions": 1, "chat_tokens": 8, "fill_s": fill_s,
        },
        timeout_s=3600.0,
    )  # fmt: skip
    predicted = plan.total_bytes - plan.system_reserve_bytes
    return {
        "model": spec.name,
        **dataclasses.asdict(case),
        "filled_tokens": done["filled_tokens"],
        "predicted_bytes": predicted,
        "peak_rss_bytes": done["peak_rss_bytes"],
        "ratio": predicted / done["peak_rss_bytes"],
        "over_bytes": predicted - done["peak_rss_bytes"],
    }


def isa_of_this_build() -> str:
    """Return what the installed llama.cpp was compiled for, as a profile would say it."""
    info = api.llama_print_system_info().decode()
    if "NEON = 1" in info:
        features, base = {"DOTPROD": "dotprod", "MATMUL_INT8": "i8mm"}, "aarch64"
    else:
        features, base = {"AVX2": "avx2", "AVX512": "avx512"}, "x86-64"
    return "".join([base, *(f"+{ours}" for theirs, ours in features.items() if f"{theirs} = 1" in info)])


def _told(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "worst": row.worst}


def table(rows: list[Row]) -> str:
    """Lay the comparison out."""
    lines = [
        "| model | context | ubatch | cache | flash | outputs | mmap | repack | weights | KV cache | compute | output "
        "| total | total, ratio | worst buffer |",
        "|---|---:|---:|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in rows:
        case = one.case
        sizes = [f"{one.predicted[n] / _MIB:.2f} / {one.allocated[n] / _MIB:.2f}" for n in (*_BUFFERS, "total")]
        flags = [_yes(case.flash_attention), str(case.outputs), _yes(case.mmap), _yes(case.use_extra_bufts)]
        cells = [one.model, str(case.context_tokens), str(case.ubatch_tokens), case.kv_type, *flags, *sizes]
        cells += [f"{one.ratios['total']:.5f}", f"{one.worst} {one.ratios[one.worst]:.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _verdict(rows)])


def _verdict(rows: list[Row]) -> str:
    if not rows:
        return ""
    ratios = {f"{r.model}, {r.case}, {name}": ratio for r in rows for name, ratio in r.ratios.items()}
    high, low = max(ratios, key=lambda key: ratios[key]), min(ratios, key=lambda key: ratios[key])
    exact = sum(all(ratio == 1 for ratio in r.ratios.values()) for r in rows)
    return (
        f"{len(rows)} cases (predicted / llama.cpp, MiB); {exact} agree to the log's last digit in every buffer.\n"
        f"Highest ratio {ratios[high]:.5f} ({high}).\nLowest ratio {ratios[low]:.5f} ({low})."
    )


def peak_table(peaks: list[dict[str, Any]]) -> str:
    """Lay the peaks out."""
    lines = [
        "\n\n| model | context | filled | cache | mmap | repack | predicted, MiB | peak, MiB | ratio |",
        "|---|---:|---:|---|---|---|---:|---:|---:|",
    ]
    for p in peaks:
        cells = [p["model"], p["context_tokens"], p["filled_tokens"], p["kv_type"], _yes(p["mmap"]),
                 _yes(p["use_extra_bufts"]), f"{p['predicted_bytes'] / _MIB:.1f}", f"{p['peak_rss_bytes'] / _MIB:.1f}",
                 f"{p['ratio']:.3f}"]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
