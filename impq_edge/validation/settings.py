"""How a model is run: the numbers that decide llama.cpp's memory, speed and arithmetic."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from impq_edge.ggml.cache import KvType

if TYPE_CHECKING:
    import pydantic


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Parameters of one llama.cpp context, as sent to the child process and kept in the report."""

    # A plain dict with the values of records.STRICT: the child must not import pydantic, whose memory
    # would count as the model's.
    __pydantic_config__: ClassVar["pydantic.ConfigDict"] = {"extra": "forbid", "allow_inf_nan": False}

    context_tokens: int
    threads: int
    batch_tokens: int = 512  # logical batch, n_batch
    ubatch_tokens: int = 512  # physical batch, n_ubatch: sizes the compute buffer
    outputs_tokens: int = 1  # n_outputs_max: of how many tokens per batch logits can be asked
    kv_type: KvType = "f16"
    flash_attention: bool = True
    use_extra_bufts: bool = True  # repacked copies of weights: faster, and twice their memory
    mmap: bool = True
