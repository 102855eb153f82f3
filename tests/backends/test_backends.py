import logging
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest

from impq_edge.backends import NAMES, describe, load_backend, undisturbed
from impq_edge.errors import BackendError

NEEDS = {"kquant": "llama_cpp", "hqq": "hqq", "quanto": "optimum.quanto", "gptq": "gptqmodel"}

# A process of its own, because a library is imported once.
LOAD = """
import logging, os, sys
def state():
    root = logging.getLogger()
    return dict(os.environ), root.level, list(root.handlers), root.manager.disable, sys.stdout, sys.stderr
before = state()
import torch
from impq_edge.backends import Inputs, load_backend
load_backend(sys.argv[1]).quantise(torch.ones(64, 256).tril(), 4, Inputs(256, torch.ones(256), torch.eye(256)))
assert sys.argv[1] == "kquant" or sys.argv[2] in sys.modules  # ggml is a shared object
changed = [(b, a) for b, a in zip(before, state()) if b != a]
assert not changed, changed
"""


def skip_without(name: str) -> None:
    if not find_spec(NEEDS[name]):
        pytest.skip(f"{NEEDS[name]} is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_loading_and_using_a_library_leaves_no_trace(name: str) -> None:
    skip_without(name)
    command = [sys.executable, "-c", LOAD, name, NEEDS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_can_tell_what_quantised(name: str) -> None:
    skip_without(name)
    told = describe(name, load_backend(name))
    assert told["name"] == name and str(told["library"]).split()[1][0].isdigit()


def test_settings_are_told_and_recorded() -> None:
    backend = load_backend("hqq", group_size=32, axis=0)
    assert describe("hqq", backend) | {"library": ""} == {"name": "hqq", "library": "", "group_size": 32, "axis": 0}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BackendError, match="'awq' is unknown; choose one of kquant, hqq, quanto, gptq"):
        load_backend("awq")
    with pytest.raises(BackendError, match="'hqq' has no setting 'col-our'; it takes group-size, axis"):
        load_backend("hqq", col_our="red")
    with pytest.raises(BackendError, match="'quanto' has no setting 'axis'; it takes group-size, dtype"):
        load_backend("quanto", axis=0)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.delitem(sys.modules, "impq_edge.backends.hqq", raising=False)
    with pytest.raises(BackendError, match=r"'hqq' needs hqq.*; install impq-edge\["):
        load_backend("hqq")


def test_undisturbed_keeps_everything_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IMPQ_KEPT", "before")
    monkeypatch.setenv("IMPQ_REMOVED", "before")
    monkeypatch.delenv("IMPQ_ADDED", raising=False)
    before, filters = dict(os.environ), list(warnings.filters)
    with pytest.raises(RuntimeError, match="inside"), undisturbed():
        os.environ["IMPQ_KEPT"] = os.environ["IMPQ_ADDED"] = "after"
        del os.environ["IMPQ_REMOVED"]
        print("a banner")
        print("a banner", file=sys.stderr)
        warnings.simplefilter("ignore")
        logging.getLogger("a.library").warning("a warning")
        raise RuntimeError("inside")
    assert dict(os.environ) == before and list(warnings.filters) == filters
    assert capsys.readouterr() == ("", "") and not caplog.records
    print("afterwards")
    logging.getLogger("a.library").warning("afterwards")
    assert capsys.readouterr().out == "afterwards\n" and len(caplog.records) == 1


def test_undisturbed_leaves_the_root_logger_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # basicConfig does nothing where there are handlers
    monkeypatch.setattr(root, "level", logging.WARNING)
    with undisturbed():
        logging.basicConfig(level=logging.DEBUG)  # as tokenicer does on import
    assert (root.level, root.handlers) == (logging.WARNING, [])


def test_what_a_library_says_later_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    with undisturbed():
        handler = logging.StreamHandler()  # bound to stderr as it is now; transformers does so on import
    logger = logging.Logger("a.library")
    logger.addHandler(handler)
    logger.warning("the model is too old")
    with undisturbed():
        logger.error("not now")
    assert capsys.readouterr() == ("", "the model is too old\n")
