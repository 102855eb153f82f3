"""A server on this machine that answers as the model hub does, as far as finding and downloading a model goes."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40
TAGGED = "b" * 40


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that finding and downloading a model uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.models: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.claimed_bytes: dict[str, int] = {}
        self.withheld: set[str] = set()
        self.status: int | None = None
        self.fetched: list[str] = []
        self.sent_bytes = 0


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.status is not None:
            return self.refuse(self.server.status, None)
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.answer_api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"]:
            return self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.refuse(404, None)

    def answer_api(self, model: str, rest: list[str]) -> None:
        if model not in self.server.models:
            return self.refuse(401, None)  # as the hub answers those who are not logged in
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, "v1": TAGGED, COMMIT: COMMIT, TAGGED: TAGGED}.get(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if rest and rest[0] == "tree":
            return self.send_json([self.tree_entry(model, name) for name in self.server.models[model]])
        return self.send_json({"id": model, "sha": commit, "siblings": []})

    def tree_entry(self, model: str, name: str) -> dict[str, Any]:
        data = self.server.models[model][name]
        return {"type": "file", "path": name, "oid": etag(data), "size": self.size(name, data)}

    def answer_file(self, model: str, commit: str, name: str) -> None:
        if model in self.server.gated:
            self.refuse(403, "GatedRepo")
            return
        if self.command == "GET" and name in self.server.withheld:
            self.refuse(404, "EntryNotFound")
            return
        if name not in self.server.models.get(model, {}):
            known = model in self.server.models
            self.refuse(404 if known else 401, "EntryNotFound" if known else None)
            return
        data = self.server.models[model][name]
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        sent = data[int(part[1]) : int(part[2]) + 1] if part else data
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", {"main": COMMIT, "v1": TAGGED}.get(commit, commit))
        self.send_header("Content-Length", str(len(sent) if part else self.size(name, data)))
        self.end_headers()
        if self.command == "GET":
            self.server.fetched.append(name)
            self.server.sent_bytes += len(sent)
            self.wfile.write(sent)

    def size(self, name: str, data: bytes) -> int:
        return self.server.claimed_bytes.get(name, len(data))

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Yield a running server without models."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
