"""Files whose encoder knows the inputs, against hooks on transformers' own model and against one another."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from impq_edge import stages
from impq_edge.conversion.encoder import EncodeOptions
from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.tensors import row_order
from impq_edge.errors import ConversionError
from impq_edge.ggml.encode import encode
from impq_edge.ggml.types import TensorType
from impq_edge.model.load import load_model, read_tensor
from impq_edge.model.spec import ModelSpec, TensorSpec, read_model
from impq_edge.spqe.options import GameOptions

TOKENS = 1024


def written(directory: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    """The tensors' bytes of a uniform file, by name."""
    encoding = {key: options.pop(key) for key in ("encode", "imatrix") if key in options}
    given = EncodeOptions(calibration_tokens=TOKENS, compute="cpu", **encoding)
    stages.convert(str(directory), out=out, **{"type": "q2_k", **options}, encode=given)
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out).tensors}


def moments(directory: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """E[x xᵀ] of what enters every matrix and the head, by transformers, in float64."""
    windows = stages.calibration_windows(directory, None, TOKENS, 512).tokens
    model = load_model(directory, spec, torch.device("cpu"), torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({f"{name}.weight": args[0]}))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(windows), use_cache=False)
    flat = {
        name: (x[:, :-1] if name == "lm_head.weight" else x).flatten(0, 1).double().clone() for name, x in seen.items()
    }
    return {name: x.T @ x / len(x) for name, x in flat.items()}


def in_file_order(spec: ModelSpec, tensor: TensorSpec, data: np.ndarray) -> np.ndarray:
    order = row_order(spec, tensor)
    return data if order is None else data[order]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_the_importance_matrix_is_the_mean_square_of_the_inputs(
    checkpoints: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Summed in another order, so that a few codes on the edge may differ; most bytes would with other weights."""
    directory = checkpoints[architecture]
    spec = read_model(directory)
    found, plain = (written(directory, tmp_path / e, encode=e) for e in ("imatrix", "rtn"))
    expected = moments(directory, spec)
    for tensor in spec.tensors:
        kind = TensorType.Q6_K if tensor.block is None else TensorType.Q2_K
        if tensor.role == "vector":
            assert np.array_equal(found[tensor.gguf_name], plain[tensor.gguf_name])
            continue
        tied = spec.hyperparameters.tied_embeddings
        diagonal = None
        if tensor.role != "embedding" or tied:
            diagonal = expected["lm_head.weight" if tensor.block is None else tensor.name].diagonal().float().numpy()
        if tensor.role == "embedding" and diagonal is not None:
            diagonal = diagonal + diagonal.mean()
        data = encode(read_tensor(directory, tensor), kind, importance=diagonal)
        got = found[tensor.gguf_name].view(np.uint8).reshape(data.shape)
        assert (got == in_file_order(spec, tensor, data)).mean() > 0.995, tensor.gguf_name
        if diagonal is not None and tensor.block is not None:
            assert (got == plain[tensor.gguf_name].view(np.uint8).reshape(data.shape)).mean() < 0.9


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_gptq_moves_the_outputs_less(checkpoints: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    directory = checkpoints[architecture]
    spec = read_model(directory)
    expected = moments(directory, spec)
    errors = {}
    for encoder in ("rtn", "imatrix", "gptq"):
        found = written(directory, tmp_path / encoder, encode=encoder)
        total = 0.0
        for tensor in spec.tensors:
            if tensor.role == "matrix":
                data = found[tensor.gguf_name].view(np.uint8).reshape(tensor.shape[0], -1)
                values = gguf.dequantize(data, TensorType.Q2_K.ggml)
                apart = torch.from_numpy(in_file_order(spec, tensor, read_tensor(directory, tensor)) - values).double()
                moment = expected[tensor.name]
                total += float((apart @ moment * apart).sum() / moment.trace())
        errors[encoder] = total
    assert errors["gptq"] < 0.8 * errors["imatrix"] < 0.8 * errors["rtn"]


def test_the_file_holds_what_the_game_was_played_with(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that the game left are found: no text passes through the model again, and the file is the same."""
    directory, kept = checkpoints["qwen3"], tmp_path / "kept"
    game = GameOptions(
        backend_settings={"encode": "gptq"}, permutations=1, tokens=512, calibration_tokens=TOKENS, compute="cpu"
    )
    stages.profile(str(directory), out=tmp_path / "p.json", game=game, kept=kept)
    files = sorted(path for path in kept.rglob("*") if path.is_file())
    assert len(files) == 2 * 3 * 7
    plain = {"encode": "gptq", "outer_type": "q8_0"}  # the embedding is in no game
    fresh = {kind: written(directory, tmp_path / f"fresh-{kind}", type=kind, **plain) for kind in ("q2_k", "q4_k")}
    assert not list(tmp_path.glob("*.encoded"))

    def refuse(*_: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr("impq_edge.conversion.calibrated.open_walk", refuse)
    for kind, expected in fresh.items():
        again = written(directory, tmp_path / f"{kind}.gguf", type=kind, kept=kept, **plain)
        assert again.keys() == expected.keys()
        assert all(np.array_equal(again[name], expected[name]) for name in expected)
        assert (tmp_path / f"{kind}.gguf").read_bytes() == (tmp_path / f"fresh-{kind}").read_bytes()


def test_a_run_that_was_killed_goes_on(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints["llama"]
    whole = written(directory, tmp_path / "whole.gguf", encode="gptq", outer_type="q8_0")
    asked: list[str] = []

    def read_few(directory: Path, tensor: TensorSpec) -> np.ndarray:
        asked.append(tensor.gguf_name)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return read_tensor(directory, tensor)

    monkeypatch.setattr("impq_edge.conversion.calibrated.read_tensor", read_few)
    with pytest.raises(KeyboardInterrupt):
        written(directory, tmp_path / "cut.gguf", encode="gptq", outer_type="q8_0")
    assert not (tmp_path / "cut.gguf").exists() and (tmp_path / "cut.gguf.encoded").is_dir()
    again = written(directory, tmp_path / "cut.gguf", encode="gptq", outer_type="q8_0")
    assert len(asked) == len(set(asked)) + 1  # the one it was killed in
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert not (tmp_path / "cut.gguf.encoded").exists()
    before = (tmp_path / "cut.gguf").stat().st_mtime_ns
    written(directory, tmp_path / "cut.gguf", encode="gptq", outer_type="q8_0")
    assert (tmp_path / "cut.gguf").stat().st_mtime_ns == before  # whole, and of the same inputs


def test_an_importance_matrix_from_a_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory, path = checkpoints["qwen3"], tmp_path / "imatrix.gguf"
    made = stages.imatrix(str(directory), out=path, calibration_tokens=TOKENS, compute="cpu")
    read = Imatrix.read(path)
    assert read.sums.keys() == made.sums.keys() and read.chunk_count == 2
    text, file = written(directory, tmp_path / "a", encode="imatrix"), written(directory, tmp_path / "b", imatrix=path)
    for name in read.sums:
        assert (text[name] == file[name]).mean() > 0.999
    with pytest.raises(ConversionError, match="no effect with --encode gptq"):
        EncodeOptions(encode="gptq", imatrix=path)
    other = make_checkpoint(tmp_path / "other", "qwen3", num_hidden_layers=4)
    with pytest.raises(ConversionError) as caught:
        written(other, tmp_path / "c", imatrix=path)
    assert "\n" not in str(caught.value) and not (tmp_path / "c").exists()
