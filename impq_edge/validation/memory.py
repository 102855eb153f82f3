"""The peak memory of this process, and filling a context so that the peak is the one that can come.

llama.cpp clears the KV cache when it makes it (src/llama-kv-cache.cpp), so that is resident from the
start. The compute buffer is only reserved and the work buffer of the CPU backend grows with the operands:
both become resident as the context fills, so a short prompt alone would understate the peak.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from impq_edge.validation.llama import Engine

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes, mapped weights included."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    import resource  # absent on Windows, where llama.cpp for edge devices is not run

    # macOS counts bytes. Elsewhere it is KiB, and survives exec: no concern in a child started afresh.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def anonymous_bytes() -> int | None:
    """Return the memory this process holds that no file backs and the system cannot drop; Linux only."""
    return _status_bytes("RssAnon") if _STATUS.exists() else None


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found, f"{_STATUS} has no {key}"
    return int(found[1]) * 1024


def fill_context(
    engine: Engine, limit_s: float, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> int:
    """Decode random tokens until the context is full or the time is up; return how many it holds.

    Parameters
    ----------
    engine
        What it held before is forgotten.
    limit_s
        Checked between physical batches, so one of them may still exceed it.
    """
    size, step = engine.settings.context_tokens, engine.settings.ubatch_tokens
    ids = np.random.default_rng(0).integers(engine.vocabulary, size=size, dtype=np.int32)
    engine.clear()
    start = time.monotonic()
    while engine.position < size and (engine.position == 0 or time.monotonic() - start < limit_s):
        engine.decode(ids[engine.position : engine.position + step])
        progress(engine.position, size)
    return engine.position
