"""Time the game on a model of a given shape with random weights, beside a large matrix product in the same run.

    python tools/bench_spqe.py --shape llama-3.1-8b --evaluations 100 --backends kquant hqq quanto gptq

Prints one JSON object: evaluations per second, model FLOP/s as a share of the matrix product's, the mean share of
blocks recomputed on permutation walks and on sorted complement pairs, seconds to quantise one block per backend (both
versions), and GPU memory against the model's size. Weights are random: arithmetic and memory do not depend on their
values. What is extrapolated is named so. ``--resident N`` keeps only N blocks on the GPU and streams the others.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from impq_edge.backends import BITS, NAMES, Bits, Inputs, Statistics, Stored, load_backend
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.spqe.game import Game
from impq_edge.spqe.observe import Observer
from impq_edge.spqe.sampling import Coalition, Estimator, draws, draws_for, evaluation_order
from impq_edge.spqe.walk import Walk

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "smollm2-135m": {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "tiny": {
        "num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192,
    },
}  # fmt: skip


HUB_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
PROFILE_EVALUATIONS = 960
"""What the aim is stated for: 30 permutations of 32 blocks, and a little more."""
_STRETCH = 10  # evaluations timed in a row; what precedes a stretch is far from it, which costs it a little


class AsIs:
    """A backend that stores weights as they are, for what does not depend on their values."""

    LIBRARY = "torch"
    statistics: Statistics = "none"

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:  # noqa: ARG002
        """Return a copy."""
        return Stored(weight.clone(), bits)


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--backends", nargs="*", default=["hqq", "quanto", "kquant"])
    parser.add_argument("--quantised-blocks", type=int, default=2)
    parser.add_argument("--resident", type=int, help="blocks whose versions stay on the GPU; default all")
    parser.add_argument("--prepare-with", choices=NAMES, help="really quantise all blocks, with this backend")
    parser.add_argument("--no-graphs", action="store_true", help="never use CUDA graphs")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[options.shape]
    model = random_model(shape, device)
    result: dict[str, Any] = {
        "shape": options.shape, "device": device_name(device), "torch": torch.__version__,
        "transformers": transformers.__version__, "tokens": options.tokens, "resident_blocks": options.resident,
    }  # fmt: skip
    result["matrix_flop_per_s"] = matrix_flop_per_s(device)
    windows = np.random.default_rng(0).integers(
        0, shape["vocab_size"], size=(options.tokens // options.window_tokens, options.window_tokens)
    )
    result["quantise_s_per_block"] = {
        name: quantise_seconds(model, name, options.quantised_blocks, options.tokens) for name in options.backends
    }
    game, result["memory"] = prepare(model, options.shape, windows, options.resident, options.prepare_with)
    if options.no_graphs:
        game._graphs = None
    result["cuda_graphs"] = game._graphs is not None
    for estimator in ("permutations", "stratified"):
        result[estimator] = play(game, estimator, windows, options.evaluations, result["matrix_flop_per_s"])
    if device == "cuda":
        result["memory"]["peak_playing_bytes"] = torch.cuda.max_memory_allocated()
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
    matrices = []
    for gguf, size in hyper.expected_shapes().items():
        if gguf.startswith("blk.") and len(size) == 2:
            _, block, part, _ = gguf.split(".")
            hub = f"model.layers.{block}.{HUB_NAMES[part]}.weight"
            matrices.append(TensorSpec(hub, gguf, size, "matrix", int(block), None))
    return ModelSpec(name, hyper, tuple(matrices), "random weights")


def prepare(
    model: Any, shape: str, windows: np.ndarray, resident: int | None, backend: str | None
) -> tuple[Game, dict[str, Any]]:
    """Make two versions of every block, copies unless a backend is named, and tell what memory that took."""
    spec = spec_of(shape)
    parameters = {
        name: parameter.data for name, parameter in model.named_parameters() if name.startswith("model.layers")
    }
    cuda = next(model.parameters()).is_cuda
    model_bytes = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    game = Game(Walk(model, spec, windows))
    start = time.perf_counter()
    game.prepare(
        lambda tensor: parameters.pop(tensor.name).float(),
        load_backend(backend) if backend else AsIs(),
        resident_blocks=resident,
    )
    memory: dict[str, Any] = {"made_with": backend or "copies", "seconds": time.perf_counter() - start}
    if cuda:
        itemsize = next(model.parameters()).element_size()
        kept = spec.n_blocks if resident is None else resident
        second = itemsize * sum(t.weights for block in range(spec.n_blocks - kept, spec.n_blocks)
                                for t in spec.block_matrices(block))  # fmt: skip
        peak = torch.cuda.max_memory_allocated()
        memory |= {
            "model_bytes": model_bytes,
            "peak_preparing_bytes": peak,
            "peak_less_second_copy_over_model": (peak - second) / model_bytes,
        }
        torch.cuda.reset_peak_memory_stats()
    return game, memory


def play(game: Game, estimator: Estimator, windows: np.ndarray, evaluations: int, matrix: float) -> dict[str, Any]:
    """Time a design's first evaluations; the share recomputed over a whole profile is counted, not timed."""
    spec, n_players = game.spec, len(game.players)
    m = PROFILE_EVALUATIONS // (n_players - 1) + 1
    wanted = evaluation_order(
        estimator, draws(estimator, n_players, draws_for(estimator, n_players, m), seed=0), n_players
    )
    wanted = wanted[:PROFILE_EVALUATIONS]
    share = recomputed_share(wanted, n_players)
    step = max(1, len(wanted) // evaluations)
    stretches = [wanted[i : i + _STRETCH] for i in range(2, len(wanted), _STRETCH * step)]  # like the whole list
    wanted = wanted[:3] + [coalition for stretch in stretches for coalition in stretch]
    for coalition in wanted[:3] * 2:  # all at 4, all at 2, and a first step, twice: to warm up
        game.losses(coalition)
    game.blocks_computed = game.evaluations = 0
    start = time.perf_counter()
    for coalition in wanted[3 : 3 + evaluations]:
        game.losses(coalition)  # ends on the CPU, and so waits for the device
    seconds = time.perf_counter() - start
    tokens = windows.size
    per_block = sum(tensor.weights for tensor in spec.tensors) / spec.n_blocks
    attention = 2 * windows.shape[1] * spec.hyperparameters.n_heads * spec.hyperparameters.head_dim  # causal: half of 4
    head = spec.hyperparameters.hidden * spec.hyperparameters.vocabulary
    of_block, of_loss = tokens * (2 * per_block + attention), tokens * 2 * head
    flop = game.blocks_computed * of_block + game.evaluations * of_loss
    rate = flop / seconds
    return {
        "timed_evaluations": game.evaluations,
        "evaluations_per_s": game.evaluations / seconds,
        "recomputed_share": game.recomputed_share,
        "recomputed_share_of_a_whole_profile": share,
        "model_flop_per_s": rate,
        "share_of_matrix_rate": rate / matrix,
        "extrapolated_s_for_960_evaluations": PROFILE_EVALUATIONS * (share * spec.n_blocks * of_block + of_loss) / rate,
    }


def recomputed_share(wanted: list[Coalition], n_players: int) -> float:
    """Count what a profile recomputes when blocks are players: all after the beginning it shares with one of two."""
    all_4: Coalition = (4,) * n_players
    computed, last = 0, all_4
    for coalition in wanted:
        shared = max(_shared(coalition, last), _shared(coalition, all_4))
        computed, last = computed + n_players - shared, coalition
    return computed / (n_players * len(wanted))


def _shared(one: Coalition, other: Coalition) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def quantise_seconds(model: Any, name: str, blocks: int, tokens: int) -> dict[str, float]:
    """Return the seconds per block to make both versions of its matrices, without reading a checkpoint."""
    backend = load_backend(name)
    finish: Callable[[], object] = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    seconds = {"statistics": 0.0, "quantising": 0.0}
    for index in range(-1, blocks):  # libraries compile and allocate on first use: block 0 is done twice
        layer = model.model.layers[max(0, index)]
        finish()
        start = time.perf_counter()
        inputs = {}
        if backend.statistics != "none":
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
            with torch.no_grad(), Observer(layer, backend.statistics) as observer:
                for module in linears.values():
                    weight = module.weight
                    module(torch.randn(1, tokens, weight.shape[1], device=weight.device).to(weight.dtype))
            inputs = {f"{name}.weight": observer.take(f"{name}.weight") for name in linears}
        finish()
        middle = time.perf_counter()
        with torch.no_grad():
            for path, parameter in layer.named_parameters():
                if parameter.dim() == 2:
                    for bits in BITS:
                        backend.quantise(parameter.float(), bits, inputs.get(path))
        finish()
        if index >= 0:
            seconds["statistics"] += (middle - start) / blocks
            seconds["quantising"] += (time.perf_counter() - middle) / blocks
    return seconds


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
