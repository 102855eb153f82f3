"""A model by its shapes: what ships, directories, and the hub without its weights."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ARCHITECTURES, make_checkpoint
from fake_hub import COMMIT, Hub, serving

from impq_edge.errors import ModelError
from impq_edge.model.shapes import NO_CONTENT, find_shapes, shipped_names, shipped_shapes
from impq_edge.model.spec import ModelSpec, read_model

PUBLISHED_WEIGHTS = {  # as model cards round them
    "Llama-3.2-1B": "1.24", "Llama-3.2-3B": "3.21", "Llama-3.1-8B": "8.03", "gemma-2-2b": "2.61", "gemma-2-9b": "9.24",
    "Qwen3-0.6B": "0.60", "Qwen3-1.7B": "1.72", "Qwen3-4B": "4.02", "Qwen3-8B": "8.19",
}  # fmt: skip

SCRIPT = """
import json, sys
from impq_edge.errors import ModelError
from impq_edge.model.shapes import find_shapes
try:
    found = find_shapes(sys.argv[1], sys.argv[2] or None)
    told = {"tensors": [[t.name, t.gguf_name, t.shape, t.role, t.block] for t in found.spec.tensors],
            "name": found.spec.name, "origin": found.origin, "vocabulary_known": found.vocabulary_known}
except ModelError as error:
    told = {"error": str(error)}
print(json.dumps(told))
"""


def same_tensors(spec: ModelSpec) -> list[tuple[Any, ...]]:
    return [(t.gguf_name, t.shape, t.role, t.block) for t in spec.tensors]


# ---- what ships -----------------------------------------------------------------------------------------------------


def test_the_models_that_ship() -> None:
    assert set(shipped_names()) == PUBLISHED_WEIGHTS.keys()
    for name, weights in PUBLISHED_WEIGHTS.items():
        assert f"{find_shapes(name).spec.weights / 1e9:.2f}" == weights
    for shipped in shipped_shapes():
        assert shipped.sources.keys() == {"config", "vocabulary"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        ("llama-3.1-8b-instruct", "Llama-3.1-8B-Instruct"),
        ("google/gemma-2-9b-it", "gemma-2-9b-it"),
        ("Qwen3-4B", "Qwen3-4B"),
    ],
)
def test_names_and_aliases_are_found_without_the_hub(asked: str, name: str) -> None:
    found = find_shapes(asked)
    assert found.spec.name == name and found.vocabulary_known and found.spec.content_sha256 == NO_CONTENT
    assert "the hub was not asked" in found.origin


def test_another_owner_of_a_shipped_name_is_not_taken_for_it() -> None:
    with pytest.raises(ModelError):
        find_shapes("somebody/with/Llama-3.1-8B")


def test_a_name_of_nothing_lists_what_ships() -> None:
    with pytest.raises(ModelError, match=r"neither a directory.*Shapes ship for Llama-3.1-8B, .*Qwen3-8B"):
        find_shapes("nothing-here")


def test_without_huggingface_hub_the_shipped_shapes_are_named() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; " + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", code, "org/model", ""], check=True, capture_output=True, text=True
    )  # fmt: skip
    error = json.loads(done.stdout)["error"]
    assert "pip install" in error and "Shapes ship for" in error


# ---- directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_directory_gives_the_tensors_that_building_finds(
    architecture: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole = read_model(checkpoints[architecture])
    found = find_shapes(str(checkpoints[architecture])).spec
    assert found.tensors == whole.tensors and found.hyperparameters == whole.hyperparameters
    shutil.copy(checkpoints[architecture] / "config.json", tmp_path)
    alone = find_shapes(str(tmp_path))
    assert same_tensors(alone.spec) == same_tensors(whole)
    assert alone.origin.startswith("config.json in") and not alone.vocabulary_known


def test_without_safetensors_the_configuration_is_enough(checkpoints: dict[str, Path]) -> None:
    code = "import sys; sys.modules['safetensors'] = None; " + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoints["llama"], ""], check=True, capture_output=True, text=True
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["origin"].startswith("config.json in") and told["vocabulary_known"]
    assert len(told["tensors"]) == len(read_model(checkpoints["llama"]).tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate_size": 768}, "do not belong together"),
        ({"num_hidden_layers": 4}, "lacks 9 tensors"),
        ({"architectures": ["BertModel"]}, "'BertModel' is not supported"),
        ({"hidden_size": "many"}, "hidden_size is 'many'"),
    ],
)
def test_a_configuration_that_is_wrong(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=words):
        find_shapes(str(directory))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "../nothing"])
def test_names_that_are_no_path(name: str) -> None:
    with pytest.raises(ModelError):
        find_shapes(name)


def test_a_revision_of_a_directory_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="leave the revision out"):
        find_shapes(str(checkpoints["llama"]), "main")


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="hub ids need the workstation install")
    with serving() as server:
        for name, directory in checkpoints.items():
            files = {path.name: path.read_bytes() for path in directory.iterdir()}
            weights = files["model.safetensors"]
            # More than any header: to send all of it would be told by the number of bytes.
            server.models[f"org/{name}"] = files | {"model.safetensors": weights + bytes(10_000_000)}
        yield server


@pytest.fixture
def ask(tmp_path: Path, hub: Hub) -> Callable[..., dict[str, Any]]:
    """Find shapes in a fresh process: the hub's library reads its settings when it is imported."""

    def run(model: str, revision: str = "", **environment: str) -> dict[str, Any]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", **environment}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, model, revision],
            check=True, capture_output=True, text=True, env=ours, timeout=300,
        )  # fmt: skip
        assert done.stderr == ""
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    return run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hub_id_costs_the_headers_alone(
    architecture: str, hub: Hub, ask: Callable[..., dict[str, Any]], checkpoints: dict[str, Path]
) -> None:
    told = ask(f"org/{architecture}")
    whole = read_model(checkpoints[architecture])
    assert [tuple(t[1:2]) for t in told["tensors"]] == [(t.gguf_name,) for t in whole.tensors]
    assert [t[0] for t in told["tensors"]] == [t.name for t in whole.tensors]
    assert "no weights were downloaded" in told["origin"] and told["name"] == architecture
    assert set(hub.fetched) == {"config.json", "model.safetensors"} and hub.sent_bytes < 200_000


