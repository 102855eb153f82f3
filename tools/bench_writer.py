"""Time `impq-edge convert` against llama.cpp's own quantiser, and check that both write the same tensors.

    python tools/bench_writer.py --gigabytes 3 --type q2_k --repetitions 3 --threads 2 --out writer.json

Ours starts from sharded safetensors in BF16, llama.cpp's from an F16 GGUF of the same model; both are whole commands
in processes of their own, one after the other in every repetition, with and without the same importance matrix. The
model is of Llama's architecture with random weights, as many blocks of `--hidden` and `--ffn` as `--gigabytes` asks
for. Weights below 2⁻¹⁶ are zeros, so that F16 holds them all as BF16 does.

Prints a table: wall-clock seconds (median), processor seconds, peak resident memory and what of it is above the
largest tensor (in float32), and the ratios of llama.cpp's to ours.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from impq_edge.conversion.imatrix import Imatrix
from impq_edge.data import data_path
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.model.spec import ModelSpec, TensorSpec, read_model

TOOLS = Path(__file__).parent
SHARD_BYTES = 10**9
HEAD_DIM = 64
TINY = 2.0**-16  # BF16 has 8 bits of mantissa, and F16's last is worth 2⁻²⁴
CONVERT = "from impq_edge.cli import main; main()"
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """What one command took."""

    wall_s: float
    cpu_s: float  # user and system, all threads
    peak_rss_bytes: int


def main() -> None:
    """Parse the options, make the model, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="Size of the checkpoint.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--type", default="q2_k", help="Type of the blocks; with q2_k and q4_k the embedding is q6_k.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="Where to work, and to keep the model; a temporary one by default.")
    parser.add_argument("--out", type=Path, help="Where to save the numbers as JSON.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        told = bench(folder, options)
    print(table(told))
    if options.out:
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    if not all(case["same_tensors"] for case in told["cases"]):
        sys.exit("The two files hold different tensors.")


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; return the numbers."""
    model, source, matrix = folder / "model", folder / "f16.gguf", folder / "imatrix.gguf"
    if not source.exists():
        make_checkpoint(model, options)
        spec = read_model(model)
        random_imatrix(spec).write(matrix)
        timed([sys.executable, "-c", CONVERT, "convert", "--model", model, "--type", "f16", "-o", source])
    spec = read_model(model)
    largest = max(tensor.weights for tensor in spec.tensors) * 4
    told: dict[str, Any] = {
        "checkpoint_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "shards": len(list(model.glob("*.safetensors"))),
        "weights": spec.weights,
        "largest_tensor_bytes": largest,
        "type": options.type,
        "threads": options.threads,
        "cases": [],
    }
    for weighed in (None, matrix):
        ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
        runs: dict[str, list[Run]] = {"ours": [], "llama.cpp": []}
        for _ in range(options.repetitions):
            for path in folder.glob("ours.*"):  # convert keeps a file that is there already
                path.unlink()
            for name, command in (
                ("ours", our_command(model, ours, weighed, options)),
                ("llama.cpp", their_command(source, theirs, weighed, options)),
            ):
                runs[name].append(timed(command))
                print(f"{'with' if weighed else 'without'} importance, {name}: {runs[name][-1]}", file=sys.stderr)
        told["cases"].append(
            {
                "importance": weighed is not None,
                "same_tensors": same_tensors(ours, theirs),
                "file_bytes": ours.stat().st_size,
                **{name: [dataclasses.asdict(run) for run in done] for name, done in runs.items()},
            }
        )
    return told


def our_command(model: Path, out: Path, matrix: Path | None, options: argparse.Namespace) -> list[Any]:
    """Return the command that converts safetensors."""
    base = ["--model", model, "--type", options.type, "--threads", options.threads, "-o", out]
    weighed = ["--encode", "rtn"] if matrix is None else ["--imatrix", matrix]
    return [sys.executable, "-c", CONVERT, "convert", *base, *weighed]


def their_command(source: Path, out: Path, matrix: Path | None, options: argparse.Namespace) -> list[Any]:
    """Return the command that has llama.cpp quantise a GGUF."""
    weighed = [] if matrix is None else ["--imatrix", matrix]
    outer = ["--tensor-type", "token_embd=q6_k"] if TensorType(options.type) in BLOCK_TYPES.values() else []
    return [
        sys.executable, TOOLS / "llama_quantize.py", source, out, "--type", file_type(options.type), "--pure",
        *outer, "--threads", options.threads, *weighed,
    ]  # fmt: skip


def file_type(kind: str) -> str:
    """Return the file type of llama.cpp whose pure form is all of one type."""
    return {"q4_k": "Q4_K_S", "f32": "F32"}.get(kind, kind.upper())


MEASURE = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(json.dumps([time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def timed(command: list[Any]) -> Run:
    """Run a command in a process of its own, below a small one: its peak memory begins as its parent's."""
    arguments = [str(part) for part in command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *arguments], env=environment, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(f"A command ended with status {done.returncode}: {' '.join(arguments)}")
    wall_s, cpu_s, peak = json.loads(done.stdout)
    return Run(wall_s, cpu_s, peak)


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether two GGUFs hold the same tensors to the byte."""
    first, second = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    return first.keys() == second.keys() and all(
        first[name].tensor_type == second[name].tensor_type and np.array_equal(first[name].data, second[name].data)
        for name in first
    )


def table(told: dict[str, Any]) -> str:
    """Lay the numbers out."""
    lines = [
        f"{told['checkpoint_bytes'] / 1e9:.2f} GB in {told['shards']} shards, {told['weights'] / 1e9:.2f} billion "
        f"weights to {told['type']}, {told['threads']} threads",
        "",
        "| importance | command | wall s | CPU s | peak MiB | above the largest tensor, MiB | same tensors |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in told["cases"]:
        middle = {name: _middle(case[name]) for name in ("ours", "llama.cpp")}
        for name, (wall_s, cpu_s, peak) in middle.items():
            above = (peak - told["largest_tensor_bytes"]) / _MIB
            lines.append(
                f"| {'yes' if case['importance'] else 'no'} | {name} | {wall_s:.1f} | {cpu_s:.1f} | {peak / _MIB:.0f} "
                f"| {above:.0f} | {'yes' if case['same_tensors'] else 'NO'} |"
            )
        wall, cpu, _ = (b / a for a, b in zip(middle["ours"], middle["llama.cpp"], strict=True))
        lines.append(f"| | llama.cpp / ours | {wall:.2f} | {cpu:.2f} | | | |")
    return "\n".join(lines)


def _middle(runs: list[dict[str, Any]]) -> tuple[float, float, float]:
    wall_s, cpu_s = (statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s"))
    return wall_s, cpu_s, max(run["peak_rss_bytes"] for run in runs)


def random_imatrix(spec: ModelSpec) -> Imatrix:
    """Return importances as skewed as activations are: a few columns count a thousand times as much as most."""
    rng = np.random.default_rng(1)

    def squares(tensor: TensorSpec) -> NDArray[np.float64]:
        return rng.lognormal(sigma=2, size=tensor.shape[-1])

    matrices = {tensor.gguf_name: squares(tensor) for tensor in spec.tensors if tensor.role == "matrix"}
    return Imatrix.dense(matrices, 1, datasets=["random"], chunk_count=1, chunk_tokens=1)


def make_checkpoint(directory: Path, options: argparse.Namespace) -> None:
    """Write shards of about a gigabyte, one in memory at a time, with their index."""
    hidden, ffn, heads = options.hidden, options.ffn, options.hidden // HEAD_DIM
    kv = HEAD_DIM * max(1, heads // 4)
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    embedding_bytes = 2 * options.vocabulary * hidden
    block_bytes = 2 * sum(int(np.prod(shape)) for shape in block.values())
    blocks = max(1, round((options.gigabytes * 1e9 - embedding_bytes) / block_bytes))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (options.vocabulary, hidden)}
    for index in range(blocks):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    directory.mkdir(parents=True)
    save_shards(shapes, directory)
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": ffn,
                "num_hidden_layers": blocks,
                "num_attention_heads": heads,
                "num_key_value_heads": max(1, heads // 4),
                "head_dim": HEAD_DIM,
                "vocab_size": options.vocabulary,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": True,
                "torch_dtype": "bfloat16",
            }
        )
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_path("demo", "tiny-llama3") / file, directory / file)


def save_shards(shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Fill shards in the order of the tensors and name them as the hub does."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if parts[-1] and used + size > SHARD_BYTES:
            parts.append({})
            used = 0
        parts[-1][name] = shape
        used += size
    weight_map: dict[str, str] = {}
    torch.manual_seed(0)
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: random_weights(shape) for name, shape in part.items()}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_weights(shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal weights, around one for a norm, as BF16 that F16 holds too."""
    drawn = torch.normal(1.0 if len(shape) == 1 else 0.0, 0.02, shape).bfloat16()
    return torch.where(drawn.abs() < TINY, torch.zeros_like(drawn), drawn)


if __name__ == "__main__":
    main()
