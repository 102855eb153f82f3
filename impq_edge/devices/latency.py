"""How many tokens per second a device will prompt and generate, before a file exists.

A token takes llama.cpp on a CPU

    calls × call_s + operations × operation_s                        threads that start and wait for one another
    + elements × element_s                                           norms, activations and the like
    + attended × attention_s + scores × score_s + capped × softcap_s + logits × logit_s
    + Σ over matrices of weights × weight_s[type of the matrix]      reading and multiplying them

and a batch of tokens has costs of its own, but for ``operation_s``. Everything is linear in the types of the matrices,
so that a speed can be asked of an allocation. Head and last feed-forward are computed for tokens with outputs alone,
which of a prompt is the last. Caches make a small model's weights cheaper to read, token by token, than a large one's:
``weight_s`` goes from the one to the other with the logarithm of the number of weights. The seconds are a device's
measured ones (:class:`~impq_edge.devices.speeds.MeasuredSpeeds`); without them only reading the weights is counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic

from impq_edge.devices.graph import GraphShape, graph_size
from impq_edge.devices.memory import CELL_GROUP, kv_cache_bytes
from impq_edge.devices.profile import DeviceProfile
from impq_edge.devices.speeds import KernelSpeeds, TokenCosts
from impq_edge.ggml.cache import is_quantised
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec, TensorSpec
from impq_edge.records import STRICT

GENERATED_TOKENS = 128
PROMPT_TOKENS = 512
"""Speeds are those of llama-bench's tg128 and pp512: from an empty context."""

# Of a bandwidth. A measured one is that of one file, and formats differ: against Q4_K, bytes per second of large models
# were 0.75 (Q3_K) to 1.3 (F16) on one x86-64 core, and so do boards. Of a theoretical peak, llama.cpp reaches 0.26 on a
# Raspberry Pi 4 and 0.59 on a 5, the shipped devices for which both are known.
_OF_MEASURED = (0.6, 1.0, 1.3)
_OF_THEORETICAL = (0.25, 0.4, 0.65)

Basis = Literal["formats", "bandwidth", "peak bandwidth"]  # measured, measured, theoretical


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second: what to expect, and between what."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    low_tok_per_s: float
    likely_tok_per_s: float
    high_tok_per_s: float


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a device is expected to do with a file."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    generation: Rate | None
    prompt: Rate | None  # None: nothing is known that would tell
    basis: Basis

    def summary(self, device: str) -> str:
        """Return a sentence for people."""
        modes = {"generation": self.generation, "prompt": self.prompt}
        told = [
            f"{name} {_told(rate.likely_tok_per_s)} tokens/s "
            f"({_told(rate.low_tok_per_s)} to {_told(rate.high_tok_per_s)})"
            for name, rate in modes.items()
            if rate
        ]
        basis = "measured formats" if self.basis == "formats" else self.basis
        return f"predicted on {device} from its {basis}: " + ", ".join(told)


@dataclasses.dataclass(frozen=True)
class Work:
    """What llama.cpp does, in the units that costs are told for; weights count once for every token."""

    calls: float
    operations: float
    elements: float
    attended: float
    scores: float
    capped: float
    logits: float  # that are softcapped
    weights: dict[TensorType, int]

    def seconds(self, speeds: KernelSpeeds, costs: TokenCosts) -> float:
        """Return how long that takes."""
        overheads = self.calls * costs.call_s + self.operations * speeds.operation_s
        computed = self.elements * costs.element_s + self.attended * costs.attention_s
        computed += self.scores * costs.score_s + self.capped * costs.softcap_s + self.logits * costs.logit_s
        return overheads + computed + sum(count * costs.weight_s[kind] for kind, count in self.weights.items())


@dataclasses.dataclass(frozen=True)
class GenerationCosts:
    """Seconds per generated token as a linear function of the types of a model's matrices."""

    fixed_s: float
    weight_s: dict[TensorType, float]
    basis: Basis
    shares: tuple[float, float, float]  # of the speed that follows: low, likely, high

    def token_s(self, spec: ModelSpec, types: TensorTypes) -> float:
        """Return the time of one token."""
        return self.fixed_s + sum(t.weights * self.weight_s[types[t.gguf_name]] for t in read_tensors(spec))

    def rate(self, token_s: float) -> Rate:
        """Return the speed that such a time promises."""
        low, likely, high = (share / token_s for share in self.shares)
        return Rate(low, likely, high)


