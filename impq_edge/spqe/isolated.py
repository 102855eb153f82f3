"""What the isolated metrics say of every player, without evaluating a coalition.

The text goes through the unquantised model once forwards, once backwards for LLM-MQ's gradient, and once more where the
backend quantises by statistics. The formulas are :mod:`impq_edge.impq.baselines`'s.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from impq_edge.backends import BITS, Bits
from impq_edge.errors import SensitivityError
from impq_edge.impq.baselines import Metric, activation, lim, llm_mq, zd
from impq_edge.model.load import read_tensor
from impq_edge.model.players import Player, players_of
from impq_edge.spqe.game import stored
from impq_edge.spqe.gradient import matrix_gradients
from impq_edge.spqe.memory import memory_told
from impq_edge.spqe.observe import Observer
from impq_edge.spqe.table import Job, Progress, calibration_walk, kept_encodings
from impq_edge.spqe.walk import Hidden, Walk, open_walk

_ATTENTION, _FEED_FORWARD, _END = 0, 1, 2
"""Where a block's residual stream is looked at: what enters attention, what enters feed-forward, what leaves."""


@dataclasses.dataclass
class _Passage:
    """Sums over the text's tokens on their way through one block."""

    tokens: int
    squares: dict[int, float]  # of the residual stream, where it enters each sublayer
    cosines: dict[tuple[int, int], float]  # between two places of the residual stream
    inputs: dict[str, float]  # squares of what a matrix multiplies, by its name in the checkpoint


def isolated_scores(job: Job, progress: Progress = lambda *_: None) -> dict[Metric, NDArray[np.float64]]:
    """Return how much harm each metric expects of having a player at 2 bit, (N,) each, from 0 on.

    LLM-MQ's Q is the job's backend, with the inputs that the game gives it. A block's LIM and activation are of the
    residual stream that enters and leaves it, a sublayer's of the stream around the sublayer: norms inside, the sum
    with what went past included. A single matrix has no residual of its own, and its input and output seldom have the
    same size: its LIM is its sublayer's. Its activation is what it multiplies.

    ``progress`` is told of three phases, block by block: activations, gradients, quantising.

    Raises
    ------
    SensitivityError
        When a score is not finite, or the GPU's memory does not suffice.
    BackendError
        When the backend cannot store this model's matrices.
    """
    players = players_of(job.spec, job.settings.players)
    with memory_told(), torch.no_grad():
        device, dtype = torch.device(job.settings.device), getattr(torch, job.settings.dtype)
        walk = open_walk(job.directory, job.spec, job.windows, device, dtype)
        calibration = calibration_walk(job, walk)
        layers, entering, passages = _pass_on(walk, progress)
        done = iter(range(1, job.spec.n_blocks + 1))
        gradients = matrix_gradients(
            walk, layers, entering, lambda _: progress("gradients", next(done), job.spec.n_blocks)
        )
        products = _products(job, walk if calibration is None else calibration, layers, gradients, progress)
    scores: dict[Metric, list[float]] = {"llm-mq": [], "lim": [], "zd": [], "activation": []}
    for player in players:
        found = [products[tensor.name] for tensor in player.tensors]
        scores["llm-mq"].append(llm_mq(*([product[bits] for product in found] for bits in BITS)))
        scores["lim"].append(lim(_cosine(player, passages)))
        scores["zd"].append(zd(_weights(job, player)))
        scores["activation"].append(activation(_squares(job, player, passages)))
    return {metric: _finite(metric, values) for metric, values in scores.items()}


def _pass_on(walk: Walk, progress: Progress) -> tuple[list[torch.nn.Module], list[Hidden], list[_Passage]]:
    """Pass the text through all blocks; return them, what enters each and leaves the last, and what was seen."""
    layers: list[torch.nn.Module] = []
    entering: list[Hidden] = [list(walk.embedded)]
    passages: list[_Passage] = []
    for block in range(walk.spec.n_blocks):
        layers.append(walk.take(block))
        passage = _Passage(0, {}, {}, {})
        observer = Observer(layers[-1], "squares")
        with observer:
            entering.append([_through(walk, layers[-1], block, hidden, passage) for hidden in entering[-1]])
        for tensor in walk.spec.block_matrices(block):
            inputs = observer.take(tensor.name_in_block)
            assert inputs is not None, "squares were asked for"
            passage.inputs[tensor.name] = inputs.tokens * float(inputs.mean_square.sum(dtype=torch.float64))
        passages.append(passage)
        progress("activations", block + 1, walk.spec.n_blocks)
    return layers, entering, passages


