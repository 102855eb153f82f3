"""Everything a GGUF says beside its tensors: what llama.cpp needs to run the model, and how the file was made.

The keys are those that llama.cpp reads for the architecture (``src/llama-model.cpp``, ``src/models/*.cpp`` and
``src/llama-vocab.cpp``), under the names of the ``gguf`` package.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping

import gguf
from gguf import GGUFWriter, Keys, LlamaFileType

import impq_edge
from impq_edge.conversion.card import ModelCard, Value, key_bytes
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.tokenizer import Tokenizer
from impq_edge.errors import ConversionError
from impq_edge.ggml.types import TensorType
from impq_edge.model.config import HyperParameters
from impq_edge.model.recipe import TensorTypes
from impq_edge.model.spec import ModelSpec

RECIPE_KEY = "impq_edge.recipe"
ORIGIN_BYTES = 4096
"""What all keys of a file's origin take together, the recipe padded with spaces: the size of a file can be told before
its recipe is known, and an edited model card changes no allocation."""

_MAX_TEXT_BYTES = 127  # as llama-quantize cuts them (llama_model_kv_override)

_FILE_TYPES = {
    TensorType.F32: LlamaFileType.ALL_F32,
    TensorType.F16: LlamaFileType.MOSTLY_F16,
    TensorType.BF16: LlamaFileType.MOSTLY_BF16,
    TensorType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    TensorType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    TensorType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    TensorType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    TensorType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    TensorType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    TensorType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    TensorType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    TensorType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}

# Parts of a model's name by which llama.cpp strips spaces around special tokens (llama_vocab::impl::load).
_NAMES_THAT_CHANGE_TOKENS = ("phi-3", "phi3", "modern-bert")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a GGUF comes from, beside its recipe."""

    card: ModelCard = dataclasses.field(default_factory=ModelCard)
    quantized_by: str = f"impq-edge {impq_edge.__version__}"
    imatrix: Imatrix | None = None  # the importance matrix that was used
    imatrix_file: str | None = None  # where it was read

    def keys(self) -> dict[str, Value]:
        """Return the GGUF's keys and values."""
        imatrix = imatrix_keys(self.imatrix, self.imatrix_file) if self.imatrix else {}
        found = {**self.card.keys(), Keys.General.QUANTIZED_BY: _cut(self.quantized_by), **imatrix}
        return {key: value for key, value in found.items() if value != ""}  # GGUFWriter leaves those out


def imatrix_keys(imatrix: Imatrix, file: str | None) -> dict[str, str | int]:
    """Return the keys by which ``llama-quantize`` tells what it used (tools/quantize/quantize.cpp)."""
    found: dict[str, str | int | None] = {
        "quantize.imatrix.file": file and _cut(file),
        "quantize.imatrix.dataset": _cut(imatrix.datasets[0]) if imatrix.datasets else None,
        "quantize.imatrix.entries_count": len(imatrix.sums),
        "quantize.imatrix.chunks_count": imatrix.chunk_count or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")


def add_metadata(
    writer: GGUFWriter,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    types: TensorTypes,
    recipe: Mapping[str, str | int | float | None],
    origin: Origin | None = None,
) -> None:
    """Add every key-value of the file.

    Parameters
    ----------
    writer
        A writer of the model's architecture that has no metadata yet.
    types
        Type of every tensor; the one that most weights of the blocks have becomes the file's type.
    recipe
        How the file was made; stored as JSON under :data:`RECIPE_KEY`.
    origin
        Where the model comes from; its keys and the recipe fill :data:`ORIGIN_BYTES` whatever they are.

    Raises
    ------
    ConversionError
        When recipe and origin take more than :data:`ORIGIN_BYTES`, or the model's name would change how
        llama.cpp tokenises.
    """
    _add_general(writer, spec, types)
    add_hyperparameters(writer, spec.hyperparameters)
    _add_tokenizer(writer, tokenizer)
    _add_origin(writer, recipe, origin or Origin())


def _add_general(writer: GGUFWriter, spec: ModelSpec, types: TensorTypes) -> None:
    for part in _NAMES_THAT_CHANGE_TOKENS:
        if part in spec.name.lower():
            raise ConversionError(
                f"The model's name {spec.name!r} holds {part!r}, by which llama.cpp changes how it tokenises; "
                "rename the checkpoint's directory."
            )
    writer.add_type("model")
    writer.add_name(spec.name)
    writer.add_size_label(gguf.size_label(spec.weights, 0, 0, 0))
    writer.add_file_type(file_type(spec, types))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def file_type(spec: ModelSpec, types: TensorTypes) -> LlamaFileType:
    """Return the type that most weights of the blocks' matrices are stored in, as llama.cpp names it for the file."""
    weights: Counter[TensorType] = Counter()
    for tensor in spec.tensors:
        if tensor.role == "matrix":
            weights[types[tensor.gguf_name]] += tensor.weights
    return _FILE_TYPES[max(weights, key=lambda kind: (weights[kind], kind.bits_per_weight))]


def add_hyperparameters(writer: GGUFWriter, hyper: HyperParameters) -> None:
    """Add the keys from which llama.cpp knows a model's numbers."""
    writer.add_vocab_size(hyper.vocabulary)
    writer.add_context_length(hyper.context)
    writer.add_embedding_length(hyper.hidden)
    writer.add_block_count(hyper.n_blocks)
    writer.add_feed_forward_length(hyper.ffn)
    writer.add_head_count(hyper.n_heads)
    writer.add_head_count_kv(hyper.n_kv_heads)
    writer.add_key_length(hyper.head_dim)
    writer.add_value_length(hyper.head_dim)
    writer.add_layer_norm_rms_eps(hyper.rms_epsilon)
    # Llama-3's rope scaling is no key but the tensor rope_freqs.weight.
    writer.add_rope_dimension_count(hyper.head_dim)
    writer.add_rope_freq_base(hyper.rope_theta)
    if hyper.sliding_window is not None:
        writer.add_sliding_window(hyper.sliding_window)
    if hyper.attention_softcap is not None:
        writer.add_attn_logit_softcapping(hyper.attention_softcap)
    if hyper.final_softcap is not None:
        writer.add_final_logit_softcapping(hyper.final_softcap)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    for name, token in tokenizer.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    _add_chat_templates(writer, tokenizer.chat_templates)


def _add_chat_templates(writer: GGUFWriter, templates: Mapping[str, str]) -> None:
    # Not GGUFWriter.add_chat_template, which lists the names in the order of a set: another one in every process.
    others = sorted(name for name in templates if name != "default")
    if others:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, others)
    for name in others:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if "default" in templates:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, templates["default"])


def _add_origin(writer: GGUFWriter, recipe: Mapping[str, str | int | float | None], origin: Origin) -> None:
    keys = origin.keys()
    text = json.dumps(dict(recipe), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    room = ORIGIN_BYTES - sum(key_bytes(key, value) for key, value in keys.items()) - key_bytes(RECIPE_KEY, "")
    missing = len(text.encode()) - room
    if missing > 0:
        raise ConversionError(
            f"Recipe and origin take {ORIGIN_BYTES + missing} bytes of a GGUF's metadata, and {ORIGIN_BYTES} are the "
            "limit; shorten the names in them."
        )
    for key, value in keys.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    writer.add_string(RECIPE_KEY, text + " " * -missing)
