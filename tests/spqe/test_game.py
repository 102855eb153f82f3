import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.backends import NAMES, Backend, load_backend
from impq_edge.errors import SensitivityError
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model, read_tensor
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import read_model
from impq_edge.spqe.game import Game, Prepared
from impq_edge.spqe.sampling import Coalition, Estimator, draws, evaluation_order
from impq_edge.spqe.walk import TOKENS_PER_BATCH, open_walk

CPU = torch.device("cpu")


def windows(count: int = 5, length: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 8000, size=(count, length))


def game_of(directory: Path, tokens: np.ndarray, backend: str = "kquant", players: PlayerKind = "blocks") -> Game:
    spec = read_model(directory)
    game = Game(open_walk(directory, spec, Windows(tokens, ""), CPU, torch.float32), players)
    prepare(game, directory, backend)
    return game


def backend_of(name: str) -> Backend:
    """Encoders that want to know the inputs are tests/spqe/test_observe.py's."""
    return load_backend(name, **({"encode": "rtn"} if name == "kquant" else {}))


def prepare(game: Game, directory: Path, backend: str = "kquant") -> Prepared:
    return game.prepare(lambda tensor: torch.from_numpy(read_tensor(directory, tensor)), backend_of(backend))


def library_losses(
    directory: Path, tokens: np.ndarray, coalition: Coalition | None, backend: str, players: PlayerKind = "blocks"
) -> np.ndarray:
    """The same losses by transformers alone: weights replaced in the whole model, its own forward pass."""
    spec = read_model(directory)
    model = load_model(directory, spec, CPU, torch.float32)
    for player, bits in zip(players_of(spec, players), coalition, strict=True) if coalition else ():
        for tensor in player.tensors:
            weight = torch.from_numpy(read_tensor(directory, tensor))
            stored = backend_of(backend).quantise(weight, bits)
            model.get_parameter(tensor.name).data.copy_(stored.weight)
    ids = torch.from_numpy(tokens)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(dim=1).double().numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_losses_are_those_of_the_whole_model(checkpoints: dict[str, Path], architecture: str) -> None:
    """Windows of 96 tokens are longer than the random Gemma's sliding window of 64."""
    directory, tokens = checkpoints[architecture], windows()
    spec = read_model(directory)
    game = Game(open_walk(directory, spec, Windows(tokens, ""), CPU, torch.float32))
    prepared = prepare(game, directory)
    assert prepared.reference_losses == pytest.approx(library_losses(directory, tokens, None, ""), abs=2e-5)
    for coalition in [(4, 4, 4), (2, 4, 2), (2, 2, 2), (4, 2, 4)]:
        expected = library_losses(directory, tokens, coalition, "kquant")
        assert game.losses(coalition) == pytest.approx(expected, abs=2e-5)


def test_divergences_are_those_of_the_whole_model(checkpoints: dict[str, Path]) -> None:
    directory, tokens = checkpoints["qwen3"], windows(count=3)
    spec = read_model(directory)
    game = Game(open_walk(directory, spec, Windows(tokens, ""), CPU, torch.float32), objective="divergence")
    prepared = prepare(game, directory)
    assert prepared.reference_losses == pytest.approx(library_losses(directory, tokens, None, ""), abs=2e-5)
    ids, coalition = torch.from_numpy(tokens), (2, 4, 2)
    whole, quantised = (load_model(directory, spec, CPU, torch.float32) for _ in range(2))
    for player, bits in zip(players_of(spec, "blocks"), coalition, strict=True):
        for tensor in player.tensors:
            stored = backend_of("kquant").quantise(torch.from_numpy(read_tensor(directory, tensor)), bits)
            quantised.get_parameter(tensor.name).data.copy_(stored.weight)
    with torch.inference_mode():
        p, q = (m(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (whole, quantised))
    expected = (p.exp() * (p - q)).sum(-1).mean(dim=1).numpy()
    assert game.losses(coalition) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("architecture", "players"), [("llama", "tensors"), ("gemma2", "sublayers")])