def _through(walk: Walk, layer: torch.nn.Module, block: int, hidden: torch.Tensor, passage: _Passage) -> torch.Tensor:
    """Run a block on one batch and add what is seen of the residual stream to ``passage``."""
    between: list[torch.Tensor] = []
    # The norm in front of feed-forward; Gemma-2's post_attention_layernorm comes before the sum instead.
    norm: Any = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    hook = norm.register_forward_pre_hook(lambda _, arguments: between.append(arguments[0]))
    try:
        left = walk.run(layer, block, hidden)
    finally:
        hook.remove()
    stream = [places.double() for places in (hidden, between[0], left)]
    passage.tokens += left.shape[:-1].numel()
    for place in (_ATTENTION, _FEED_FORWARD):
        squares = float(stream[place].square().sum())
        passage.squares[place] = passage.squares.get(place, 0.0) + squares
    for pair in ((_ATTENTION, _FEED_FORWARD), (_FEED_FORWARD, _END), (_ATTENTION, _END)):
        cosines = float(functional.cosine_similarity(stream[pair[0]], stream[pair[1]], dim=-1).sum())
        passage.cosines[pair] = passage.cosines.get(pair, 0.0) + cosines
    return left


def _products(
    job: Job,
    text: Walk,
    layers: Sequence[torch.nn.Module],
    gradients: dict[str, torch.Tensor],
    progress: Progress,
) -> dict[str, dict[Bits, float]]:
    """Return gᵀ(W − Q(W)) of every matrix at 2 and at 4 bit, nats per token, by its name in the checkpoint.

    ``text`` is what the backend's statistics come from; it is not passed on where the backend needs none.
    """
    found: dict[str, dict[Bits, float]] = {}
    kept, hidden = kept_encodings(job), list(text.embedded)
    for block, layer in enumerate(layers):
        observer = Observer(layer, job.backend.statistics)
        if job.backend.statistics != "none":
            with observer:
                hidden = [text.run(layer, block, batch) for batch in hidden]
        for tensor in job.spec.block_matrices(block):
            weight = torch.from_numpy(read_tensor(job.directory, tensor)).to(text.device)
            gradient, inputs = gradients[tensor.name].to(text.device), observer.take(tensor.name_in_block)
            found[tensor.name] = {}
            for bits in BITS:
                error = weight - stored(job.backend, kept, tensor, weight, bits, inputs).weight
                found[tensor.name][bits] = float((gradient * error).sum(dtype=torch.float64))
        progress("quantising", block + 1, len(layers))
    return found


def _places(player: Player) -> tuple[int, int]:
    """Return where the residual stream enters a player's sublayers and where it leaves them."""
    names = [tensor.gguf_name.split(".")[2] for tensor in player.tensors]  # such as attn_q, ffn_down
    has_attention, has_feed_forward = (any(name.startswith(part) for name in names) for part in ("attn", "ffn"))
    return _ATTENTION if has_attention else _FEED_FORWARD, _END if has_feed_forward else _FEED_FORWARD


def _cosine(player: Player, passages: Sequence[_Passage]) -> float:
    assert player.block is not None, "a player of the blocks"
    passage = passages[player.block]
    return passage.cosines[_places(player)] / passage.tokens


def _squares(job: Job, player: Player, passages: Sequence[_Passage]) -> float:
    assert player.block is not None, "a player of the blocks"
    passage = passages[player.block]
    if job.settings.players == "tensors":
        return passage.inputs[player.tensors[0].name]
    return passage.squares[_places(player)[0]]


def _weights(job: Job, player: Player) -> NDArray[np.float32]:
    return np.concatenate([read_tensor(job.directory, tensor).ravel() for tensor in player.tensors])


def _finite(metric: Metric, values: Sequence[float]) -> NDArray[np.float64]:
    scores = np.array(values, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise SensitivityError(
            f"The scores of {metric} are not finite on this text; validate an F16 GGUF of the model to see whether it "
            "works."
        )
    return scores
