"""The system's ssh as a transport: one authentication, many calls, and a sentence for each way it can fail.

The user's own configuration, keys, agent and jump hosts are ssh's business; only what a program needs is set
here. After the first call the others share its connection (ControlMaster), through a socket in a directory of
ours, so that a passphrase is asked for once and the user's own shared connections are left alone.
"""

import base64
import contextlib
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from impq_edge.errors import ValidationError
from impq_edge.records import from_json, shown
from impq_edge.validation.process import Progress
from impq_edge.validation.remote import agent

Say = Callable[[str], None]
"""Called with a sentence that is not the result."""

_HOST_CHARACTERS = re.compile(r"(?:ssh://)?[A-Za-z0-9_.@:%+\[\]-]+")
_CONNECT_TIMEOUT_S = 20
_ALIVE_S, _ALIVE_COUNT = 15, 4  # a network that is silent for a minute counts as broken
_KEEP_S = 60  # the shared connection outlives a killed parent by so long
_JOIN_S = 0.05
_STOP_S = 25.0  # for the other side to end what it started, a little longer than its own patience
_SSH_FAILED = 255  # ssh's own status; any other is the remote command's
_MAX_FOLDER_CHARACTERS = 60  # a socket's path holds 104 on macOS, and ssh appends a name and a random ending
_MAX_LINE_BYTES = 1 << 24
_MAX_SAID_BYTES = 1 << 20  # by the shell: a dozen lines, and what a login script prints
_MAX_WAITING = 16  # messages; a machine that says more is read no faster than it is heeded
_MAX_TEXT_CHARACTERS = 2000

# What ssh says in its last line, and what to do about it.
_FAILURES = (
    ("permission denied", "it takes none of your keys; check the user's name and ~/.ssh/config, or copy a key there "
                          "with ssh-copy-id"),
    ("host key verification failed", "its host key is unknown or has changed; connect once by hand with ssh and check "
                                     "the key"),
    ("could not resolve hostname", "no such host is known; check the name, or give the address"),
    ("connection refused", "nothing listens for ssh there; check the port, and that sshd runs"),
    ("timed out", "it does not answer; check that it is switched on and reachable from here"),
    ("no route to host", "there is no route to it; check the network"),
    ("network is unreachable", "there is no route to it; check the network"),
    ("too open", "your private key may be read by others, so ssh ignores it; chmod 600 it"),
)  # fmt: skip


class ConnectionLostError(ValidationError):
    """The connection broke; what was done so far is kept on the other side."""


def check_host(host: str) -> str:
    """Return a destination that ssh, a shell and a ProxyCommand can only read as a destination.

    Raises
    ------
    ValidationError
        When it could be taken for an option or a command, or is empty.
    """
    parts = host.removeprefix("ssh://").split("@")
    if not _HOST_CHARACTERS.fullmatch(host) or not all(parts) or any(part.startswith("-") for part in parts):
        raise ValidationError(
            f"--on {plain(host)!r} is no destination for ssh; write user@host, or a name of your ~/.ssh/config, of "
            "letters, digits and . _ - : @ only."
        )
    return host


