"""Time the game on a model of a given shape with random weights, beside a large matrix product in the same run.

    python tools/bench_spqe.py --shape llama-3.1-8b --evaluations 100 --backends kquant hqq

Prints one JSON object: evaluations per second, model FLOP/s as a share of the matrix product's, the mean share of
blocks recomputed, seconds to quantise one block per backend (both versions), and peak GPU memory. Weights are random:
arithmetic and memory do not depend on their values. What is extrapolated is marked so.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import transformers

from impq_edge.backends import BITS, load_backend
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.spqe.game import Game, copy_sharing_vectors
from impq_edge.spqe.sampling import evaluation_order, permutations

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192,
    },
}  # fmt: skip


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--backends", nargs="*", default=["kquant", "hqq"])
    parser.add_argument("--quantised-blocks", type=int, default=2)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(SHAPES[options.shape], device)
    result: dict[str, Any] = {"shape": options.shape, "device": device_name(device), "torch": torch.__version__}
    result["matrix_flop_per_s"] = matrix_flop_per_s(device)
    result["quantise_s_per_block"] = {
        name: quantise_seconds(model, name, options.quantised_blocks) for name in options.backends
    }
    windows = np.random.default_rng(0).integers(
        0, SHAPES[options.shape]["vocab_size"], size=(options.tokens // options.window_tokens, options.window_tokens)
    )
    result |= play(model, options.shape, windows, options.evaluations, result["matrix_flop_per_s"])
    if device == "cuda":
        result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result, indent=1))


def random_model(shape: dict[str, int], device: str) -> Any:
    """Build a llama of that shape on the device, in the game's dtype there."""
    config = transformers.LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
        finally:
            torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def spec_of(name: str) -> ModelSpec:
    """Return a record with the shapes that the game needs."""
    shape = SHAPES[name]
    hidden, ffn, heads, kv = (
        shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    hyper = HyperParameters(
        architecture="llama", n_blocks=shape["num_hidden_layers"], hidden=hidden, ffn=ffn, n_heads=heads,
        n_kv_heads=kv, head_dim=hidden // heads, vocabulary=shape["vocab_size"], context=8192, rms_epsilon=1e-6,
        rope_theta=10000.0, rope_scaling=None, tied_embeddings=False, attention_bias=False, sliding_window=None,
        attention_softcap=None, final_softcap=None,
    )  # fmt: skip
    matrices = tuple(
        TensorSpec(gguf, gguf, shape_, "matrix", int(gguf.split(".")[1]), None)
        for gguf, shape_ in hyper.expected_shapes().items()
        if gguf.startswith("blk.") and len(shape_) == 2
    )
    return ModelSpec(name, hyper, matrices, "random weights")


def play(model: Any, shape: str, windows: np.ndarray, evaluations: int, matrix: float) -> dict[str, Any]:
    """Time permutation walks; both versions of a block are copies of the same random weights."""
    spec = spec_of(shape)
    game = Game(model, spec, windows)
    game.use_blocks([dict.fromkeys(BITS, layer) | {2: copy_sharing_vectors(layer)} for layer in model.model.layers])
    orders = permutations(spec.n_blocks, evaluations // (spec.n_blocks - 1) + 1, seed=0)
    wanted = evaluation_order(orders)[: evaluations + 3]
    for coalition in wanted[:3]:  # all at 4, all at 2, and a first step, to warm up
        game.losses(coalition)
    game.blocks_computed = game.evaluations = 0
    start = time.perf_counter()
    for coalition in wanted[3:]:
        game.losses(coalition)  # ends on the CPU, and so waits for the device
    seconds = time.perf_counter() - start
    tokens = windows.size
    per_block = sum(tensor.weights for tensor in spec.tensors) / spec.n_blocks
    attention = 2 * windows.shape[1] * spec.hyperparameters.n_heads * spec.hyperparameters.head_dim  # causal: half of 4
    head = spec.hyperparameters.hidden * spec.hyperparameters.vocabulary
    flop = tokens * (game.blocks_computed * (2 * per_block + attention) + game.evaluations * 2 * head)
    rate = game.evaluations / seconds
    return {
        "tokens": tokens,
        "evaluations": game.evaluations,
        "evaluations_per_s": rate,
        "recomputed_share": game.recomputed_share,
        "model_flop_per_s": flop / seconds,
        "share_of_matrix_rate": flop / seconds / matrix,
        "extrapolated_s_for_960_evaluations": 960 / rate,
    }


def quantise_seconds(model: Any, name: str, blocks: int) -> float:
    """Return the seconds per block to make both versions of its matrices, without reading a checkpoint."""
    backend = load_backend(name)
    matrices = [
        [parameter.float() for parameter in layer.parameters() if parameter.dim() == 2]
        for layer in model.model.layers[:blocks]
    ]
    backend.quantise(matrices[0][0], 2)  # libraries compile and allocate on first use
    start = time.perf_counter()
    for block in matrices:
        for weight in block:
            for bits in BITS:
                float(backend.quantise(weight, bits).weight[0, 0])
    return (time.perf_counter() - start) / blocks


def matrix_flop_per_s(device: str) -> float:
    """Return the rate of a large product in the game's dtype on random data: the median of ten."""
    size = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for _ in range(13):
        start = time.perf_counter()
        float((left @ right)[0, 0])
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return float(np.median(rates[3:]))


def device_name(device: str) -> str:
    """Name the processor that the game runs on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
