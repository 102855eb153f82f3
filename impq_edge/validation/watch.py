"""Following a child process: it and whatever it started end when its time or its memory is up."""

import os
import signal
import subprocess
import threading
import time
from typing import Literal

from impq_edge.validation.status import status_bytes

_STEP_S = 0.05
"""Between two looks: one costs about 40 µs, and a process that fills memory as fast as it can gains some hundred MB."""


class Watch:
    """A thread that follows a child until it ends.

    Parameters
    ----------
    child
        Started as the leader of a process group, where the system has these.
    timeout_s
        After this long it is killed.
    limit_bytes
        Of its peak resident memory, mapped files included: the same number that the memory check is about. Pages of
        a file could be dropped and read again, but every token needs all weights, so a device that has to drop
        some runs at the speed of its disk. None: it may take what it can.
    """

    def __init__(self, child: "subprocess.Popen[str]", timeout_s: float, limit_bytes: int | None) -> None:
        self.cause: Literal["time", "memory"] | None = None  # why it was killed
        self.peak_rss_bytes: int | None = None  # as last seen; None: not looked at
        self._child, self._limit_bytes = child, limit_bytes
        self._deadline = time.monotonic() + timeout_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the child has ended, by itself or not."""
        self._thread.join()

    def stop(self) -> None:
        """Kill what still runs; twice does no harm."""
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while self.cause is None and not self._stopped.is_set() and not self._has_ended():
            self._stopped.wait(min(_STEP_S, max(0.0, self._deadline - time.monotonic())))
            if self._limit_bytes is not None:
                self.peak_rss_bytes = status_bytes("VmHWM", self._child.pid) or self.peak_rss_bytes
                if (self.peak_rss_bytes or 0) > self._limit_bytes:
                    self.cause = "memory"
            if time.monotonic() >= self._deadline and not self._has_ended():
                self.cause = "time"
        self._kill()

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):
            return self._child.poll() is not None
        # Without collecting it: until then no other process can get its number, and its group can be killed.
        try:
            return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _kill(self) -> None:
        if not hasattr(os, "killpg"):
            self._child.kill()
            return
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS says it the second way
            self._child.kill()
