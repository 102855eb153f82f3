"""The types llama.cpp's KV cache can have. Nothing else is imported: the process that runs a model reads this too."""

from typing import Literal

KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
"""What ``kv_cache_types`` in llama.cpp's ``common/arg.cpp`` offers; its CPU backend computes with each of them.

K and V have the same type here, although llama.cpp could mix them.
"""

FLOATS: tuple[KvType, ...] = ("f32", "f16", "bf16")


def is_quantised(kv_type: str) -> bool:
    """Tell whether a cache type holds blocks of 32 numbers; such a one needs flash attention and heads of whole blocks.

    (``llama_init_from_model`` in llama.cpp's ``src/llama-context.cpp``.)
    """
    return kv_type not in FLOATS
