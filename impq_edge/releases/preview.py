"""What a build will write, hold in memory and take, said before it starts."""

import dataclasses
import time
from pathlib import Path

import torch

from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.ggml.types import BLOCK_TYPES, TensorType
from impq_edge.model.calibration import DEFAULT_WINDOW_TOKENS
from impq_edge.model.players import players_of
from impq_edge.model.recipe import data_bytes, tensor_types
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.options import GameOptions
from impq_edge.spqe.playing import evaluations_for
from impq_edge.spqe.run import COMPUTE_DTYPES
from impq_edge.stages import require_compute

_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_USED_SHARE = 0.5  # of a large matrix product's rate: what evaluations reached on two cores and the demo
_RECOMPUTED_SHARE = 0.55  # of the blocks: 0.37 to 0.64 by design and model (docs/speed.md)
_SOLVED_WEIGHTS_PER_S = {"cpu": 1e6, "cuda": 6e6}  # GPTQ: one CPU thread, since two gain little; one H100
_VALIDATION_PASSES = 3  # perplexity, and about twice as much again for speed and memory


@dataclasses.dataclass(frozen=True)
class Preview:
    """The cost of a build."""

    write_bytes: int
    memory_bytes: int
    seconds: float

    def told(self, out: Path) -> str:
        """Return a sentence for people."""
        mib = 2**20
        minutes = self.seconds / 60
        time = f"about {minutes:.0f} minutes" if minutes >= 2 else "about a minute or two"
        return (
            f"This writes up to {self.write_bytes / mib:,.0f} MiB to {out}, holds about "
            f"{self.memory_bytes / mib:,.0f} MiB of weights in memory, and takes {time} on this machine."
        )


def preview_of(
    spec: ModelSpec, game: GameOptions, encoding: EncodeOptions, windows: int, *, played: bool, files: int = 3
) -> Preview:
    """Estimate what a game, unless it has been ``played``, and ``files`` GGUFs with their validation cost."""
    inside = sum(tensor.weights for tensor in spec.tensors if tensor.block is not None)
    solved = spec.weights - inside
    if played or game.backend != "kquant":
        solved += files * inside
    elif game.is_ladder:
        solved += (len(game.types) + files) * spec.weights
    else:  # the files hold what the game encodes
        solved += len(game.types) * inside
    return preview(
        spec,
        evaluations=0 if played else evaluations_of(spec, game),
        solved_weights=solved if encoding.encoder == "gptq" else 0,
        tokens=game.tokens,
        validation_tokens=windows * DEFAULT_WINDOW_TOKENS,
        files=files,
        compute=require_compute(encoding.compute),
    )


def evaluations_of(spec: ModelSpec, game: GameOptions) -> int:
    """Return how many evaluations a game takes at most."""
    played = evaluations_for(len(players_of(spec, game.player_kind)), game.walks) if game.walks else 0
    return played + (len(game.types) * len(players_of(spec, game.player_kind, outer=True)) if game.is_ladder else 0)


def preview(
    spec: ModelSpec,
    *,
    evaluations: int,
    tokens: int,
    validation_tokens: int,
    files: int,
    solved_weights: int,
    compute: str,
) -> Preview:
    """Estimate a build's cost from the model's shapes and a short matrix product on this machine.

    Parameters
    ----------
    evaluations
        Still to be made; 0 where the sensitivity profile is there already.
    tokens
        Per evaluation.
    validation_tokens
        Per file.
    files
        GGUFs to be written and validated.
    solved_weights
        To be encoded by GPTQ, each once for every type; other encoders take no time to speak of.
    """
    outer = TensorType.Q6_K
    largest = data_bytes(spec, tensor_types(spec, [BLOCK_TYPES[4]] * spec.n_blocks, outer))
    in_blocks = sum(t.weights for t in spec.tensors if t.block is not None)
    outside = spec.weights - in_blocks
    dtype = getattr(torch, COMPUTE_DTYPES[compute])
    # A multiplication and an addition per weight and token; the head is computed in every evaluation.
    game = 2 * tokens * evaluations * (in_blocks * _RECOMPUTED_SHARE + outside)
    validation = 2 * validation_tokens * files * _VALIDATION_PASSES * spec.weights
    seconds = game / (_USED_SHARE * _matrix_flop_per_s(compute, dtype)) + validation / (
        _USED_SHARE * _matrix_flop_per_s("cpu", torch.float32)
    )
    seconds += solved_weights / _SOLVED_WEIGHTS_PER_S[compute]
    activations = tokens * spec.hyperparameters.hidden * (spec.n_blocks + 1) * 2
    return Preview(
        write_bytes=files * largest,
        memory_bytes=dtype.itemsize * (2 * in_blocks + outside + activations) if evaluations else 2 * largest,
        seconds=seconds,
    )


def _matrix_flop_per_s(compute: str, dtype: torch.dtype) -> float:
    """Time a square matrix product on random data, the second of two."""
    size = _MATRIX_SIZE[compute]
    matrix = torch.randn(size, size, device=compute).to(dtype)
    elapsed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the GPU
        elapsed = time.perf_counter() - start
    return float(2 * size**3 / elapsed)