def predict_speeds(spec: ModelSpec, types: TensorTypes, device: DeviceProfile, *, kv_type: str | None = None) -> Speeds:
    """Predict generation (tg128) and prompt (pp512) speed of a model on a device.

    Parameters
    ----------
    types
        GGUF name → type of every tensor.
    kv_type
        Of the cache; the device's own by default. Measured speeds are those with the device's.
    """
    used = {types[tensor.gguf_name] for tensor in read_tensors(spec)}
    costs = generation_costs(spec, device, used, kv_type=kv_type)
    generation = costs.rate(costs.token_s(spec, types))
    speeds = kernel_speeds(device, spec)
    if costs.basis != "formats" or speeds is None:
        return Speeds(generation, None, costs.basis)
    tokens = min(PROMPT_TOKENS, device.context_tokens)
    prompt_s = prompt_seconds(speeds, *prompt_work(spec, types, device, tokens))
    return Speeds(generation, Rate(*(share * tokens / prompt_s for share in _shares(speeds.prompt_error, speeds))),
                  costs.basis)  # fmt: skip


def kernel_speeds(device: DeviceProfile, spec: ModelSpec) -> KernelSpeeds | None:
    """Return what was measured under the device's setting of ``use_extra_bufts``, for a model of that size, or None."""
    if device.speed is None:
        return None
    found = device.speed.repacked if device.use_extra_bufts else device.speed.plain
    if found is None or found.generation.large_weight_s is None:
        return found
    return at_size(found, model_size(spec), device.speed.small_weights, device.speed.large_weights)


def model_size(spec: ModelSpec) -> int:
    """Return the number of weights that a generated token reads."""
    return sum(tensor.weights for tensor in read_tensors(spec))


def at_size(speeds: KernelSpeeds, weights: int, small_weights: int, large_weights: int) -> KernelSpeeds:
    """Return the costs of models of that many weights, between those of small and of large ones."""
    costs = speeds.generation
    large = costs.large_weight_s or costs.weight_s
    share = math.log(weights / small_weights) / math.log(large_weights / small_weights)
    share = min(1.0, max(0.0, share))
    between = {kind: (1 - share) * cost + share * large.get(kind, cost) for kind, cost in costs.weight_s.items()}
    return dataclasses.replace(speeds, generation=dataclasses.replace(costs, weight_s=between, large_weight_s=None))


def generation_costs(
    spec: ModelSpec, device: DeviceProfile, used: set[TensorType], *, kv_type: str | None = None
) -> GenerationCosts:
    """Return what a generated token of a model costs, on average over 128 from an empty context.

    From measured speeds where they know every type in ``used``, else from a bandwidth, measured or theoretical.
    """
    speeds = kernel_speeds(device, spec)
    if speeds is not None and used <= speeds.generation.weight_s.keys():
        work = generation_work(spec, {}, device, GENERATED_TOKENS)
        fixed_s = work.seconds(speeds, speeds.generation)
        shares = _shares(speeds.generation_error, speeds)
        return GenerationCosts(fixed_s, dict(speeds.generation.weight_s), "formats", shares)
    measured = device.generation_bandwidth_bytes_per_s
    bandwidth, shares = (measured, _OF_MEASURED) if measured else (device.memory_bandwidth_bytes_per_s, _OF_THEORETICAL)
    cache = kv_cache_bytes(spec.hyperparameters, device, GENERATED_TOKENS, kv_type) / 2
    weight_s = {kind: kind.bits_per_weight / 8 / bandwidth for kind in TensorType}
    vectors = 4 * sum(tensor.weights for tensor in spec.tensors if tensor.role == "vector")
    fixed_s = (cache + vectors) / bandwidth
    return GenerationCosts(fixed_s, weight_s, "bandwidth" if measured else "peak bandwidth", shares)


