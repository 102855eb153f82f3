"""Keeping a library's own words off stdout, where a record may be read from."""

import contextlib
import ctypes
import os
from collections.abc import Iterator


@contextlib.contextmanager
def c_stdout_dropped() -> Iterator[None]:
    """Drop what C and C++ print to stdout meanwhile, in the whole process.

    HiGHS 1.12, which SciPy 1.17 holds, prints ``HighsMipSolverData::… tmpSolver.run();`` whatever its options
    (HiGHS issue 2783).
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        libc.fflush(None)  # else what is buffered would follow later
        os.dup2(kept, 1)
        os.close(kept)
