"""A device whose speeds are known, for tests of what follows from them."""

import dataclasses
from typing import Any

from impq_edge.devices.profile import DeviceProfile
from impq_edge.devices.speeds import KernelSpeeds, MeasuredSpeeds, TokenCosts
from impq_edge.ggml.types import TensorType


def kernels(*, weight_s: dict[TensorType, float] | None = None, **changes: Any) -> KernelSpeeds:
    """Costs of a slow board: a weight takes the longer the more bits it has, except at 2 bit."""
    each = {kind: 1e-11 * kind.bits_per_weight for kind in TensorType if kind is not TensorType.BF16}
    each[TensorType.Q2_K] = 6e-11  # slower than Q4_K, as it is on some processors
    each |= weight_s or {}
    generation = TokenCosts(
        call_s=2e-5, element_s=0.0, attention_s=3e-10, score_s=1e-9, softcap_s=2e-8, logit_s=1e-8, weight_s=each
    )
    prompt = TokenCosts(1e-3, 5e-10, 1e-10, 2e-9, 1e-8, 0.0, {kind: cost / 4 for kind, cost in each.items()})
    base = KernelSpeeds(3e-6, generation, prompt, generation_error=0.03, prompt_error=0.05, spread=0.04)
    return dataclasses.replace(base, **changes)


def calibrated(device: DeviceProfile, **changes: Any) -> DeviceProfile:
    """Give a device measured speeds; ``changes`` are those of its kernels, the same with and without repacking."""
    found = kernels(**changes)
    speed = MeasuredSpeeds(
        llama_cpp="1", llama_cpp_python="0.3.36", system_info="CPU : NEON = 1", cpu="a processor",
        threads=device.threads, ubatch_tokens=device.ubatch_tokens, flash_attention=device.flash_attention,
        prompt_tokens=512, rounds=3, small_weights=12_000_000, large_weights=12_000_000, plain=found, repacked=found,
    )  # fmt: skip
    return dataclasses.replace(device, speed=speed)