def plain(text: str) -> str:
    """Return what another machine said without anything a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_TEXT_CHARACTERS]).strip()


class Connection:
    """One other machine, for as long as the context lasts.

    Parameters
    ----------
    host
        As ssh takes it.
    command
        The ssh to use and options of one's own, which win over ours.
    """

    def __init__(self, host: str, command: str = "ssh") -> None:
        self.host = check_host(host)
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise ValidationError(f"--ssh {command!r} cannot be read ({error}); quote it as in a shell.") from None
        if not self._command or shutil.which(self._command[0]) is None:
            raise ValidationError(f"{command!r} is not installed; install OpenSSH's client, or name it with --ssh.")
        self._shared = False
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        folder = tempfile.mkdtemp(prefix="impq-")
        if len(folder) > _MAX_FOLDER_CHARACTERS:
            Path(folder).rmdir()
            folder = tempfile.mkdtemp(prefix="impq-", dir="/tmp")  # only its owner may enter
        self._folder = Path(folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shared:
            self._control("exit")
        shutil.rmtree(self._folder or "", ignore_errors=True)

    def shell(self, script: str) -> str:
        """Run a POSIX shell script there and return what it prints; the first call, which may ask for a passphrase.

        Raises
        ------
        ValidationError
            When the host cannot be reached or lets nobody in.
        """
        with tempfile.TemporaryFile() as errors:  # a pipe would stay open in the shared connection's process
            command = self._arguments("exec sh -s")
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
                assert process.stdin
                assert process.stdout
                with contextlib.suppress(BrokenPipeError):  # it ended: its status says why
                    process.stdin.write(script.encode())
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                said = process.stdout.read(_MAX_SAID_BYTES)
                if len(said) == _MAX_SAID_BYTES:
                    process.kill()  # what it says beyond is no answer
            if process.returncode == _SSH_FAILED:
                raise ValidationError(self._unreachable(errors))
        self._shared = self._control("check")
        return said.decode("utf-8", "replace")

    @contextlib.contextmanager
    def talk(self, python: str, request: dict[str, Any]) -> Iterator["Conversation"]:
        """Start the agent there with a request; it is gone when the context ends."""
        source = base64.b64encode(zlib.compress(Path(agent.__file__).read_bytes(), 9)).decode()
        # Nothing in here that any shell, POSIX or not, treats specially between single quotes.
        start = f'import base64,zlib;exec(zlib.decompress(base64.b64decode("{source}")))'
        remote = f"exec {shlex.quote(python)} -P -c '{start}' {agent.encode(request)}"
        with tempfile.TemporaryFile() as errors:
            # In a group of its own, so that Ctrl-C reaches us and not it: the job there is then stopped in order.
            # Nothing may ask for a passphrase from there.
            process = subprocess.Popen(
                self._arguments(remote, batch=self._shared), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, process_group=0 if self._shared else None,
            )  # fmt: skip
            with Conversation(self.host, process, errors) as conversation:
                yield conversation

    def ask(self, python: str, request: dict[str, Any], progress: Progress, say: Say) -> Any:
        """Return the answer to a request that takes nothing further."""
        with self.talk(python, request) as conversation:
            return conversation.result(progress, say)

    def _arguments(self, remote: str, *, batch: bool = False) -> list[str]:
        settings = {
            "BatchMode": "yes" if batch or not sys.stdin.isatty() else "no",
            "ConnectTimeout": _CONNECT_TIMEOUT_S,
            "ServerAliveInterval": _ALIVE_S,
            "ServerAliveCountMax": _ALIVE_COUNT,
            "ControlMaster": "auto",
            "ControlPath": f"{self._folder}/s",
            "ControlPersist": _KEEP_S,
            "LogLevel": "ERROR",
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "RequestTTY": "no",
        }
        options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        return [*self._command, *options, "--", self.host, remote]

    def _control(self, what: str) -> bool:
        arguments = self._arguments("")[:-2]  # without "--"'s host and command
        done = subprocess.run(
            [*arguments[:-1], "-O", what, "--", self.host], check=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode == 0

    def _unreachable(self, errors: IO[bytes]) -> str:
        said = _said(errors)
        for words, remedy in _FAILURES:
            if words in said.lower():
                return f"{self.host} cannot be reached: {remedy} (ssh: {_last(said)})."
        return f"{self.host} cannot be reached (ssh: {_last(said)}); try ssh {self.host} by hand."


class Conversation:
    """One call of the agent: bytes to it, messages from it."""

    def __init__(self, host: str, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        self._host, self._process, self._errors = host, process, errors
        self._messages: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        while self._reader.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._messages.get(timeout=_JOIN_S)
        assert self._process.stdout
        self._process.stdout.close()
        self._process.wait()

    def write(self, data: bytes) -> None:
        """Send bytes.

        Raises
        ------
        ValidationError
            Why the other side listens no more.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:  # it has said why, or the connection is gone
            self.result(lambda *_: None, lambda _: None)
            raise self._ended() from None

    def expect(self, kinds: set[str], progress: Progress, say: Say) -> tuple[str, Any]:
        """Wait for a message of one of these kinds and return it.

        Raises
        ------
        ValidationError
            With the other side's sentence, or one for how it ended; ConnectionLostError where it was the connection.
        """
        while (message := self._next()) is not None:
            if message[0] in kinds:
                return message
            self._heed(*message, progress, say)
        raise self._ended()

    def result(self, progress: Progress, say: Say) -> Any:
        """Return the answer; errors as for :meth:`expect`."""
        return self.expect({"result"}, progress, say)[1]

    def heed(self, progress: Progress, say: Say) -> None:
        """Pass on what has been said so far, without waiting."""
        while not self._messages.empty():
            message = self._next()
            if message is None:
                raise self._ended()
            self._heed(*message, progress, say)

    def acknowledge(self) -> None:
        """Say that a job's answer has arrived and need not be kept there."""
        self._last_word(b"ack\n")

    def stop(self) -> None:
        """Tell a job there to end, and give it the time."""
        self._last_word(b"stop\n")

    def _last_word(self, word: bytes) -> None:
        assert self._process.stdin
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.write(word)
            self._process.stdin.close()
            self._process.wait(_STOP_S)

    def _heed(self, kind: str, value: Any, progress: Progress, say: Say) -> None:
        if kind == "error":
            raise ValidationError(f"On {self._host}: {_told(value).rstrip('.')}.")
        if kind == "say":
            say(f"On {self._host}: {_told(value)}")
        match value:
            case [str() as phase, int() as done, int() as total] if kind == "progress" and 0 <= done <= total < 1 << 62:
                progress(plain(phase), done, total)

    def _read(self) -> None:
        assert self._process.stdout
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stdout.readline(_MAX_LINE_BYTES):
                if line.startswith(b'{"impq"') and line.endswith(b"\n"):  # else a login script's
                    self._messages.put(line)
        self._messages.put(None)

    def _next(self) -> tuple[str, Any] | None:
        """Wait for a message; None where there are no more. One at a time is taken apart: they may be large."""
        line = self._messages.get()
        if line is None:
            return None
        try:
            message = from_json(line.decode())
            return str(message["impq"]), message.get("value")
        except (ValueError, RecursionError):
            raise self.nonsense() from None

    def nonsense(self) -> ValidationError:
        """Return the error for an answer that no agent gives."""
        return ValidationError(
            f"{self._host} sent what this program's agent never does; check what runs there, or use --remote-clean all."
        )

    def _ended(self) -> ValidationError:
        status, said = self._process.wait(), _said(self._errors)
        if status == _SSH_FAILED or (status == 1 and not said):
            return ConnectionLostError(
                f"The connection to {self._host} was lost; run the same command again, which goes on where it stopped."
            )
        return ValidationError(
            f"Python on {self._host} ended with status {status} ({_last(said)}); check its memory and its Python, or "
            "name another with --remote-python."
        )


def _told(value: object) -> str:
    return plain(value) if isinstance(value, str) else shown(value)


def _said(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read(1 << 16).decode("utf-8", "replace").strip()


def _last(said: str) -> str:
    return plain(said.splitlines()[-1]) if said else "it said nothing"
