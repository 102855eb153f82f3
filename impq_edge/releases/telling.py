"""What a person is told of an allocation once it is made."""

from collections import Counter
from collections.abc import Callable

from impq_edge.impq.allocation import Allocation

Say = Callable[[str], None]
"""Told a sentence a person should read now."""


def say_allocation(allocation: Allocation, say: Say) -> None:
    """Say what was chosen, what speaks for it, and how fast it should be."""
    left = allocation.budget_bytes - allocation.predicted_file_bytes
    if allocation.everything_fits:
        say(
            f"Everything fits {allocation.device} at {allocation.types[-1]} bit; {left / 2**20:,.1f} MiB would be left."
        )
    else:
        counts = Counter(allocation.player_bits)
        players = ", ".join(f"{counts[bits]} at {bits}" for bits in allocation.types if counts[bits])
        known = allocation.evidence.told() if allocation.evidence else "proven optimal for the profile"
        say(
            f"Of {len(allocation.player_bits)} players {players} bit, "
            f"{allocation.average_bits:.2f} bits on average, "
            f"{allocation.predicted_file_bytes:,} bytes; {known}."
        )
    if allocation.speeds is not None:
        say(f"Speed {allocation.speeds.summary(allocation.device)}.")