def test_shards_are_read_by_the_index(hub: Hub, ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "split", "qwen3", shards=3)
    hub.models["org/split"] = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len(ask("org/split")["tensors"]) == len(read_model(directory).tensors)


def test_a_revision_of_a_name_that_ships_asks_the_hub(hub: Hub, ask: Callable[..., dict[str, Any]]) -> None:
    hub.models["Qwen/Qwen3-4B"] = hub.models["org/qwen3"]
    assert len(ask("Qwen/Qwen3-4B", "v1")["tensors"]) < len(find_shapes("Qwen3-4B").spec.tensors)
    assert hub.fetched


def test_headers_that_contradict_the_configuration(hub: Hub, ask: Callable[..., dict[str, Any]]) -> None:
    hub.models["org/llama"]["config.json"] = hub.models["org/llama"]["config.json"].replace(b"512", b"768")
    assert "do not belong together" in ask("org/llama")["error"]
    body = json.dumps({"model.norm.weight": {"dtype": "I8", "shape": [256], "data_offsets": [0, 256]}}).encode()
    hub.models["org/qwen3"]["model.safetensors"] = struct.pack("<Q", len(body)) + body + bytes(256)
    assert "start from an unquantised checkpoint" in ask("org/qwen3")["error"]
    hub.models["org/gemma2"]["model.safetensors"] = b"\xff" * 64
    assert "choose another repository" in ask("org/gemma2")["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hub: hub.gated.add("org/llama"), "is gated"),
        (lambda hub: hub.models.pop("org/llama"), "may see"),
        (lambda hub: setattr(hub, "status", 410), "status 410"),
        (lambda hub: hub.models["org/llama"].pop("model.safetensors"), "choose another repository"),
        (lambda hub: hub.models["org/llama"].pop("config.json"), "choose another repository"),
    ],
)
def test_refusals_say_what_ships(
    change: Callable[[Hub], Any], words: str, hub: Hub, ask: Callable[..., dict[str, Any]]
) -> None:
    change(hub)
    error = ask("org/llama")["error"]
    assert words in error and "Shapes ship for Llama-3.1-8B" in error and "\n" not in error


def test_offline_the_cache_answers_for_what_was_planned_before(hub: Hub, ask: Callable[..., dict[str, Any]]) -> None:
    assert "HF_HUB_OFFLINE" in ask("org/llama", HF_HUB_OFFLINE="1")["error"]
    before = ask("org/llama")
    after = ask("org/llama", HF_HUB_OFFLINE="1")
    assert "in the hub's cache" in after["origin"] and after["name"] == before["name"]
    assert [t[1:] for t in after["tensors"]] == [t[1:] for t in before["tensors"]]
    assert COMMIT not in after["name"]
