"""The isolated metrics, against transformers' own model: its autograd, its hooks, differences of its loss."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from impq_edge.backends import BITS, Backend, Bits, Inputs, Statistics, Stored, load_backend
from impq_edge.errors import SensitivityError
from impq_edge.impq.baselines import METRICS
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model, read_tensor
from impq_edge.model.players import PLAYER_KINDS, Player, PlayerKind, players_of
from impq_edge.model.spec import TensorSpec, read_model
from impq_edge.spqe.isolated import isolated_scores
from impq_edge.spqe.profile import GameSettings
from impq_edge.spqe.table import Job, set_table
from impq_edge.spqe.walk import TOKENS_PER_BATCH

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(10, 8000, size=(3, 96))
QUANTO = load_backend("quanto")


def job_of(
    directory: Path, players: PlayerKind = "blocks", backend: Backend = QUANTO, dtype: str = "float32", **changes: Any
) -> Job:
    settings = GameSettings({}, players, "", TOKENS.size, TOKENS.shape[1], "cpu", dtype)
    return Job(directory, read_model(directory), backend, Windows(TOKENS, ""), settings, **changes)


def stored(directory: Path, tensor: TensorSpec, bits: Bits) -> torch.Tensor:
    return QUANTO.quantise(torch.from_numpy(read_tensor(directory, tensor)), bits).weight


def whole(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(directory, read_model(directory), CPU, dtype)


def loss_of(model: Any) -> torch.Tensor:
    """The mean over all tokens but the first of each window, by the library's own forward pass."""
    ids = torch.from_numpy(TOKENS)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclasses.dataclass(frozen=True)
class Seen:
    """What enters and leaves modules of transformers' own model, float64."""

    entering: dict[str, torch.Tensor]
    leaving: dict[str, torch.Tensor]

    def points(self, player: Player) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream before and after a player's sublayers; around feed-forward, by taking off its output."""
        block = f"model.layers.{player.block}"
        added = f"{block}.post_feedforward_layernorm"
        added = added if added in self.leaving else f"{block}.mlp"
        start, end = self.entering[block], self.leaving[block]
        between = end - self.leaving[added]
        parts = {tensor.name.split(".")[3] for tensor in player.tensors}
        return (start if "self_attn" in parts else between), (end if "mlp" in parts else between)


