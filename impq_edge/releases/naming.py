"""What files are called. No name leads out of the directory it is meant for."""

from pathlib import Path

from impq_edge.impq.allocation import Allocation


def file_name(allocation: Allocation, setting: str = "") -> str:
    """Return the conventional name of an allocation's file; ``setting`` tells two of one device apart."""
    device = Path(allocation.device).name + (f"-{setting}" if setting else "")
    return f"{allocation.model_name}-{device}-IMPQ-{allocation.bits_per_weight:.2f}bpw.gguf"
