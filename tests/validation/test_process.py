import os
import signal
from pathlib import Path

import pytest

from impq_edge.errors import ValidationError
from impq_edge.validation.process import run_child

JOB = {"kind": "describe"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SIGILL", r"GGML_NATIVE=OFF.*use_extra_bufts off"),
        ("SIGKILL", "killed the process.*choose a shorter context"),
        ("SIGSEGV", "crashed"),
        ("SIGBUS", "check the disk"),
        ("SIGABRT", "ended by SIGABRT: last words"),
    ],
)
def test_a_signal_becomes_a_sentence(name: str, said: str) -> None:
    code = (
        f"import os, signal, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.{name})"
    )
    with pytest.raises(ValidationError, match=said) as caught:
        run_child(JOB, timeout_s=60, arguments=("-c", code))
    assert "\n" not in str(caught.value)


def test_an_unexpected_exception_is_told_with_its_last_line() -> None:
    with pytest.raises(ValidationError, match="status 1: ZeroDivisionError"):
        run_child(JOB, timeout_s=60, arguments=("-c", "1 / 0"))


def test_a_child_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValidationError, match="status 0: it said nothing"):
        run_child(JOB, timeout_s=60, arguments=("-c", "pass"))


SPEAK = (
    "import json, os, sys, time; print(json.dumps({'progress': ['pid', os.getpid(), 0]}), flush=True); time.sleep(600)"
)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_time_out_ends_the_child() -> None:
    heard: list[int] = []
    with pytest.raises(ValidationError, match="not done after 2 s"):
        run_child(JOB, timeout_s=2, arguments=("-c", SPEAK), progress=lambda _stage, pid, _total: heard.append(pid))
    assert _is_gone(heard[0])


def test_ctrl_c_ends_the_child() -> None:
    heard: list[int] = []

    def interrupt(_stage: str, pid: int, _total: int) -> None:
        heard.append(pid)
        signal.raise_signal(signal.SIGINT)

    # Shells start background jobs with the signal ignored; Python then has no handler of its own.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_child(JOB, timeout_s=60, arguments=("-c", SPEAK), progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert _is_gone(heard[0])


def test_stray_output_cannot_corrupt_the_result() -> None:
    code = (
        "import ctypes, os, impq_edge.validation.jobs as jobs; from impq_edge.validation import child\n"
        "def noisy(progress):\n"
        "    print('{\"result\": 1}', flush=True); os.write(1, b'noise\\n'); ctypes.CDLL(None).puts(b'more')\n"
        "    progress('a', 1, 2)\n"
        "    return {'answer': 42}\n"
        "jobs.JOBS['describe'] = noisy\n"
        "child.main()"
    )
    heard: list[tuple[str, int, int]] = []
    result = run_child(JOB, timeout_s=60, arguments=("-c", code), progress=lambda *step: heard.append(step))
    assert result == {"answer": 42}
    assert heard == [("a", 1, 2)]


def test_the_sentence_of_a_child_arrives_as_it_is(demo_gguf: Path) -> None:
    settings = {"context_tokens": 512, "threads": 1, "outputs_tokens": 64}
    job = {"kind": "score", "file": str(demo_gguf), "settings": settings, "text": "Too short.", "windows": 1}
    with pytest.raises(ValidationError, match="shorter than one window of 512"):
        run_child(job, timeout_s=60)


def test_an_unfit_library_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('libllama.so: wrong ELF class')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValidationError, match=r"wrong ELF class.*install it again"):
        run_child(JOB, timeout_s=60)


def test_modules_beside_a_model_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    assert run_child(JOB, timeout_s=60)["system_info"]
