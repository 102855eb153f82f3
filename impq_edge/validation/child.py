"""The child process: a job as JSON on stdin, progress and the result as JSON lines on what was stdout.

Everything that calls llama.cpp's inference runs here, because a wrong build ends the process rather than
the call. It imports no more than it needs: its memory is what the validation reports.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from impq_edge.errors import ImpqError, ValidationError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Do one job and exit; an :class:`ImpqError` travels back as its sentence."""
    _end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # whatever prints to stdout from now on, Python or C, cannot corrupt the channel

        def send(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        job = json.load(sys.stdin)
        try:
            result = _do(job, lambda stage, done, total: send(progress=[stage, done, total]))
        except ImpqError as error:
            send(error=str(error))
        else:
            send(result=result)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent is gone, which may have had no time to do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _do(job: dict[str, Any], progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    try:
        from impq_edge.validation.jobs import JOBS
        from impq_edge.validation.memory import limit_data
    except (ImportError, OSError, RuntimeError) as error:  # what llama_cpp raises when its library is unfit
        raise ValidationError(
            f"llama-cpp-python cannot be loaded ({error}); install it again with "
            "pip install --force-reinstall --no-deps llama-cpp-python."
        ) from None
    limit_bytes = job.pop("data_limit_bytes", None)
    if limit_bytes is not None:
        limit_data(limit_bytes, job.get("settings", {}).get("threads", 1))
    return JOBS[job.pop("kind")](progress, **job)


if __name__ == "__main__":
    main()
