"""A real sshd of our own on the loopback interface, and the ssh that reaches it."""

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)


class Sshd:
    """The other machine: this one, seen through ssh, with a cache and an environment of its own."""

    def __init__(self, folder: Path, *, lines: tuple[str, ...] = (), **environment: str | Path) -> None:
        self.folder = folder
        self.cache = folder / "cache of the device"
        self.environment = {"XDG_CACHE_HOME": self.cache, **environment}
        self.lines = lines

    def __enter__(self) -> "Sshd":
        self.folder.mkdir(parents=True, exist_ok=True)
        _skip_where_it_cannot_run()
        for name in ("host_key", "user_key", "other_key"):
            if not (self.folder / name).exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "sshd_config").write_text(self._server_configuration())
        (self.folder / "ssh_config").write_text(self._client_configuration())
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        with _one_core():
            self.process = subprocess.Popen(
                [str(SSHD), "-D", "-e", "-f", self.folder / "sshd_config"],
                stdin=subprocess.DEVNULL, stderr=(self.folder / "sshd.log").open("wb"),
            )  # fmt: skip
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self.process.kill()
        self.process.wait()

    @property
    def ssh(self) -> str:
        """What to pass as --ssh."""
        return f"ssh -F {shlex.quote(str(self.folder / 'ssh_config'))}"

    @property
    def store(self) -> Path:
        """Where everything is kept there."""
        return self.cache / "impq-edge" / "device"

    def drop(self) -> None:
        """End every connection as a cut cable does, as far as both ends can tell."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)

    def _server_configuration(self) -> str:
        variables = " ".join(f'"{key}={value}"' for key, value in self.environment.items())
        return "\n".join(
            [
                f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host_key",
                f"AuthorizedKeysFile {self.folder}/authorized_keys", "StrictModes no", "UsePAM no", "PidFile none",
                "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes",
                f"SetEnv {variables}", *self.lines, "",
            ]
        )  # fmt: skip

    def _client_configuration(self) -> str:
        return "\n".join(
            [
                "Host board", "HostName 127.0.0.1", f"Port {self.port}", f"User {getpass.getuser()}",
                f"IdentityFile {self.folder}/user_key", "IdentitiesOnly yes", "IdentityAgent none",
                f"UserKnownHostsFile {self.folder}/known_hosts", "StrictHostKeyChecking yes", "",
            ]
        )  # fmt: skip

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.skip(f"sshd does not start here: {(self.folder / 'sshd.log').read_text()[-300:]}")


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """What starts here has one core: llama.cpp's threads spin as they wait, which a busy machine punishes."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def _skip_where_it_cannot_run() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("these tests read /proc and bind processes to cores, as only Linux lets them")
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("OpenSSH's client and server are not installed (Debian: apt-get install openssh-server)")
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        try:
            Path("/run/sshd").mkdir(mode=0o755)  # which its service makes elsewhere
        except OSError as error:
            pytest.skip(f"sshd needs /run/sshd: {error}")
