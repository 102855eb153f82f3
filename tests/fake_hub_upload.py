"""A model hub on this machine that also takes uploads: repositories, preupload, LFS batches and commits."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from fake_hub import COMMIT, Hub, HubRequest

TOKEN = "hf_of_this_test"


class UploadHub(Hub):
    """What the hub's client needs to publish a repository."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = UploadRequest
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.commits: list[str] = []  # their summaries
        self.private: dict[str, bool] = {}
        self.sent: list[str] = []  # objects, as often as their bytes came
        self.cards: list[str] = []
        self.refused_puts = 0  # so many uploads fail first
        self.forbidden = False


class UploadRequest(HubRequest, BaseHTTPRequestHandler):
    server: UploadHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/validate-yaml":  # the client asks about a README.md, before anything is sent
            self.server.cards.append(json.loads(body)["content"])
            self.send_json({"errors": [], "warnings": []})
        elif self.server.forbidden or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403 if self.server.forbidden else 401, None)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.preupload(found[1], json.loads(body))
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif path == "/verify":
            asked = json.loads(body)
            known = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
            self.send_json({}, 200 if known else 404)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], body)
        else:
            self.refuse(404, None)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        oid = self.path.rpartition("/")[2]
        if self.server.refused_puts:
            self.server.refused_puts -= 1
            return self.refuse(400, None)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(422, None)
        self.server.objects[oid] = data
        self.server.sent.append(oid)
        return self.send_json({})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.models
        self.server.models.setdefault(name, {})
        self.server.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send_json({"url": f"{self.address}/{name}"}, 409 if known else 200)

    def preupload(self, name: str, asked: dict[str, Any]) -> None:
        if name not in self.server.models:
            return self.refuse(404, "RepoNotFound")
        return self.send_json(
            {
                "files": [
                    {"path": f["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if f["path"].endswith(".gguf") else "regular"}
                    for f in asked["files"]
                ]
            }
        )  # fmt: skip

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            found = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.objects:
                found["actions"] = {
                    "upload": {"href": f"{self.address}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{self.address}/verify"},
                }
            objects.append(found)
        self.send_json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def commit(self, name: str, body: bytes) -> None:
        files = self.server.models[name]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.address}/{name}/commit/{COMMIT}"
        self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def send_json(self, value: object, status: int = 200, kind: str = "application/json") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving_uploads() -> Iterator[UploadHub]:
    """Yield a running server without models, which takes uploads with :data:`TOKEN`."""
    with UploadHub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
