"""What a hub ``config.json`` says, in the old and the new form, reduced to what GGUF can express."""

import dataclasses
from typing import Any, ClassVar, Literal

import pydantic

from impq_edge.errors import ModelError
from impq_edge.records import STRICT, shown

Architecture = Literal["llama", "gemma2", "qwen3"]

_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Gemma2ForCausalLM": "gemma2",
    "Qwen3ForCausalLM": "qwen3",
}
CLASSES: dict[Architecture, str] = {architecture: name for name, architecture in _ARCHITECTURES.items()}
"""Architecture → the class of transformers."""

_ACTIVATIONS = {"llama": {"silu"}, "qwen3": {"silu"}, "gemma2": {"gelu_pytorch_tanh"}}
_GEMMA2_27B_BLOCKS = 46  # the block count by which llama.cpp's gemma2.cpp recognises the 27B's attention scale
_MAX_BLOCKS = 1 << 10  # the deepest published dense models have less than 200
_MAX_SIZE = (1 << 31) - 1  # llama.cpp holds these numbers in 32 bits
_SLIDING_PERIOD = 2  # Gemma-2: every other block, the first one sliding (llama.cpp's load_swa_pattern)


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama-3.1's frequency scaling (``rope_type: llama3``)."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # tokens


@dataclasses.dataclass(frozen=True)
class HyperParameters:
    """The numbers that fix a dense decoder's tensors, memory and arithmetic."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    architecture: Architecture
    n_blocks: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    context: int  # tokens the model was made for
    rms_epsilon: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_embeddings: bool
    attention_bias: bool
    sliding_window: int | None  # tokens; None: every block attends to the whole context
    attention_softcap: float | None
    final_softcap: float | None

    def block_window(self, block: int) -> int | None:
        """Return the sliding window of one block in tokens, or None where it sees the whole context."""
        return self.sliding_window if block % _SLIDING_PERIOD == 0 else None

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor a checkpoint of this architecture must have, by GGUF name."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        if not self.tied_embeddings:
            shapes["output.weight"] = (self.vocabulary, self.hidden)
        if self.rope_scaling:
            shapes["rope_freqs.weight"] = (self.head_dim // 2,)
        block = self._block_shapes()
        for index in range(self.n_blocks):
            shapes |= {f"blk.{index}.{name}": shape for name, shape in block.items()}
        return shapes

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (self.hidden,),
            "attn_q.weight": (q, self.hidden),
            "attn_k.weight": (kv, self.hidden),
            "attn_v.weight": (kv, self.hidden),
            "attn_output.weight": (self.hidden, q),
            "ffn_norm.weight": (self.hidden,),
            "ffn_gate.weight": (self.ffn, self.hidden),
            "ffn_up.weight": (self.ffn, self.hidden),
            "ffn_down.weight": (self.hidden, self.ffn),
        }
        if self.attention_bias:
            shapes |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,),
                       "attn_output.bias": (self.hidden,)}  # fmt: skip
        if self.architecture == "qwen3":
            shapes |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        if self.architecture == "gemma2":
            shapes |= {"post_attention_norm.weight": (self.hidden,), "post_ffw_norm.weight": (self.hidden,)}
        return shapes


def read_hyperparameters(config: dict[str, Any]) -> HyperParameters:
    """Reduce a hub configuration to its numbers.

    Raises
    ------
    ModelError
        When the architecture is not supported or the configuration says something that a GGUF of that
        architecture cannot express, and llama.cpp would therefore silently ignore.
    """
    architecture = _architecture(config)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    rope = _rope_settings(config)
    hyper = HyperParameters(
        architecture=architecture,
        n_blocks=_integer(config, "num_hidden_layers", limit=_MAX_BLOCKS),
        hidden=hidden,
        ffn=_integer(config, "intermediate_size"),
        n_heads=heads,
        n_kv_heads=_integer(config, "num_key_value_heads", default=heads),
        head_dim=_integer(config, "head_dim", default=_default_head_dim(architecture, hidden, heads)),
        vocabulary=_integer(config, "vocab_size"),
        context=_integer(config, "max_position_embeddings"),
        rms_epsilon=_number(config, "rms_norm_eps"),
        rope_theta=_number(rope, "rope_theta", default=10_000.0),
        rope_scaling=_rope_scaling(rope, architecture),
        # transformers' own default: Gemma ties, Llama and Qwen do not.
        tied_embeddings=bool(config.get("tie_word_embeddings", architecture == "gemma2")),
        attention_bias=bool(config.get("attention_bias", False)),
        sliding_window=_integer(config, "sliding_window") if architecture == "gemma2" else None,
        attention_softcap=_softcap(config, "attn_logit_softcapping", architecture),
        final_softcap=_softcap(config, "final_logit_softcapping", architecture),
    )
    _refuse_what_gguf_cannot_say(config, hyper)
    return hyper


def _architecture(config: dict[str, Any]) -> Architecture:
    found = config.get("architectures") or ["none"]
    architecture = _ARCHITECTURES.get(found[0]) if isinstance(found, list) and isinstance(found[0], str) else None
    if architecture is None:
        name = found[0] if isinstance(found, list) else found
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"Architecture {shown(name)} is not supported; dense models of {known} are.")
    if "quantization_config" in config:
        raise ModelError("The checkpoint is already quantised (quantization_config is set); start from the original.")
    return architecture


def _default_head_dim(architecture: Architecture, hidden: int, heads: int) -> int:
    # transformers' defaults for configurations that leave head_dim out.
    return {"llama": hidden // heads, "qwen3": 128, "gemma2": 256}[architecture]


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Merge the new form (``rope_parameters``) and the old one (``rope_theta``, ``rope_scaling``)."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise ModelError(f"config.json: {key} is {shown(value)}, not an object; download the checkpoint again.")
        merged |= value
    if "rope_theta" in config:
        merged.setdefault("rope_theta", config["rope_theta"])
    return merged


def _rope_scaling(rope: dict[str, Any], architecture: Architecture) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3" or architecture != "llama":
        raise ModelError(
            f"Rope scaling {shown(kind)} of a {architecture} model cannot be converted; only Llama's 'llama3' can. "
            "Set rope_scaling to null in a copy of config.json to build for the unscaled context."
        )
    return Llama3Rope(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_context=_integer(rope, "original_max_position_embeddings"),
    )


def _softcap(config: dict[str, Any], key: str, architecture: Architecture) -> float | None:
    if architecture != "gemma2":
        return None
    if config.get(key) is None:
        raise ModelError(f"config.json: {key} is unset, but llama.cpp always caps Gemma-2's logits; set a number.")
    return _number(config, key)


def _refuse_what_gguf_cannot_say(config: dict[str, Any], hyper: HyperParameters) -> None:
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS[hyper.architecture]:
        raise ModelError(
            f"config.json: activation {shown(activation)} is not what llama.cpp computes for {hyper.architecture} "
            f"({', '.join(_ACTIVATIONS[hyper.architecture])}); this model cannot be converted."
        )
    if hyper.n_heads % hyper.n_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {hyper.n_heads} is not a multiple of num_key_value_heads "
            f"{hyper.n_kv_heads}; correct the configuration."
        )
    if config.get("mlp_bias"):
        raise ModelError("config.json: mlp_bias is true, which this converter does not carry; use a model without.")
    if hyper.attention_bias and hyper.architecture != "llama":
        raise ModelError(f"config.json: attention_bias is true, which llama.cpp ignores for {hyper.architecture}.")
    if config.get("use_sliding_window") and hyper.architecture == "qwen3":
        raise ModelError("config.json: use_sliding_window is true, which llama.cpp ignores for qwen3; set it to false.")
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is true; only causal models can be converted.")
    if hyper.architecture == "gemma2":
        _refuse_gemma2(config, hyper)


def _refuse_gemma2(config: dict[str, Any], hyper: HyperParameters) -> None:
    scale = _integer(config, "query_pre_attn_scalar", default=256)
    used = hyper.hidden // hyper.n_heads if hyper.n_blocks == _GEMMA2_27B_BLOCKS else hyper.head_dim
    if scale != used:
        raise ModelError(
            f"config.json: query_pre_attn_scalar is {scale}, but llama.cpp always uses {used} for this shape; "
            "the converted model would compute something else."
        )
    types = config.get("layer_types")
    if types is not None:
        wanted = ["sliding_attention" if hyper.block_window(i) else "full_attention" for i in range(hyper.n_blocks)]
        if types != wanted:
            raise ModelError("config.json: layer_types do not alternate from a sliding first block, as llama.cpp does.")


def _number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(f"config.json: {key} is {shown(value)}, not a positive number; download the checkpoint again.")
    return float(value)


def _integer(config: dict[str, Any], key: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
    value = _number(config, key, default)
    if value != int(value):
        raise ModelError(f"config.json: {key} is {shown(value)}, not a whole number; download the checkpoint again.")
    if value > limit:
        raise ModelError(f"config.json: {key} is {int(value)}, more than {limit}; download the checkpoint again.")
    return int(value)
