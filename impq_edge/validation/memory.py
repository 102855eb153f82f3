"""The peak memory of this process, and filling a context so that the peak is the one that can come.

llama.cpp clears the KV cache when it makes it (src/llama-kv-cache.cpp), so that is resident from the
start. The compute buffer is only reserved and the work buffer of the CPU backend grows with the operands:
both become resident as the context fills, so a short prompt alone would understate the peak.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

from impq_edge.validation.llama import Engine
from impq_edge.validation.status import status_bytes

_ALLOWANCE_BYTES = 64 << 20  # arenas that the C library sets aside for new threads


def limit_data(limit_bytes: int, threads: int) -> None:
    """Let the system refuse this process more memory for data than a limit, from now on.

    What it counts is set aside rather than used, so what numpy's and llama.cpp's libraries have set aside
    without using it so far is added, and the stacks of the threads to come. Mapped files do not count.
    """
    import resource

    set_aside = (status_bytes("VmData") or 0) - (status_bytes("RssAnon") or 0)
    stack, most = resource.getrlimit(resource.RLIMIT_STACK)[0], resource.getrlimit(resource.RLIMIT_DATA)[1]
    stacks = threads * (8 << 20 if stack == resource.RLIM_INFINITY else stack)
    wanted = limit_bytes + max(0, set_aside) + stacks + _ALLOWANCE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes, mapped weights included."""
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # absent on Windows, where llama.cpp for edge devices is not run

    # macOS counts bytes. Elsewhere it is KiB, and survives exec: no concern in a child started afresh.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def anonymous_bytes() -> int | None:
    """Return the memory this process holds that no file backs and the system cannot drop; Linux only."""
    return status_bytes("RssAnon")


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
