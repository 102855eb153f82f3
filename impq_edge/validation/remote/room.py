"""Whether a file can run on a machine at all, told before anything is copied there."""

from pathlib import Path

from impq_edge.devices.profile import DeviceProfile
from impq_edge.errors import ValidationError
from impq_edge.validation.file import FileFacts
from impq_edge.validation.remote.host import Host
from impq_edge.validation.remote.ssh import Say
from impq_edge.validation.validate import DEFAULT_CONTEXT_TOKENS

ENVIRONMENT_BYTES = 400 << 20
"""Room for the environment, with its wheels beside it while it is made; see docs/on-device.md for what it takes."""

_VALUE_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
_GIB = 2**30


def least_bytes(facts: FileFacts, context_tokens: int, kv_type: str) -> int:
    """Return what running a file takes at the very least: its weights and its KV cache.

    A lower bound for any architecture: where a file names a sliding window, every layer is taken to have it,
    and compute buffers, repacked weights and the process are left out. The plan of a device is exact; this
    only finds what cannot be.
    """

    def number(key: str, default: int = 0) -> int:
        value = facts.keys.get(f"{facts.architecture}.{key}", default)
        return value if type(value) is int and value > 0 else default

    heads = number("attention.head_count", 1)
    width = number("embedding_length") // heads
    row = number("attention.head_count_kv") * (
        number("attention.key_length", width) + number("attention.value_length", width)
    )
    cells = min(context_tokens, number("attention.sliding_window", context_tokens))
    cache = number("block_count") * cells * row * _VALUE_BITS.get(kv_type, 4.5) / 8
    return facts.file_bytes + int(cache)


def check_memory(
    host: Host,
    path: Path,
    facts: FileFacts,
    device: DeviceProfile | None,
    context_tokens: int | None,
    kv_type: str | None,
    say: Say,
) -> None:
    """Refuse a file that this machine's memory cannot hold; warn where only other programs are in its way.

    Raises
    ------
    ValidationError
        When the machine has less memory than :func:`least_bytes`.
    """
    trained = facts.trained_context_tokens or DEFAULT_CONTEXT_TOKENS
    context = context_tokens or (device.context_tokens if device else min(DEFAULT_CONTEXT_TOKENS, trained))
    needed = least_bytes(facts, context, kv_type or (device.kv_type if device else "f16"))
    if host.memory_bytes is not None and needed > host.memory_bytes:
        raise ValidationError(
            f"{path.name} needs at least {needed / _GIB:.2f} GiB of memory with a context of {context} tokens "
            f"({facts.file_bytes / _GIB:.2f} GiB for the file), and {host.name} has {host.memory_bytes / _GIB:.2f}; "
            "choose a smaller file, a shorter --context or another device."
        )
    if host.available_bytes is not None and needed > host.available_bytes:
        free = host.available_bytes / _GIB
        say(
            f"{path.name} needs at least {needed / _GIB:.2f} GiB, and {host.name} has {free:.2f} free at the moment: "
            "close programs there, or expect it to be slow or to be killed."
        )


def check_disk(host: str, free_bytes: int, missing_bytes: int, new_environment: bool, where: str) -> None:
    """Refuse to begin a copy that the disk cannot hold.

    Raises
    ------
    ValidationError
        When less is free than is to be written.
    """
    needed = missing_bytes + (ENVIRONMENT_BYTES if new_environment else 0)
    if needed > free_bytes:
        raise ValidationError(
            f"{needed / 2**20:,.0f} MiB are to be written to {host}:{where}, and {free_bytes / 2**20:,.0f} are free on "
            "that disk; free some space there, or set XDG_CACHE_HOME there to a larger disk."
        )
