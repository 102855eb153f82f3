"""What of a model a device's GPU holds: llama.cpp gives it the last layers, and the head counts as one.

Sources (llama.cpp as vendored in llama-cpp-python 0.3.36): ``i_gpu_start`` in ``src/llama-model.cpp``, the buffer of a
tensor from ``llama_model_loader::create_tensor`` and what stays mapped from ``get_mapping_range`` there
(``src/llama-model-loader.cpp``), that of a block's KV cache from
``src/llama-kv-cache.cpp``.
"""

import dataclasses

from impq_edge.devices.profile import DeviceProfile
from impq_edge.model.config import HyperParameters
from impq_edge.model.spec import TensorSpec


@dataclasses.dataclass(frozen=True)
class Offload:
    """Where the layers of one model are: from ``first_block`` on they are the GPU's."""

    n_blocks: int
    first_block: int  # n_blocks: none is
    head: bool  # and the last norm
    apart: bool  # the GPU's memory is its own, not the system's
    mapped: bool  # weights are mapped from the file

    @property
    def layers(self) -> int:
        """Layers on the GPU as llama.cpp counts them, at most ``n_blocks`` + 1."""
        return self.n_blocks - self.first_block + self.head

    def has_block(self, block: int) -> bool:
        """Tell whether a block computes on the GPU."""
        return block >= self.first_block

    def used_by_cpu(self, tensor: TensorSpec) -> bool:
        """Tell whether the CPU needs a tensor. The embedding is looked up there always."""
        if tensor.block is not None:
            return not self.has_block(tensor.block)
        if tensor.role == "embedding":
            return True
        if _is_of_head(tensor):
            return not self.head
        return self.first_block > 0  # rope's factors, which both may need

    def leaves(self, tensor: TensorSpec) -> bool:
        """Tell whether a tensor is in no main memory once loaded.

        llama.cpp keeps one range of the file mapped, from the first to the last tensor that the CPU needs, and blocks
        lie in any order in it: so with mmap nothing leaves for sure unless the CPU has no block.
        """
        return self.apart and not self.used_by_cpu(tensor) and not (self.mapped and self.first_block > 0)

    def used_by_gpu(self, tensor: TensorSpec, tied: bool) -> bool:
        """Tell whether the GPU holds a tensor; a tied embedding is the head."""
        if tensor.block is not None:
            return self.has_block(tensor.block)
        if tensor.role == "embedding":
            return self.head and tied
        if _is_of_head(tensor):
            return self.head
        return self.first_block < self.n_blocks


def offload(hyper: HyperParameters, device: DeviceProfile) -> Offload:
    """Return where a device's ``gpu_layers`` put the layers of a model."""
    layers = min(device.gpu_layers, hyper.n_blocks + 1)
    first = min(hyper.n_blocks + 1 - layers, hyper.n_blocks)
    return Offload(hyper.n_blocks, first, layers > 0, device.gpu_memory_bytes is not None, device.mmap)


def _is_of_head(tensor: TensorSpec) -> bool:
    return tensor.role == "head" or tensor.gguf_name == "output_norm.weight"
