"""How a person runs a file with llama.cpp as the device profile means it."""

import shlex

from impq_edge.devices.profile import DeviceProfile


def llama_cli(file: str, device: DeviceProfile, context_tokens: int, kv_type: str) -> str:
    """Return a command line of llama.cpp's own."""
    words = ["llama-cli", "-m", file, "-c", str(context_tokens), "-t", str(device.threads)]
    words += ["-b", str(device.batch_tokens), "-ub", str(device.ubatch_tokens)]
    words += ["-fa", "on" if device.flash_attention else "off"]
    if kv_type != "f16":
        words += ["-ctk", kv_type, "-ctv", kv_type]
    if device.gpu_layers:
        words += ["-ngl", str(device.gpu_layers)]
    if not device.use_extra_bufts:
        words.append("--no-repack")
    if not device.mmap:
        words.append("--no-mmap")
    return shlex.join(words)
