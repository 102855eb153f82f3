"""What the observer finds, against hooks on transformers' own model and a plain computation in float64."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from impq_edge.backends import Bits, Inputs, Statistics, Stored
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model, read_tensor
from impq_edge.model.spec import read_model
from impq_edge.spqe.game import Game
from impq_edge.spqe.observe import Observer
from impq_edge.spqe.walk import TOKENS_PER_BATCH, open_walk

TOKENS = np.random.default_rng(0).integers(10, 8000, size=(5, 96))


@dataclasses.dataclass
class Recorder:
    """A backend that keeps what it was told of inputs, and hands weights back as they are."""

    LIBRARY: ClassVar[str] = "torch"
    statistics: Statistics = "none"

    def __post_init__(self) -> None:
        self.told: list[tuple[torch.Tensor, Inputs | None]] = []

    def quantise(self, weight: torch.Tensor, bits: Bits, inputs: Inputs | None = None) -> Stored:
        self.told.append((weight, inputs))
        return Stored(torch.zeros_like(weight), bits)  # were these used for the next block's inputs, it would show


def observed(directory: Path, statistics: Statistics) -> dict[str, Inputs | None]:
    """What a backend is told in a game, by the name of the matrix; the same for both its versions."""
    spec = read_model(directory)
    game = Game(open_walk(directory, spec, Windows(TOKENS, ""), torch.device("cpu"), torch.float32))
    backend = Recorder(statistics)
    game.prepare(lambda tensor: torch.from_numpy(read_tensor(directory, tensor)), backend)
    names = [tensor.name for block in range(spec.n_blocks) for tensor in spec.block_matrices(block)]
    found = dict(zip(names, backend.told[::2], strict=True))
    for (name, (weight, first)), (again, second) in zip(found.items(), backend.told[1::2], strict=True):
        assert torch.equal(weight, again)
        assert (first is None) == (second is None)
        assert first is None or second is None or torch.equal(first.mean_square, second.mean_square), name
    return {name: inputs for name, (_, inputs) in found.items()}


def entering(directory: Path) -> dict[str, torch.Tensor]:
    """Every token's input of every matrix in transformers' own forward pass, float64, (tokens, in)."""
    spec = read_model(directory)
    model = load_model(directory, spec, torch.device("cpu"), torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({f"{name}.weight": args[0].flatten(0, 1).double()})
            )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_statistics_are_those_of_the_unquantised_model(
    checkpoints: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all windows, in batches of 2, 2 and 1, although every block's versions are worthless."""
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 2 * 96)
    directory = checkpoints[architecture]
    expected = entering(directory)
    squares, moments = observed(directory, "squares"), observed(directory, "hessian")
    assert squares.keys() == moments.keys() == expected.keys()
    for name, x in expected.items():
        square, moment = squares[name], moments[name]
        assert square is not None and moment is not None and moment.second_moment is not None
        assert square.tokens == moment.tokens == TOKENS.size
        assert square.second_moment is None
        second_moment = (x.T @ x / len(x)).float()
        largest = float(second_moment.abs().max())
        torch.testing.assert_close(square.mean_square, second_moment.diagonal(), rtol=1e-4, atol=1e-5 * largest)
        torch.testing.assert_close(moment.mean_square, second_moment.diagonal(), rtol=1e-4, atol=1e-5 * largest)
        torch.testing.assert_close(moment.second_moment, second_moment, rtol=1e-4, atol=1e-5 * largest)


def test_matrices_with_the_same_input_have_the_same_statistics(checkpoints: dict[str, Path]) -> None:
    found = observed(checkpoints["qwen3"], "squares")
    for block in range(3):
        of = {name.split(".")[-2]: inputs for name, inputs in found.items() if name.startswith(f"model.layers.{block}")}
        for same in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            first, *others = (of[name] for name in same)
            assert all(torch.equal(first.mean_square, other.mean_square) for other in others)  # type: ignore[union-attr]
        assert not torch.equal(of["q_proj"].mean_square, of["up_proj"].mean_square)  # type: ignore[union-attr]


def test_the_batch_size_changes_nothing_but_rounding(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = observed(checkpoints["llama"], "hessian")
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 96)
    pieces = observed(checkpoints["llama"], "hessian")
    for name, one in whole.items():
        other = pieces[name]
        assert one is not None and other is not None and one.tokens == other.tokens
        scale = float(one.mean_square.max())
        torch.testing.assert_close(one.second_moment, other.second_moment, rtol=1e-4, atol=1e-6 * scale)


def test_a_backend_that_asks_for_nothing_is_told_nothing(checkpoints: dict[str, Path]) -> None:
    assert set(observed(checkpoints["llama"], "none").values()) == {None}


def test_an_input_seen_again_counts_again_and_nobody_watches_for_ever() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    one, other = torch.ones(3, 4), torch.full((3, 4), 2.0)
    observer = Observer(layer, "squares")
    with observer:
        for x in (one, other, one):
            layer[0](x)
        layer[1](one)
    layer[0](other)  # nobody watches any more
    first, second = observer.take("0.weight"), observer.take("1.weight")
    assert first is not None and second is not None
    assert (first.tokens, first.mean_square.tolist()) == (9, [2.0] * 4)
    assert (second.tokens, second.mean_square.tolist()) == (3, [1.0] * 4)