def test_losses_of_finer_players_are_those_of_the_whole_model(
    checkpoints: dict[str, Path], architecture: str, players: PlayerKind
) -> None:
    directory, tokens = checkpoints[architecture], windows(count=2)
    game = game_of(directory, tokens, players=players)
    assert game.n_players == {"sublayers": 6, "tensors": 21}[players]
    generator = np.random.default_rng(1)
    for _ in range(3):
        coalition: Coalition = tuple(generator.choice([2, 4], size=game.n_players).tolist())
        expected = library_losses(directory, tokens, coalition, "kquant", players)
        assert game.losses(coalition) == pytest.approx(expected, abs=2e-5)


def test_the_same_bits_by_other_players_give_the_same_losses(checkpoints: dict[str, Path]) -> None:
    """Bit for bit: a coalition of blocks, written out for sublayers and for tensors."""
    directory, tokens = checkpoints["qwen3"], windows(count=2, length=32)
    blocks, finer = game_of(directory, tokens), ("sublayers", "tensors")
    games = {players: game_of(directory, tokens, players=players) for players in finer}
    seen = set()
    for coalition in itertools.product((2, 4), repeat=3):
        expected = blocks.losses(coalition)
        seen.add(expected.tobytes())
        for players in finer:
            written_out = tuple(coalition[player.block] for player in players_of(blocks.spec, players))
            assert np.array_equal(games[players].losses(written_out), expected)
    assert len(seen) == 8


@pytest.mark.parametrize(("estimator", "players"), [("permutations", "tensors"), ("stratified", "sublayers")])
def test_reuse_with_finer_players_changes_no_bit(
    checkpoints: dict[str, Path], players: PlayerKind, estimator: Estimator
) -> None:
    walked, fresh = (game_of(checkpoints["llama"], windows(count=2, length=32), players=players) for _ in range(2))
    n_players = walked.n_players
    wanted = evaluation_order(estimator, draws(estimator, n_players, 2, seed=0), n_players)
    reused = {coalition: walked.losses(coalition) for coalition in wanted}
    assert 0 < walked.recomputed_share < 0.9
    for coalition in wanted[::-1]:
        fresh.forget()
        assert np.array_equal(fresh.losses(coalition), reused[coalition])
    assert fresh.recomputed_share == 1


@pytest.mark.parametrize("backend", NAMES)
def test_reuse_changes_no_bit_of_a_loss(checkpoints: dict[str, Path], backend: str) -> None:
    directory, tokens = checkpoints["llama"], windows()
    wanted = evaluation_order("permutations", draws("permutations", 3, 3, seed=0), 3)
    walked = game_of(directory, tokens, backend)
    reused = {coalition: walked.losses(coalition) for coalition in wanted}
    assert 0 < walked.recomputed_share < 0.9
    fresh = game_of(directory, tokens, backend)
    for coalition in wanted[::-1]:
        fresh.forget()
        assert np.array_equal(fresh.losses(coalition), reused[coalition])
    assert fresh.recomputed_share == 1


def test_a_batch_of_other_size_changes_nothing_but_rounding(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tokens = checkpoints["gemma2"], windows(count=5)
    whole = game_of(directory, tokens).losses((2, 4, 2))
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 2 * 96)
    pieces = game_of(directory, tokens).losses((2, 4, 2))  # batches of 2, 2 and 1 windows
    assert pieces == pytest.approx(whole, abs=2e-5)


def test_logits_in_pieces(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, tokens = checkpoints["gemma2"], windows(count=2)
    whole = game_of(directory, tokens).losses((2, 2, 2))
    monkeypatch.setattr("impq_edge.spqe.walk.LOGITS_PER_CHUNK", 7 * 8192)
    assert game_of(directory, tokens).losses((2, 2, 2)) == pytest.approx(whole, abs=1e-5)


def test_a_loss_that_is_not_finite_is_refused(checkpoints: dict[str, Path]) -> None:
    game = game_of(checkpoints["llama"], windows(count=1))
    game._walk.outside.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(SensitivityError, match="not finite"):
        game.losses((4, 4, 4))
