"""The measuring process on the other machine: ``python -m impq_edge.validation.remote.job FOLDER``.

The agent starts it in the environment; what it says goes to a file that the agent passes on.
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from impq_edge.devices.profile import load_device
from impq_edge.errors import ImpqError
from impq_edge.validation.process import Progress
from impq_edge.validation.remote.agent import send
from impq_edge.validation.validate import validate

_SAY_EVERY_S = 0.25


def main() -> None:
    """Validate what lies in the folder; an :class:`ImpqError` travels back as its sentence."""
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(sys.argv[1])
    inputs = folder / "in"
    asked = json.loads((folder / "job.json").read_text("utf-8"))
    try:
        report = validate(
            inputs / asked["file"],
            device=_device(inputs, asked["device"]),
            text=_input(inputs, asked["text"]),
            reference=_input(inputs, asked["reference"]),
            progress=_sometimes(),
            **asked["options"],
        )
    except ImpqError as error:
        send("error", str(error).replace(f"{inputs}/", ""))
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        send("result", report.to_json())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that its own child process is ended with it


def _device(inputs: Path, name: str | None) -> Any:
    if name is None:
        return None
    return load_device(str(inputs / name) if name.startswith("device/") else name)


def _input(inputs: Path, name: str | None) -> Path | None:
    return None if name is None else inputs / name


def _sometimes() -> Progress:
    """Pass progress on, but not more often than anyone can see: it is written to a disk that may be slow."""
    told: dict[str, float] = {}

    def advance(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - told.get(phase, 0.0) > _SAY_EVERY_S:
            told[phase] = now
            send("progress", [phase, done, total])

    return advance


if __name__ == "__main__":
    main()
