"""A checkpoint that changes under a command: what was read of it is of what was hashed, or the command ends."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.errors import ModelError
from impq_edge.model.load import load_block, load_outside, read_tensor
from impq_edge.model.source import Source
from impq_edge.model.spec import ModelSpec, read_model, require_unchanged
from impq_edge.model.weights import find_tensor
from impq_edge.stages import open_model


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["qwen3"], tmp_path / "model"))


def flip(path: Path) -> None:
    """Write other weights in place, with the size and time of modification of the old."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        values = np.frombuffer(file.read(1 << 20), np.uint8) ^ 1
        file.seek(before.st_size // 2)
        file.write(values.tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_all(model: Path, spec: ModelSpec) -> None:
    for tensor in spec.tensors:
        read_tensor(model, tensor)


def test_weights_of_the_same_size_and_time_are_noticed(model: Path) -> None:
    spec = read_model(model)
    read_all(model, spec)
    flip(model / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"model\.safetensors: a file of the checkpoint, which changed while .*run the"
    ):
        read_all(model, spec)
    with pytest.raises(ModelError, match=re.escape(f"{model}/model.safetensors: ")):
        require_unchanged(model, spec)
    assert read_model(model).content_sha256 != spec.content_sha256


def test_another_file_under_the_name_is_noticed_while_it_is_read(model: Path) -> None:
    spec = read_model(model)
    tensor = find_tensor(model, spec.tensors[0])
    tensor.rows(0, 1)
    shutil.copy2(model / "model.safetensors", model / "other")
    flip(model / "other")
    (model / "other").replace(model / "model.safetensors")
    with pytest.raises(ModelError, match="changed while"):
        tensor.rows(1, 2)


def test_a_file_that_was_only_touched_is_the_same(model: Path) -> None:
    spec = read_model(model)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data)
    os.utime(model / "config.json", (0, 0))  # a clock that was set to 1970, and beyond 2100
    os.utime(model / "tokenizer.json", (5e9, 5e9))
    read_all(model, spec)
    require_unchanged(model, spec)
    assert read_model(model) == spec


def test_all_files_that_changed_are_named_and_those_that_came_or_went(model: Path) -> None:
    spec = read_model(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as told:
        require_unchanged(model, spec)
    assert re.findall(r"model/(\S+?)[,:]", str(told.value)) == [
        "chat_template.jinja", "config.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_a_stage_refuses_what_an_earlier_one_did_not_see(model: Path) -> None:
    _, spec = open_model(str(model))
    source = Source(str(model), "m", model, content_sha256=spec.content_sha256)
    assert open_model(source)[1].content_sha256 == spec.content_sha256
    flip(model / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: a file of the checkpoint, which changed"):
        open_model(source)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        open_model(source)


def test_a_game_does_not_play_what_becomes_of_the_file(model: Path) -> None:
    """safetensors maps files: what is written to one would change weights that were read, and a cut one would kill."""
    spec = read_model(model)
    cpu = torch.device("cpu")
    loaded = load_outside(model, spec, cpu, torch.float32)
    layer = loaded.model.layers[0]
    load_block(model, spec, layer, 0, cpu, torch.float32)
    before = {name: value.clone() for name, value in [*layer.named_parameters(), ("out", loaded.lm_head.weight)]}
    size = (model / "model.safetensors").stat().st_size
    with (model / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    os.truncate(model / "model.safetensors", 10)
    after = dict([*layer.named_parameters(), ("out", loaded.lm_head.weight)])
    assert all(torch.equal(before[name], after[name]) for name in before)