def generation_work(
    spec: ModelSpec, types: TensorTypes, device: DeviceProfile, tokens: int, depth_tokens: int = 0
) -> Work:
    """Return the work of one generated token, the mean of ``tokens`` after a context of ``depth_tokens``.

    ``types`` may leave matrices out, which are then not counted.
    """
    hyper = spec.hyperparameters
    cells = -(-(depth_tokens + tokens) // CELL_GROUP) * CELL_GROUP
    size = graph_size(hyper, GraphShape(1, 1, cells, cells, device.flash_attention, is_quantised(device.kv_type)))
    seen = _seen(hyper, range(depth_tokens, depth_tokens + tokens)) / tokens
    weights = _weights(read_tensors(spec), types)
    attended, capped = seen * hyper.head_dim, _capped(hyper, seen)
    return Work(1, size.operations, size.elements, attended, seen, capped, _capped_logits(hyper), weights)


def prompt_work(spec: ModelSpec, types: TensorTypes, device: DeviceProfile, tokens: int) -> tuple[Work, Work]:
    """Return the work of a prompt: what is done for all its tokens, and what is done as for a generated token."""
    hyper = spec.hyperparameters
    batch = min(device.ubatch_tokens, tokens)
    batches = tokens / batch
    cells = -(-tokens // CELL_GROUP) * CELL_GROUP
    size = graph_size(hyper, GraphShape(batch, 1, cells, cells, device.flash_attention, is_quantised(device.kv_type)))
    batched = [tensor for tensor in read_tensors(spec) if not _of_outputs(tensor, hyper)]
    alone = [tensor for tensor in read_tensors(spec) if _of_outputs(tensor, hyper)]
    weights = {kind: tokens * count for kind, count in _weights(batched, types).items()}
    seen = _seen(hyper, range(tokens))
    elements, attended = batches * size.elements, seen * hyper.head_dim
    together = Work(batches, batches * size.operations, elements, attended, seen, _capped(hyper, seen), 0, weights)
    return together, Work(0, 0, 0, 0, 0, 0, _capped_logits(hyper), _weights(alone, types))


def prompt_seconds(speeds: KernelSpeeds, together: Work, alone: Work) -> float:
    """Return how long a prompt takes."""
    return together.seconds(speeds, speeds.prompt) + alone.seconds(speeds, speeds.generation)


def read_tensors(spec: ModelSpec) -> list[TensorSpec]:
    """Return the matrices that a generated token reads whole: of an embedding that is no head, one row is read."""
    tied = spec.hyperparameters.tied_embeddings
    return [t for t in spec.tensors if t.role in ("matrix", "head") or (t.role == "embedding" and tied)]


def _weights(tensors: Sequence[TensorSpec], types: TensorTypes) -> dict[TensorType, int]:
    found: dict[TensorType, int] = {}
    for tensor in tensors:
        kind = types.get(tensor.gguf_name)
        if kind is not None:
            found[kind] = found.get(kind, 0) + tensor.weights
    return found


def _of_outputs(tensor: TensorSpec, hyper: HyperParameters) -> bool:
    """Whether llama.cpp multiplies a matrix only for tokens whose logits are wanted (``inp_out_ids``)."""
    return tensor.block is None or (tensor.block == hyper.n_blocks - 1 and ".ffn_" in tensor.gguf_name)


def _capped(hyper: HyperParameters, seen: float) -> float:
    return 0.0 if hyper.attention_softcap is None else seen


def _capped_logits(hyper: HyperParameters) -> int:
    return 0 if hyper.final_softcap is None else hyper.vocabulary


def _seen(hyper: HyperParameters, positions: range) -> int:
    """Return Σ over blocks, heads and tokens of the tokens seen, themselves included."""
    seen = 0
    for window in (hyper.block_window(block) for block in range(hyper.n_blocks)):
        seen += sum(min(position + 1, window or position + 1) for position in positions)
    return seen * hyper.n_heads


def _shares(error: float, speeds: KernelSpeeds) -> tuple[float, float, float]:
    """Return low, likely and high as shares: twice the fit's error and the spread of what it was fitted to."""
    width = 2 * (error**2 + speeds.spread**2) ** 0.5
    return 1 / (1 + width), 1.0, 1 + width


def _told(tok_per_s: float) -> str:
    return f"{tok_per_s:,.0f}" if tok_per_s >= 100 else f"{tok_per_s:.3g}"