def seen_of(directory: Path) -> Seen:
    model, seen = whole(directory), Seen({}, {})

    def see(module: Any, arguments: Any, keywords: Any, output: Any, name: str) -> None:
        entering = arguments[0] if arguments else keywords.get("hidden_states")
        if torch.is_tensor(entering) and torch.is_tensor(output):
            seen.entering[name], seen.leaving[name] = entering.double(), output.double()

    for name, module in model.named_modules():
        module.register_forward_hook(lambda *told, name=name: see(*told, name=name), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    return seen


@pytest.mark.parametrize(
    ("architecture", "players"), list(zip(["llama", "qwen3", "gemma2"], PLAYER_KINDS, strict=True))
)
def test_llm_mq_is_the_gradient_of_the_whole_model_times_the_error(
    checkpoints: dict[str, Path], architecture: str, players: PlayerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of 2 windows and 1, and logits in pieces of a few tokens."""
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 2 * 96)
    monkeypatch.setattr("impq_edge.spqe.walk.LOGITS_PER_CHUNK", 4 * 50 * 8192)
    directory = checkpoints[architecture]
    found = isolated_scores(job_of(directory, players))["llm-mq"]
    model = whole(directory).requires_grad_(True)
    loss_of(model).backward()
    expected = []
    for player in players_of(read_model(directory), players):
        sums = dict.fromkeys(BITS, 0.0)
        for tensor in player.tensors:
            parameter = model.get_parameter(tensor.name)
            for bits in BITS:
                error = parameter.detach() - stored(directory, tensor, bits)
                sums[bits] += abs(float((parameter.grad.double() * error.double()).sum()))
        expected.append(max(0.0, sums[2] - sums[4]))
    assert found == pytest.approx(np.array(expected), rel=1e-3, abs=1e-6)
    assert found.max() > 1e-3


def test_llm_mq_is_the_slope_of_the_loss_towards_what_is_stored(checkpoints: dict[str, Path]) -> None:
    """By central differences in float64, some matrices of the second block."""
    directory = checkpoints["llama"]
    players = players_of(read_model(directory), "tensors")
    found = isolated_scores(job_of(directory, "tensors"))["llm-mq"]
    model, step = whole(directory, torch.float64), 1e-3
    for index, player in list(enumerate(players))[7:14:3]:
        (tensor,) = player.tensors
        parameter, slopes = model.get_parameter(tensor.name), {}
        unquantised = parameter.detach().clone()
        for bits in BITS:
            towards = stored(directory, tensor, bits).double() - unquantised
            losses = []
            for sign in (1, -1):
                parameter.data = unquantised + sign * step * towards
                with torch.no_grad():
                    losses.append(float(loss_of(model)))
            slopes[bits] = (losses[0] - losses[1]) / (2 * step)
        parameter.data = unquantised
        assert found[index] == pytest.approx(max(0.0, abs(slopes[2]) - abs(slopes[4])), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("players", PLAYER_KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_lim_and_activation_are_of_the_residual_stream(
    checkpoints: dict[str, Path], architecture: str, players: PlayerKind
) -> None:
    directory = checkpoints[architecture]
    found, seen = isolated_scores(job_of(directory, players)), seen_of(directory)
    who = players_of(read_model(directory), players)
    for player, lim, activation in zip(who, found["lim"], found["activation"], strict=True):
        entering, leaving = seen.points(player)
        lengths = entering.norm(dim=-1) * leaving.norm(dim=-1)
        cosine = float(((entering * leaving).sum(-1) / lengths).mean())
        assert lim == pytest.approx(1 - cosine, abs=1e-5), player.name
        if players == "tensors":
            entering = seen.entering[player.tensors[0].name.removesuffix(".weight")]
        assert activation == pytest.approx(float(entering.norm()), rel=1e-5), player.name
    assert len({*found["lim"]}) == {"blocks": 3, "sublayers": 6, "tensors": 6}[players]


@pytest.mark.parametrize("players", PLAYER_KINDS)
def test_zd_counts_the_weights_of_a_player_together(checkpoints: dict[str, Path], players: PlayerKind) -> None:
    directory = checkpoints["gemma2"]
    found, model = isolated_scores(job_of(directory, players))["zd"], whole(directory, torch.float64)
    for player, score in zip(players_of(read_model(directory), players), found, strict=True):
        weights = torch.cat([model.get_parameter(tensor.name).flatten() for tensor in player.tensors])
        z = (weights - weights.mean()) / weights.std()
        assert score == pytest.approx(1 - float((z > 1).double().mean()), abs=1e-5)


def test_large_weights_lower_zd_and_a_larger_stream_raises_activation(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama")
    before = isolated_scores(job_of(directory))
    state = load_file(directory / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 8  # many weights beyond the others, and a louder output
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    after = isolated_scores(job_of(directory))
    for metric in ("zd", "activation", "lim"):
        assert after[metric][0] == before[metric][0]  # nothing changed in or before block 0
    assert after["lim"][1] > before["lim"][1]  # it adds more to the stream
    assert after["activation"][1] == before["activation"][1]
    assert after["activation"][2] > before["activation"][2]
    assert after["zd"][1] != before["zd"][1] and after["zd"][2] == before["zd"][2]


@dataclasses.dataclass
class Recorder:
    """A backend that keeps what it was told, and halves weights at 2 bit."""

    LIBRARY: ClassVar[str] = "torch"
    statistics: Statistics = "hessian"

    def __post_init__(self) -> None:
        self.told: list[tuple[torch.Tensor, Bits, Inputs | None]] = []

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:
        self.told.append((weight, bits, inputs))
        return Stored(weight * bits / 4, bits)


@pytest.mark.parametrize("other_text", [False, True])
@pytest.mark.parametrize("statistics", ["squares", "hessian"])
def test_the_backend_is_told_what_it_is_told_in_the_game(
    checkpoints: dict[str, Path], statistics: Statistics, other_text: bool
) -> None:
    calibration = Windows(np.random.default_rng(1).integers(10, 8000, size=(3, 64)), "") if other_text else None
    metric, game = Recorder(statistics), Recorder(statistics)
    isolated_scores(job_of(checkpoints["gemma2"], backend=metric, calibration=calibration))
    set_table(job_of(checkpoints["gemma2"], backend=game, calibration=calibration))
    assert len(metric.told) == len(game.told) == 2 * 21
    for (weight, bits, inputs), (again, same, expected) in zip(metric.told, game.told, strict=True):
        assert torch.equal(weight, again) and bits == same
        assert inputs is not None and expected is not None and inputs.tokens == expected.tokens
        torch.testing.assert_close(inputs.mean_square, expected.mean_square)
        torch.testing.assert_close(inputs.second_moment, expected.second_moment)


def test_matrices_that_were_encoded_for_the_game_are_not_encoded_again(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    backend = load_backend("kquant", encode="imatrix")
    job = job_of(checkpoints["llama"], backend=backend, kept=tmp_path)
    set_table(job)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    scores = isolated_scores(job)["llm-mq"]
    assert len(written) == 2 * 21
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert scores == pytest.approx(isolated_scores(dataclasses.replace(job, kept=None))["llm-mq"])


def test_bfloat16_tells_much_the_same(checkpoints: dict[str, Path]) -> None:
    coarse, fine = (isolated_scores(job_of(checkpoints["gemma2"], dtype=d)) for d in ("bfloat16", "float32"))
    assert tuple(coarse) == tuple(fine) == METRICS
    for metric in METRICS:
        assert coarse[metric].dtype == np.float64 and (coarse[metric] >= 0).all()
        assert coarse[metric] == pytest.approx(fine[metric], rel=0.15, abs=0.02 * fine[metric].max()), metric


def test_every_step_is_told(checkpoints: dict[str, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    isolated_scores(job_of(checkpoints["llama"]), lambda *step: told.append(step))
    assert told == [(phase, n, 3) for phase in ("activations", "gradients", "quantising") for n in (1, 2, 3)]


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama")
    state = load_file(directory / "model.safetensors")
    state["model.norm.weight"].fill_(float("inf"))
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SensitivityError, match="llm-mq are not finite"):
        isolated_scores(job_of(directory))
