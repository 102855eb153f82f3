"""Nothing in a checkpoint runs: neither pickles nor Python files nor what configurations name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

import impq_edge
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.errors import ModelError
from impq_edge.model.load import load_model, load_outside
from impq_edge.model.spec import read_model

AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
}  # fmt: skip

MORE = {
    "auto_map": AUTO_MAP, "trust_remote_code": True, "custom_generate": "generate.py", "tokenizer_class": "Evil",
    "_attn_implementation": "some-org/evil-kernel", "use_kernels": True,
}  # fmt: skip


class Canary:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def planted(checkpoints: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with code in every place where something may look for it, and the file that the code would make."""
    directory, canary = Path(shutil.copytree(checkpoints["llama"], tmp_path / "model")), tmp_path / "ran"
    code = f"open({str(canary)!r}, 'w').close()\n"
    names = ("modeling_evil", "configuration_evil", "tokenization_evil", "conftest", "sitecustomize", "torch", "json")
    for name in (*names, "custom_generate/generate", "__init__", "modeling_llama"):
        path = directory / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "rng_state.pth", "model.pt", "a.npy"):
        (directory / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = directory / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | MORE))
    return directory, canary


def test_a_pickle_makes_the_canary(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "else the other tests would show nothing"


def test_code_beside_the_weights_is_never_run(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    directory, canary = planted
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    monkeypatch.chdir(directory)  # where a Python that looks beside it would find more
    spec = read_model(directory, "model")
    cpu = torch.device("cpu")
    for load in (load_model, load_outside):
        model = load(directory, spec, cpu, torch.float32)
        assert type(model).__module__ == "transformers.models.llama.modeling_llama"
        assert model.config._attn_implementation == "sdpa"
    impq_edge.convert(
        str(directory), out=tmp_path / "out.gguf", type="q4_k",
        encode=EncodeOptions("imatrix", calibration_tokens=512, window_tokens=256, compute="cpu"),
    )  # fmt: skip
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_weights_that_are_only_pickles_are_refused_unread(planted: tuple[Path, Path], name: str) -> None:
    directory, canary = planted
    (directory / "pytorch_model.bin").rename(directory / name)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelError, match="only as pickles"):
        read_model(directory)
    assert not canary.exists()


def test_a_model_type_that_contradicts_the_architecture_chooses_nothing(planted: tuple[Path, Path]) -> None:
    import torch

    directory, _ = planted
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    spec = read_model(directory)
    model = load_model(directory, spec, torch.device("cpu"), torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_an_adapter_that_would_change_the_weights_is_refused(planted: tuple[Path, Path]) -> None:
    directory, _ = planted
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    with pytest.raises(ModelError, match="holds an adapter"):
        read_model(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(planted: tuple[Path, Path], name: str) -> None:
    import os

    directory, _ = planted
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ModelError, match="no regular file"):
        read_model(directory)
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="no regular file"):
        read_model(directory)
