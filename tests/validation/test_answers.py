"""What another machine answers is not believed: neither its form nor its size nor its numbers."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fuzz.service_inputs import HOST, PREPARED

from impq_edge.errors import RecordError, ValidationError
from impq_edge.validation.remote.environment import read_prepared
from impq_edge.validation.remote.host import _bytes
from impq_edge.validation.remote.ssh import Connection, Conversation


def heard(program: str) -> object:
    """Return the result of a conversation with a program that stands for the agent."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        with Conversation("board", process, errors) as conversation:
            return conversation.result(lambda *_: None, lambda _: None)


@pytest.mark.parametrize(
    "line",
    ['"result", "value": ' + "[" * 50_000, "", "}", '"result", "value": ' + "9" * 5000 + "}"],
    ids=["deep", "short", "no JSON", "digits"],
)
def test_what_is_no_message_ends_the_conversation_though_the_other_side_goes_on(line: str) -> None:
    told = '{"impq": ' + line
    program = f"import time; print({told!r}, flush=True); time.sleep(600)"
    with pytest.raises(ValidationError, match="never does"):
        heard(program)


def test_a_machine_that_never_stops_talking_fills_no_memory() -> None:
    say = json.dumps({"impq": "say", "value": "x" * 100_000})
    program = f"import sys\nwhile True: print({say!r})"
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
        with pytest.raises(KeyboardInterrupt), Conversation("board", process, errors) as conversation:
            while conversation._messages.qsize() < conversation._messages.maxsize:
                pass
            raise KeyboardInterrupt
    assert process.returncode is not None and conversation._messages.maxsize <= 16


def test_a_shell_that_never_stops_talking_is_cut_off(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *-O*) exit 1 ;; esac\nexec yes\n')
    ssh.chmod(0o700)
    with Connection("board", str(ssh)) as connection:
        assert len(connection.shell("true")) == 1 << 20


@pytest.mark.parametrize(
    "change",
    [{"free_bytes": -1}, {"free_bytes": 10**30}, {"present": []}, {"present": {"a": -5}}, {"python": 5}, {"more": 1}],
)
def test_an_answer_of_another_form_is_refused(change: dict[str, object]) -> None:
    assert read_prepared(PREPARED, HOST).cores == 4
    for answer in (PREPARED | change, None, [], "x"):
        with pytest.raises(RecordError):
            read_prepared(answer, HOST)


def test_memory_of_a_million_digits_is_unknown() -> None:
    assert _bytes("9" * 10**6) is None and _bytes("٣") is None and _bytes("1024") == 1 << 20
