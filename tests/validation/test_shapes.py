"""A model read back from its GGUF is the one it was made from, as far as speed and memory go."""

import dataclasses
from pathlib import Path

import pytest
from calibrated import calibrated
from checkpoints import ARCHITECTURES

from impq_edge.devices.latency import predict_speeds
from impq_edge.devices.memory import memory_plan
from impq_edge.devices.profile import load_device
from impq_edge.errors import ValidationError
from impq_edge.model.spec import read_model
from impq_edge.validation.shapes import read_shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_is_read_back(checkpoints: dict[str, Path], tiny_ggufs: dict[str, Path], architecture: str) -> None:
    spec, types = read_shapes(tiny_ggufs[architecture])
    true = read_model(checkpoints[architecture])
    unknown = ("rms_epsilon", "rope_theta", "rope_scaling", "attention_softcap", "final_softcap")
    same = {name: getattr(true.hyperparameters, name) for name in unknown}
    assert dataclasses.replace(spec.hyperparameters, **same) == true.hyperparameters
    shapes = {tensor.gguf_name: (tensor.shape, tensor.role, tensor.block) for tensor in true.tensors}
    assert {tensor.gguf_name: (tensor.shape, tensor.role, tensor.block) for tensor in spec.tensors} == shapes
    device = calibrated(load_device("raspberry-pi-5"))
    assert predict_speeds(spec, types, device) == predict_speeds(true, types, device)
    assert memory_plan(spec, types, 1, device) == memory_plan(true, types, 1, device)


def test_what_is_no_such_model_is_refused(tiny_ggufs: dict[str, Path], tmp_path: Path) -> None:
    whole = tiny_ggufs["llama"].read_bytes()
    for what, other, message in (
        (b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
         b"general.architecture\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00mamba", "holds a mamba model"),
        (b"token_embd.weight", b"token_embx.weight", "not a dense llama model"),
        (b"llama.block_count", b"llama.block_coumt", "not a dense llama model"),
    ):  # fmt: skip
        assert whole.count(what) == 1
        path = tmp_path / "other.gguf"
        path.write_bytes(whole.replace(what, other))
        with pytest.raises(ValidationError, match=message):
            read_shapes(path)
