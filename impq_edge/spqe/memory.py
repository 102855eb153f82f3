"""What the game needs of a GPU's memory, and which blocks therefore stay in host memory."""

import contextlib
from collections.abc import Iterator

import torch

from impq_edge.backends import BITS, Statistics
from impq_edge.errors import SensitivityError
from impq_edge.impq.allocation import Objective
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import ModelSpec
from impq_edge.spqe.judge import KEPT_BYTES
from impq_edge.spqe.versions import PLACES
from impq_edge.spqe.walk import LOGITS_PER_CHUNK

_QUANTISER_COPIES = 8  # float32 copies of the largest matrix that HQQ's optimiser holds at once, generously
_HESSIAN_COPIES = 5  # GPTQ: the moment, its damped copy, Cholesky factor, inverse and that one's factor
_LOGITS_BYTES = 4 * 3 * LOGITS_PER_CHUNK  # in float32, their softmax and the head's own output
_TRACES = 2  # activations kept for reuse: of the coalition evaluated last, and of all-4-bit
_MIB = 2**20


def resident_blocks(
    spec: ModelSpec, *, windows: int, window_tokens: int, batch_tokens: int, itemsize: int, statistics: Statistics,
    free_bytes: int, objective: Objective = "loss",
) -> int:  # fmt: skip
    """Return how many of the last blocks keep both versions on a GPU.

    Parameters
    ----------
    windows, window_tokens, batch_tokens
        The calibration text, and how many of its tokens pass through a block at once.
    itemsize
        Bytes per weight and activation.
    statistics
        What the backend wants to know of inputs.
    free_bytes
        What the GPU has left before the model is loaded.
    objective
        What is measured: a divergence keeps something of the unquantised model.

    Raises
    ------
    SensitivityError
        When not even one block and the activations fit.
    """
    hyper, n_blocks = spec.hyperparameters, spec.n_blocks
    block_bytes = itemsize * max(sum(t.weights for t in spec.block_matrices(i)) for i in range(n_blocks))
    outside_bytes = itemsize * sum(t.weights for t in spec.tensors if t.block is None)
    batch = min(batch_tokens, windows * window_tokens)
    working = batch * itemsize * (8 * hyper.hidden + 4 * hyper.ffn)
    working += batch * window_tokens * hyper.n_heads * 8 * bool(hyper.attention_softcap)  # eager attention's scores
    largest = max(t.weights for t in spec.block_matrices(0))
    quantising = 4 * _QUANTISER_COPIES * largest
    if statistics == "hessian":
        quantising += 4 * _HESSIAN_COPIES * max(t.shape[1] for t in spec.block_matrices(0)) ** 2
    traces = _TRACES * (n_blocks + 1) * windows * window_tokens * hyper.hidden * itemsize
    judging = 0 if objective == "loss" else _judging_bytes(hyper, windows * window_tokens, itemsize)
    left = free_bytes - outside_bytes - max(quantising, _LOGITS_BYTES + traces + judging) - working
    if (n_blocks * len(BITS) + 1) * block_bytes <= left:  # a block's own weights lie beside its versions for a while
        return n_blocks
    resident = (left - PLACES * block_bytes) // (len(BITS) * block_bytes)
    if resident < 0:
        needed = free_bytes - left + PLACES * block_bytes
        raise SensitivityError(
            f"The GPU has {free_bytes // _MIB} MiB free, but {spec.name} needs {needed // _MIB} MiB even with all its "
            f"blocks in host memory; ask for fewer --tokens than {windows * window_tokens}, or use --compute cpu."
        )
    return int(resident)


def _judging_bytes(hyper: HyperParameters, tokens: int, itemsize: int) -> int:
    """Return what a :class:`Judge` keeps, and what it takes to make probabilities anew where they are not kept."""
    probabilities, made_anew = 4 * tokens * hyper.vocabulary, 2 * 4 * LOGITS_PER_CHUNK
    return tokens * hyper.hidden * itemsize + (probabilities if probabilities <= KEPT_BYTES else made_anew)


def free_gpu_bytes() -> int:
    """Return what the current GPU has free, what PyTorch keeps in reserve included."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


@contextlib.contextmanager
def memory_told() -> Iterator[None]:
    """Turn PyTorch's error into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise SensitivityError(
            f"The GPU's memory is too small for this model and text ({reason}); ask for fewer --tokens, or use "
            "--compute cpu."
        ) from error
