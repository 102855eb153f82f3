"""The game on CUDA: bfloat16 stays close to float32 on the CPU, and reuse still changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.backends import NAMES, load_backend
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model
from impq_edge.spqe.game import Game
from impq_edge.spqe.sampling import evaluation_order, permutations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def game_on(device: str, dtype: torch.dtype, directory: Path, backend: str) -> Game:
    spec = read_model(directory)
    tokens = np.random.default_rng(0).integers(10, 8000, size=(5, 96))
    game = Game(load_model(directory, spec, torch.device(device), dtype), spec, tokens)
    game.quantise_blocks(directory, load_backend(backend))
    return game


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("backend", NAMES)
def test_cuda_agrees_with_the_cpu(checkpoints: dict[str, Path], architecture: str, backend: str) -> None:
    directory = checkpoints[architecture]
    gpu = game_on("cuda", torch.bfloat16, directory, backend)
    cpu = game_on("cpu", torch.float32, directory, backend)
    for coalition in evaluation_order(permutations(3, 2, seed=0)):
        # Losses near 10 nats; bfloat16 keeps 8 bits of each activation, and HQQ optimises in float16 on CUDA.
        assert gpu.losses(coalition) == pytest.approx(cpu.losses(coalition), abs=0.1)


@pytest.mark.parametrize("backend", NAMES)
def test_reuse_changes_no_bit_of_a_loss(checkpoints: dict[str, Path], backend: str) -> None:
    wanted = evaluation_order(permutations(3, 3, seed=1))
    walked, fresh = (game_on("cuda", torch.bfloat16, checkpoints["llama"], backend) for _ in range(2))
    reused = {coalition: walked.losses(coalition) for coalition in wanted}
    for coalition in wanted[::-1]:
        fresh._last = fresh._base = None
        assert np.array_equal(fresh.losses(coalition), reused[coalition])
