"""Feed broken inputs to one way in, in a process with little memory, and report what came out as JSON lines.

Usage: python -m fuzz.worker COUNT SEED TARGET [TARGET …]
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.targets import Target, targets

from impq_edge.errors import ImpqError

SECONDS = 5  # of processor time for one input
MEMORY_BYTES = 1 << 30  # beyond what the libraries have set aside
LONGEST_SENTENCE = 1500


class TooSlowError(BaseException):
    """No handler of errors may take it for one."""


def main() -> None:
    """Read every input, one folder each, and stop a target at its third failure."""
    count, seed, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    signal.signal(signal.SIGVTALRM, _too_slow)
    signal.signal(signal.SIGALRM, _too_slow)
    warnings.simplefilter("error")
    _limit_memory()
    for name in names:
        print(json.dumps(_run(targets()[name], count, seed)), flush=True)


def _run(target: Target, count: int, seed: int) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest_s = 0.0
    for index in range(count):
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(f"{target.name} {seed} {index}")
            given = _odd_file(target.write(Path(folder), rng), rng) if _is_odd(target, rng) else None
            given = given or target.write(Path(folder), random.Random(f"{target.name} {seed} {index}"))
            start = time.process_time()
            outcome = _read(target, given)
            slowest_s = max(slowest_s, time.process_time() - start)
        outcomes[outcome.split("\n")[0] if not outcome.startswith("!") else "failed"] += 1
        if outcome.startswith("!"):
            failures.append({"index": index, "what": outcome[1:]})
            if len(failures) == int(os.environ.get("IMPQ_FUZZ_FAILURES", "3")):
                break
    return {"target": target.name, "outcomes": outcomes, "slowest_s": slowest_s, "failures": failures}


def _is_odd(target: Target, rng: random.Random) -> bool:
    return target.of_one_file and rng.random() < 0.02


def _odd_file(path: Path, rng: random.Random) -> Path:
    """Put something that is no file, or no finite one, where the input was."""
    path.unlink(missing_ok=True)
    match rng.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("nowhere")
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            path.touch()
    return path


def _read(target: Target, given: Path) -> str:
    """Return "read", "refused", or "!" and what is wrong."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.alarm(12 * SECONDS)  # for what waits without working, on a machine that may be busy
    try:
        target.read(given)
    except ImpqError as error:
        return _judge(str(error))
    except TooSlowError:
        return "!too slow\n" + traceback.format_exc()
    except BaseException:
        return "!" + traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.alarm(0)
    return "read"


def _judge(sentence: str) -> str:
    if not sentence.endswith(".") or not sentence.isprintable() or len(sentence) > LONGEST_SENTENCE:
        return f"!no sentence: {sentence[:2000]!r}"
    return "refused"


def _too_slow(_signal: int, _frame: object) -> None:
    raise TooSlowError


def _limit_memory() -> None:
    for target in targets().values():  # makes every seed and loads every library before memory is short
        with tempfile.TemporaryDirectory() as folder:
            target.write(Path(folder), random.Random(0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
