"""The ladder, against the whole model in transformers with the weights of one player replaced."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from impq_edge.backends.kquant import KQuant
from impq_edge.errors import SensitivityError
from impq_edge.ggml.types import LADDER, type_for_row
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model
from impq_edge.model.players import PlayerKind, players_of
from impq_edge.model.spec import read_model
from impq_edge.spqe.journal import Journal
from impq_edge.spqe.ladder import LadderProfile
from impq_edge.spqe.run import game_settings
from impq_edge.spqe.rungs import measure_ladder
from impq_edge.spqe.table import Job

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(10, 8000, size=(2, 48))


def job_of(directory: Path, players: PlayerKind, encode: str = "rtn", device: str = "cpu") -> Job:
    windows, backend = Windows(TOKENS, "text"), KQuant(encode)
    settings = game_settings("kquant", backend, windows, players=players, device=device)
    return Job(directory, read_model(directory), backend, windows, settings)


def measured(directory: Path, path: Path, players: PlayerKind, types: tuple[int, ...], **options: str) -> LadderProfile:
    job = job_of(directory, players, **options)
    return measure_ladder(job, types, 4096, Journal(path, {"model": job.spec.content_sha256}))


def by_transformers(directory: Path, players: PlayerKind, types: tuple[int, ...]) -> np.ndarray:
    spec = read_model(directory)
    model = load_model(directory, spec, CPU, torch.float32)
    ids = torch.from_numpy(TOKENS)

    @torch.inference_mode()
    def log_p() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(dim=-1)

    reference, found = log_p(), []
    for player in players_of(spec, players, outer=True):
        for bits in types:
            kept = {t: model.get_parameter(t.name).data.clone() for t in player.tensors}
            for tensor, weight in kept.items():
                stored = KQuant().store(weight, type_for_row(LADDER[bits], tensor.shape[-1]), None).weight
                model.get_parameter(tensor.name).data.copy_(stored)
            found.append((reference.exp() * (reference - log_p())).sum(dim=-1).mean(dim=1).tolist())
            for tensor, weight in kept.items():
                model.get_parameter(tensor.name).data.copy_(weight)
    return np.array(found)


@pytest.mark.parametrize(
    ("architecture", "players", "changes"),
    [
        ("llama", "blocks", {}),
        ("llama", "sublayers", {"hidden_size": 320, "num_hidden_layers": 2}),  # rows that hold no K-quants
        ("qwen3", "tensors", {"num_hidden_layers": 2}),  # a head with weights of its own
        ("gemma2", "blocks", {}),
    ],
)
def test_divergences_are_those_of_the_whole_model(
    tmp_path: Path, architecture: str, players: PlayerKind, changes: dict
) -> None:
    directory, types = make_checkpoint(tmp_path / "model", architecture, **changes), (2, 4, 8)
    made = measured(directory, tmp_path / "journal", players, types)
    expected = by_transformers(directory, players, types)
    found = np.array([rung.divergences for rung in made.rungs])
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-6)
    table = made.divergences()
    assert table == pytest.approx(expected.mean(axis=1).reshape(-1, 3), rel=2e-3, abs=2e-6)
    assert np.array_equal(made.divergences((2, 8)), table[:, [0, 2]])
    assert (table[:, 0] > table[:, 2]).all()


@pytest.mark.parametrize("encode", ["imatrix", "gptq"])
def test_a_run_that_was_cut_goes_on_and_gives_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, encode: str
) -> None:
    directory, types = checkpoints["qwen3"], (2, 3, 6)
    whole = measured(directory, tmp_path / "whole", "blocks", types, encode=encode)
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 1 + len(whole.rungs)
    for kept in (1, 2, 6, len(lines) - 1):
        (tmp_path / "cut").write_text("".join(lines[:kept]))
        again = measured(directory, tmp_path / "cut", "blocks", types, encode=encode)
        assert again == whole
        assert (tmp_path / "cut").read_text() == "".join(lines)
        (tmp_path / "cut").unlink()


def test_types_that_are_stored_alike_cost_alike(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama", hidden_size=320, num_hidden_layers=1)
    made = measured(directory, tmp_path / "journal", "tensors", (2, 3, 4))
    table = dict(zip([player.name for player in made.who], made.divergences(), strict=True))
    assert table["blk.0.attn_q"][0] == table["blk.0.attn_q"][1] > table["blk.0.attn_q"][2]  # rows of 320: Q4_0, Q5_0
    assert table["blk.0.ffn_down"][0] > table["blk.0.ffn_down"][1] > table["blk.0.ffn_down"][2]  # rows of 512


def test_records_that_contradict_themselves_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    made = measured(checkpoints["llama"], tmp_path / "journal", "blocks", (2, 4))
    path = tmp_path / "ladder.json"
    made.save(path)
    assert LadderProfile.load(path) == made
    for change in (
        {"types": (2, 3)},
        {"types": (4, 2)},
        {"types": (2, 7)},
        {"types": (2,)},
        {"rungs": made.rungs[:-1]},
        {"rungs": made.rungs[::-1]},
        {"reference_losses": (1.0,)},
        {"covariance": ((1.0,),)},
        {"rungs": (dataclasses.replace(made.rungs[0], divergences=(np.nan, 0.0)), *made.rungs[1:])},
    ):
        with pytest.raises(SensitivityError) as caught:
            dataclasses.replace(made, **change)
        assert "\n" not in str(caught.value)
    with pytest.raises(SensitivityError, match="not at 6"):
        made.divergences((2, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_cuda_agrees_with_the_cpu(tmp_path: Path, architecture: str) -> None:
    directory = make_checkpoint(tmp_path / "model", architecture)
    made, expected = (
        measured(directory, tmp_path / device, "blocks", (2, 4, 8), device=device) for device in ("cuda", "cpu")
    )
    # bfloat16 keeps 8 bits of each activation, on both sides of a divergence.
    assert made.divergences() == pytest.approx(expected.divergences(), rel=0.1, abs=2e-3)
