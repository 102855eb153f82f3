"""A cell of the study, played for real on a small random model; its texts; and what it is examined on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from impq_edge.backends import load_backend
from impq_edge.errors import ModelError
from impq_edge.model.calibration import Windows
from impq_edge.model.load import load_model
from impq_edge.model.spec import read_model
from impq_edge.spqe.profile import GameSettings
from impq_edge.spqe.table import Job
from impq_edge.study.cell import Plan, run_cell
from impq_edge.study.cells import Cell, cell_path
from impq_edge.study.lab import Lab
from impq_edge.study.remembering import Remembering
from impq_edge.study.texts import calibration_stretch, exam_stretch

TOKENS = np.random.default_rng(0).integers(10, 8000, size=(7, 48))
WINDOWS, HELD_OUT = Windows(TOKENS[:3], "calibration"), Windows(TOKENS[3:], "held out")


def job_of(directory: Path, backend: str = "quanto") -> Job:
    settings = GameSettings({"name": backend}, "blocks", "", WINDOWS.tokens.size, 48, "cpu", "float32")
    return Job(directory, read_model(directory), load_backend(backend), WINDOWS, settings)


def test_losses_and_divergences_are_those_of_whole_models(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints["qwen3"]
    job = job_of(directory)
    lab = Lab(job, {"other": HELD_OUT}, tmp_path / "journal")
    coalition = (2, 4, 2)
    whole, quantised = (load_model(directory, job.spec, torch.device("cpu"), torch.float32) for _ in range(2))
    for block, bits in enumerate(coalition):
        for tensor in job.spec.block_matrices(block):
            parameter = quantised.model.layers[block].get_parameter(tensor.name_in_block)
            parameter.data = job.backend.quantise(parameter.data, bits).weight
    for windows, (loss, divergence) in (
        (WINDOWS, lab.ask([coalition])[0]),
        (HELD_OUT, [getattr(lab.examine(coalition)["other"], name).mean() for name in ("losses", "divergences")]),
    ):
        ids = torch.from_numpy(windows.tokens)
        with torch.no_grad():
            p, q = (
                m(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (whole, quantised)
            )
        assert loss == pytest.approx(float(-q.gather(-1, ids[:, 1:, None]).mean()), abs=2e-5)
        assert divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-5)


def test_a_cell_is_whole_resumes_and_gives_the_same_bytes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    job, plan = job_of(checkpoints["llama"]), Plan("small", "quanto", "noise", 0, permutations=3)
    played = []
    for run in range(2):  # the second finds all losses in the journal
        told: list[str] = []
        cell = run_cell(
            plan, job, {"held": HELD_OUT}, tmp_path / "journal", lambda phase, *_, to=told: to.append(phase)
        )
        path = cell_path(tmp_path / str(run), cell)
        path.parent.mkdir()
        cell.save(path)
        played.append(Cell.load(path).to_json() | {"seconds": 0})
    assert played[0] == played[1]
    methods = {answer.method for answer in cell.answers}
    assert {"llm-mq", "singles", "impq-0.5", "clado", "evolution", "rounds", "random-mean-4", "phi-kl"} <= methods
    assert methods <= set(told), "every method is told of"
    assert {(answer.method, answer.average_bits) for answer in cell.answers} == {
        (method, quarter / 4) for method in methods for quarter in range(9, 16)
    }
    assert all(cell.average_bits(answer.coalition) <= answer.average_bits for answer in cell.answers)


def test_a_journal_of_another_game_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    Lab(job_of(checkpoints["llama"]), {}, tmp_path / "journal").ask([(2, 2, 2)])
    with pytest.raises(Exception, match="was started with"):
        Lab(job_of(checkpoints["qwen3"]), {}, tmp_path / "journal")


def test_no_matrix_is_quantised_twice() -> None:
    calls = []

    class Counting:
        LIBRARY = "none"
        statistics = "none"

        def quantise(self, weight: torch.Tensor, bits: int, inputs: object = None) -> object:
            calls.append(bits)
            return load_backend("quanto").quantise(weight, bits, inputs)  # type: ignore[arg-type]

    backend, weight = Remembering(Counting()), torch.randn(8, 128)  # type: ignore[arg-type]
    for _ in range(2):
        for bits in (2, 4):
            expected = load_backend("quanto").quantise(weight, bits)  # type: ignore[arg-type]
            found = backend.quantise(weight, bits)  # type: ignore[arg-type]
            torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=0)
            assert found.bits_per_weight == expected.bits_per_weight
    assert calls == [2, 4]


def test_stretches_share_no_window(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number} and" for number in range(4000)))
    taken = [calibration_stretch(checkpoints["qwen3"], text, seed, 640, 64).tokens for seed in range(3)]
    taken.append(exam_stretch(checkpoints["qwen3"], text, 12, 64, second_half=True).tokens)
    rows = [row.tobytes() for windows in taken for row in windows]
    assert len(set(rows)) == len(rows) == 3 * 10 + 12
    assert len(exam_stretch(checkpoints["qwen3"], text, 12, 64, second_half=False).tokens) == 12
    with pytest.raises(ModelError, match="too few for seed 99"):
        calibration_stretch(checkpoints["qwen3"], text, 99, 640, 64)
