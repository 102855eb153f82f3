import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from impq_edge.errors import ModelError
from impq_edge.model.spec import ModelSpec, read_model


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "copy"))


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_record_survives_the_disk(checkpoints: dict[str, Path], architecture: str, tmp_path: Path) -> None:
    spec = read_model(checkpoints[architecture])
    spec.save(tmp_path / "spec.json")
    assert ModelSpec.load(tmp_path / "spec.json") == spec
    assert spec.hyperparameters.architecture == architecture
    assert [tensor.gguf_name for tensor in spec.block_matrices(1)] == sorted(
        f"blk.1.{name}.weight"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
    )


def test_sharded_and_single_file_are_the_same_model_but_other_content(tmp_path: Path) -> None:
    one = read_model(make_checkpoint(tmp_path / "one", "qwen3"))
    three = read_model(make_checkpoint(tmp_path / "three", "qwen3", shards=3))
    assert [(t.gguf_name, t.shape) for t in one.tensors] == [(t.gguf_name, t.shape) for t in three.tensors]
    assert {t.shard for t in three.tensors} == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_content_hash_follows_every_byte(copy: Path) -> None:
    before = read_model(copy).content_sha256
    shard = copy / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert read_model(copy).content_sha256 != before


def test_new_form_of_the_configuration_says_the_same(checkpoints: dict[str, Path], copy: Path) -> None:
    old = json.loads((copy / "config.json").read_text())
    scaling = old.pop("rope_scaling")
    theta = old.pop("rope_theta")
    old["dtype"] = old.pop("torch_dtype")
    (copy / "config.json").write_text(json.dumps({**old, "rope_parameters": {**scaling, "rope_theta": theta}}))
    assert read_model(copy).hyperparameters == read_model(checkpoints["llama"]).hyperparameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported"),
        ({"architectures": []}, "'none' is not supported"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": 128}, "shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "has no place|not part"),
        ({"hidden_size": "many"}, "hidden_size is 'many'"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_configurations_that_cannot_be_converted(copy: Path, changes: dict[str, object], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(ModelError, match=message):
        read_model(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ],
)
def test_gemma_that_llama_cpp_would_compute_differently(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    directory = Path(shutil.copytree(checkpoints["gemma2"], tmp_path / "gemma"))
    edit(directory, **changes)
    with pytest.raises(ModelError, match=message):
        read_model(directory)


def test_missing_shard(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors .* missing"):
        read_model(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="1 of 2 shards"):
        read_model(directory)


@pytest.mark.parametrize("kept", [0, 4, 100, 1000, -1])
def test_truncated_shard(copy: Path, kept: int) -> None:
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ModelError, match="truncated, malformed or unreadable"):
        read_model(copy)


def test_pickles_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        read_model(copy)


def test_an_index_cannot_point_out_of_the_directory(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../../etc/passwd"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a plain file name"):
        read_model(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"architectures": 5}', "null", "[" * 100000])
def test_broken_configuration(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(ModelError):
        read_model(copy)


def test_missing_directory_and_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        read_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_model(tmp_path)
