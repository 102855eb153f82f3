"""The stock mixes: which type llama.cpp's own quantiser gives each tensor of a dense decoder, without a matrix.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's
``src/llama-quant.cpp`` (as vendored in llama-cpp-python 0.3.36), for the file types named here. An importance matrix
changes the types of none of them but Q4_0 and Q5_0, told for files made without one.
"""

import re

from impq_edge.errors import ModelError
from impq_edge.ggml.types import TensorType, type_for_row
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import ModelSpec, TensorSpec

STOCK_MIXES = {
    "Q2_K": TensorType.Q2_K,
    "Q2_K_S": TensorType.Q2_K,
    "Q3_K_S": TensorType.Q3_K,
    "Q3_K_M": TensorType.Q3_K,
    "Q3_K_L": TensorType.Q3_K,
    "Q4_0": TensorType.Q4_0,
    "Q4_K_S": TensorType.Q4_K,
    "Q4_K_M": TensorType.Q4_K,
    "Q5_0": TensorType.Q5_0,
    "Q5_K_S": TensorType.Q5_K,
    "Q5_K_M": TensorType.Q5_K,
    "Q6_K": TensorType.Q6_K,
    "Q8_0": TensorType.Q8_0,
    "F16": TensorType.F16,
}
"""Name of a mix, as ``llama-quantize`` takes it → the type of whatever no rule names."""

_SHARED_HEADS = 4  # query heads per KV head, from which attn_v is small enough to be worth more bits
_LLAMA_70B_BLOCKS = 80  # LLM_TYPE_70B, with grouped heads
_BLOCK_PART = re.compile(r"blk\.\d+\.(\w+)\.weight")


def stock_types(spec: ModelSpec, mix: str) -> dict[str, TensorType]:
    """Return the type of every tensor, by GGUF name, in the order of ``spec.tensors``.

    Parameters
    ----------
    spec
        The model.
    mix
        One of :data:`STOCK_MIXES`.

    Raises
    ------
    ModelError
        When there is no such mix.
    """
    if mix not in STOCK_MIXES:
        raise ModelError(f"Mix {mix!r} is not one of {', '.join(STOCK_MIXES)}.")
    return {tensor.gguf_name: _type(tensor, mix, spec.hyperparameters) for tensor in spec.tensors}


def _type(tensor: TensorSpec, mix: str, hyper: HyperParameters) -> TensorType:
    base = STOCK_MIXES[mix]
    if tensor.role == "vector":
        return TensorType.F32
    if mix == "F16":
        return base
    wanted = base
    if tensor.role == "head" or (tensor.role == "embedding" and hyper.tied_embeddings):
        wanted = _head_type(base, tensor.shape[-1])
    elif tensor.block is not None:
        part = _BLOCK_PART.fullmatch(tensor.gguf_name)
        assert part
        wanted = _block_type(part[1], mix, tensor.block, hyper)
    return type_for_row(wanted, tensor.shape[-1])


def _head_type(base: TensorType, row_length: int) -> TensorType:
    if base == TensorType.Q8_0 or not base.fits_rows_of(row_length):
        return TensorType.Q8_0
    return TensorType.Q6_K


def _block_type(part: str, mix: str, block: int, hyper: HyperParameters) -> TensorType:
    base = STOCK_MIXES[mix]
    if part == "attn_v":
        return _attn_v_type(mix, block, hyper)
    if part == "ffn_down":
        return _ffn_down_type(mix, block, hyper.n_blocks)
    if part == "attn_output":
        return {"Q2_K": TensorType.Q3_K, "Q3_K_M": TensorType.Q4_K, "Q3_K_L": TensorType.Q5_K}.get(mix, base)
    return base


def _attn_v_type(mix: str, block: int, hyper: HyperParameters) -> TensorType:
    base, blocks = STOCK_MIXES[mix], hyper.n_blocks
    shared = hyper.n_heads // hyper.n_kv_heads >= _SHARED_HEADS
    rules = {
        "Q2_K": TensorType.Q4_K if shared else TensorType.Q3_K,
        "Q2_K_S": TensorType.Q4_K if shared else base,
        "Q3_K_M": TensorType.Q5_K if block < 2 else TensorType.Q4_K,
        "Q3_K_L": TensorType.Q5_K,
        "Q4_K_S": TensorType.Q5_K if block < 4 else base,
        "Q4_K_M": TensorType.Q6_K if _gets_more_bits(block, blocks) else base,
        "Q5_K_M": TensorType.Q6_K if _gets_more_bits(block, blocks) else base,
    }
    wanted = rules.get(mix, base)
    is_70b = hyper.architecture == "llama" and blocks == _LLAMA_70B_BLOCKS and hyper.n_heads != hyper.n_kv_heads
    return TensorType.Q5_K if is_70b and wanted in {TensorType.Q3_K, TensorType.Q4_K} else wanted


def _ffn_down_type(mix: str, block: int, blocks: int) -> TensorType:
    base = STOCK_MIXES[mix]
    early = block < blocks // 8
    rules = {
        "Q2_K": TensorType.Q3_K,
        "Q2_K_S": TensorType.Q4_K if early else base,
        "Q3_K_M": TensorType.Q5_K if block < blocks // 16 else TensorType.Q4_K,
        "Q3_K_L": TensorType.Q5_K,
        "Q4_K_S": TensorType.Q5_K if early else base,
        "Q4_K_M": TensorType.Q6_K if _gets_more_bits(block, blocks) else base,
        "Q5_K_M": TensorType.Q6_K if _gets_more_bits(block, blocks) else base,
    }
    return rules.get(mix, base)


def _gets_more_bits(block: int, blocks: int) -> bool:
    """Tell whether a block is among the first and last eighth or every third between (``use_more_bits``)."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
