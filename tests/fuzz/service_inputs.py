"""What other machines answer, the hub and an edge device: sound answers to break, and who listens to them."""

import functools
import itertools
import json
import random
import subprocess
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fake_hub
from fuzz import seeds
from fuzz.mutations import broken_bytes, broken_json

from impq_edge.model import hub
from impq_edge.model.source import fetch, find
from impq_edge.validation.remote.environment import read_prepared
from impq_edge.validation.remote.host import Host
from impq_edge.validation.remote.run import _report
from impq_edge.validation.remote.ssh import Conversation
from impq_edge.validation.report import ValidationReport

PREPARED = {
    "cache": "/home/me/.cache/impq-edge/device", "free_bytes": 10**10, "present": {"0" * 64: 5}, "python": None,
    "renewable": False, "cores": 4, "compiler": "/usr/bin/c++",
}  # fmt: skip
HOST = Host("me@board", "aarch64", "Linux", "/usr/bin/python3", (3, 11), 10**9, 10**9)
HEADERS = ("ETag", "X-Repo-Commit", "X-Linked-Size", "X-Linked-ETag", "Location", "X-Error-Code")
VALUES = ('"../../../canary"', "../../../../canary", "", "x" * 500, "-1", "9" * 30, "NaN", "file:///etc/passwd", '"a"')
_numbers = itertools.count()


class _Hub(fake_hub.Hub):
    """Breaks what it answers; every input has a repository of its own, so that no cache answers for it."""

    rng = random.Random(0)
    breaks_json = breaks_files = False
    header: tuple[str, str] | None = None

    def __init__(self) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), _Request)
        self.models, self.gated, self.claimed_bytes = {}, set(), {}
        self.withheld, self.status, self.fetched, self.sent_bytes = set(), None, [], 0


class _Request(fake_hub.HubRequest):
    server: _Hub

    def send_json(self, value: object) -> None:
        if not self.server.breaks_json:
            return super().send_json(value)
        body = broken_json(value, self.server.rng)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def send_header(self, keyword: str, value: str) -> None:
        changed = self.server.header
        super().send_header(keyword, changed[1] if changed is not None and changed[0] == keyword else value)


@functools.cache
def _hub() -> _Hub:
    server = _Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    constants.ENDPOINT = f"http://127.0.0.1:{server.server_address[1]}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = tempfile.mkdtemp(prefix="fuzz-hub-")
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 2
    return server


def hub_answers(folder: Path, rng: random.Random) -> Path:
    """Choose what the hub answers wrongly, and write the name of the repository."""
    server, name = _hub(), f"org/m{next(_numbers)}"
    files = dict(seeds.checkpoint("shards"))
    server.rng, server.models, server.header = random.Random(rng.random()), {name: files}, None
    kind = rng.randrange(3)
    server.breaks_json = kind == 0
    if kind == 1:
        server.header = (rng.choice(HEADERS[:2]), rng.choice(VALUES))
    elif kind == 2:
        file = rng.choice(list(files))
        files[file] = broken_bytes(files[file], rng, within=200)
    (folder / "name").write_text(name)
    return folder


def ask_hub(folder: Path) -> None:
    """Find the model and fetch it, and ask for its shapes alone."""
    name = (folder / "name").read_text()
    hub.headers(name, None)
    where = fetch(find(name))
    assert "models--org--" in str(where)


def agent_answers(folder: Path, rng: random.Random) -> Path:
    """Write what the agent says: progress, words, and an answer that is broken in some way."""
    answer: Any = rng.choice((PREPARED, seeds.record(ValidationReport)))
    lines: list[Any] = [
        {"impq": "progress", "value": ["hash", 1, 2]}, {"impq": "say", "value": "a sentence"},
        {"impq": rng.choice(("result", "result", "result", "parts", "error")), "value": answer},
    ]  # fmt: skip
    said = b""
    for line in lines:
        data = json.dumps(line).encode() if rng.random() < 0.5 else broken_json(line, rng)
        said += (broken_bytes(data, rng) if rng.random() < 0.1 else data) + b"\n"
    (folder / "said").write_bytes(said * rng.choice((1, 1, 1, 40)))
    return folder / "said"


def hear_agent(path: Path) -> None:
    """Listen to it and read the answer as both of what is asked for."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(["cat", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        with Conversation(HOST.name, process, errors) as conversation:
            answer = conversation.result(_progress, _say)
    if isinstance(answer, dict) and "schema" in answer:
        _report(HOST, answer)
    else:
        read_prepared(answer, HOST)


def _progress(phase: str, done: int, total: int) -> None:
    assert phase.isprintable()
    assert 0 <= done <= total


def _say(sentence: str) -> None:
    assert sentence.isprintable()
