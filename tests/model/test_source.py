"""A checkpoint's source, tried against a server on this machine that answers as the hub does.

``huggingface_hub`` reads its settings when it is imported, so every call runs in a fresh process.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, TAGGED, Hub, serving

from impq_edge.errors import ModelError
from impq_edge.model import source

huggingface_hub = pytest.importorskip("huggingface_hub", reason="hub ids need the workstation install")

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never fetched",
    "modeling_own.py": b"never fetched",
    "onnx/model.safetensors": b"never fetched",
    "consolidated.safetensors": b"never fetched",
}
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
WANTED_BYTES = sum(len(FILES[name]) for name in WANTED)

SCRIPT = """
import json, sys
from impq_edge.errors import ModelError
from impq_edge.model import source
steps = []
try:
    found = source.find(sys.argv[1], sys.argv[2] or None)
    directory = source.fetch(found, steps.append) if sys.argv[3] == "fetch" else found.directory
    told = {"directory": directory and str(directory), "commit": found.commit, "download_bytes": found.download_bytes,
            "cached_bytes": found.cached_bytes, "cache_only": found.cache_only, "summary": found.summary(),
            "advanced_bytes": sum(steps)}
except ModelError as error:
    told = {"error": str(error)}
print(json.dumps(told))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        server.models["org/model"] = dict(FILES)
        yield server


def ask(
    cache: Path, endpoint: str, model: str = "org/model", revision: str = "", verb: str = "fetch", **environment: str
) -> dict[str, Any]:
    """Find, and unless told otherwise fetch, a model in a fresh process."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "5", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, revision, verb],
        env=ours,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def url(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def assert_one_sentence(told: dict[str, Any], *words: str) -> None:
    assert "error" in told, told
    assert "\n" not in told["error"]
    assert told["error"].endswith(".")
    for word in words:
        assert word in told["error"]


def test_fetches_only_what_makes_a_checkpoint(hub: Hub, tmp_path: Path) -> None:
    told = ask(tmp_path, url(hub))
    directory = Path(told["directory"])
    assert {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()} == WANTED
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert set(hub.fetched) == WANTED
    assert told["commit"] == COMMIT == directory.name
    assert told["advanced_bytes"] == told["download_bytes"] == WANTED_BYTES


def test_finding_tells_the_bytes_and_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    told = ask(tmp_path, url(hub), verb="find")
    assert told["directory"] is None
    assert told["download_bytes"] == WANTED_BYTES
    assert "1.0 MiB to download" in told["summary"]
    assert hub.fetched == []


def test_a_revision_is_resolved_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    told = ask(tmp_path, url(hub), revision="v1")
    assert told["commit"] == TAGGED == Path(told["directory"]).name


def test_what_is_cached_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    ask(tmp_path, url(hub))
    hub.fetched.clear()
    told = ask(tmp_path, url(hub))
    assert hub.fetched == []
    assert (told["download_bytes"], told["cached_bytes"], told["advanced_bytes"]) == (0, WANTED_BYTES, 0)
    assert told["summary"].endswith("from the cache")


@pytest.mark.parametrize("offline", ["set", "hub gone", "hub broken"])
def test_without_the_hub_the_cached_commit_serves(hub: Hub, tmp_path: Path, offline: str) -> None:
    online = ask(tmp_path, url(hub))
    endpoint = "http://127.0.0.1:9" if offline == "hub gone" else url(hub)
    hub.status = 503 if offline == "hub broken" else None
    told = ask(tmp_path, endpoint, HF_HUB_OFFLINE="1" if offline == "set" else "0")
    assert told["directory"] == online["directory"]
    assert told["cache_only"] is True
    assert "from the cache alone" in told["summary"]


def test_offline_with_nothing_cached(tmp_path: Path) -> None:
    told = ask(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert_one_sentence(told, "org/model", "HF_HUB_OFFLINE")


def test_no_network_with_nothing_cached(tmp_path: Path) -> None:
    told = ask(tmp_path, "http://127.0.0.1:9")
    assert_one_sentence(told, "org/model", "check the network", "HF_ENDPOINT")


def test_half_a_download_is_not_taken_for_a_checkpoint_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.withheld.add("model.safetensors")
    assert_one_sentence(ask(tmp_path, url(hub)), "org/model", "run the same command again")
    assert_one_sentence(ask(tmp_path, url(hub), HF_HUB_OFFLINE="1"), "not complete in the cache")
    hub.withheld.clear()
    told = ask(tmp_path, url(hub))
    assert told["download_bytes"] == len(WEIGHTS)
    assert (Path(told["directory"]) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_gated_model_names_the_two_steps(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add("org/model")
    assert_one_sentence(ask(tmp_path, url(hub), verb="find"), "org/model is gated", "accept its conditions", "HF_TOKEN")


def test_an_unknown_model(hub: Hub, tmp_path: Path) -> None:
    told = ask(tmp_path, url(hub), "org/missing", verb="find")
    assert_one_sentence(told, "'org/missing' is neither a directory here nor a model on the hub")


def test_an_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    assert_one_sentence(ask(tmp_path, url(hub), revision="v9"), "no revision 'v9'")


@pytest.mark.parametrize(("status", "words"), [(401, "spelling"), (403, "token"), (429, "wait"), (500, "later")])
def test_other_refusals(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.status = status
    assert_one_sentence(ask(tmp_path, url(hub), verb="find"), "org/model", words)


def test_a_repository_without_safetensors_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    del hub.models["org/model"]["model.safetensors"]
    assert_one_sentence(ask(tmp_path, url(hub)), "org/model has no model*.safetensors")
    assert hub.fetched == []


def test_a_model_larger_than_the_disk_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_bytes["model.safetensors"] = 2**60
    assert_one_sentence(ask(tmp_path, url(hub)), "1073741824.0 GiB", "HF_HOME")
    assert hub.fetched == []


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache's directory belongs")
    assert_one_sentence(ask(tmp_path, url(hub)), str(tmp_path / "hub"), "HF_HOME")


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    found = source.find(str(tmp_path))
    assert source.fetch(found) == tmp_path
    assert found.name == tmp_path.name
    assert source.checkpoint(str(tmp_path)) == tmp_path


def test_the_demo_needs_neither_network_nor_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    directory = source.checkpoint(source.DEMO)
    assert (directory / "config.json").exists()
    assert source.find(source.DEMO).name == "tiny-llama3"


@pytest.mark.parametrize("model", ["", ".", "demo"])
def test_a_revision_belongs_to_a_hub_id(model: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(ModelError):
        source.find(model, "main")


@pytest.mark.parametrize("model", ["", "name", "./missing", "/missing", "a/b/c", "with space/x", "a--b/c\0", "x" * 300])
def test_a_name_of_no_known_form(model: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(ModelError) as caught:
        source.find(model)
    assert "\n" not in str(caught.value)
    assert repr(model) in str(caught.value)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        source.find(str(file))
