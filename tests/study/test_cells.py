import bz2
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from simulated import BITS, TEXTS, cell_of, exam_of, played

from impq_edge.errors import RecordError
from impq_edge.study.cells import Answer, Cell, Exam, Unquantised, cell_path, load_cells


@pytest.fixture(scope="module")
def cell() -> Cell:
    return played(n_players=6)


@pytest.mark.parametrize("suffix", [".json", ".json.bz2"])
def test_a_saved_cell_comes_back_as_precise_as_it_is_kept(cell: Cell, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cell{suffix}"
    cell.save(path)
    loaded = Cell.load(path)
    assert loaded.identity() == cell.identity()
    assert dataclasses.replace(loaded, exams=cell.exams, answers=cell.answers, scores=cell.scores) == cell
    for coalition, exams in cell.exams.items():
        for text, exam in exams.items():
            kept = loaded.exams[coalition][text]
            assert kept.loss == pytest.approx(exam.loss, abs=1e-6)
            assert kept.losses == pytest.approx(exam.losses, abs=1e-4)


def test_the_same_cell_gives_the_same_bytes_and_saving_again_changes_none(cell: Cell, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{k}.json.bz2" for k in range(3))
    cell.save(first)
    cell.save(second)
    Cell.load(first).save(third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_the_cells_of_a_whole_study_take_less_than_3_mb(tmp_path: Path) -> None:
    """About 110 cells: here one of full size, with nothing shared between windows but their difficulty."""
    rng, n_players = random.Random(0), 30
    coalitions = ["".join(rng.choice("24") for _ in range(n_players)) for _ in range(98)]
    every = [*coalitions, "2" * n_players, "4" * n_players]
    exams = {c: {t: exam_of(3 + 4 * rng.random(), k, windows=40) for t in TEXTS} for k, c in enumerate(every)}
    exams = {
        c: {t: dataclasses.replace(e, losses=tuple(x + rng.gauss(0, 0.3) for x in e.losses)) for t, e in found.items()}
        for c, found in exams.items()
    }
    answers = tuple(
        Answer(f"method-{k}", bits, rng.choice(coalitions), 1000, 3 + rng.random(), rng.random())
        for k in range(25)
        for bits in BITS
    )
    small = played(n_players=6)
    scores = {name: tuple(rng.random() for _ in range(n_players)) for name in small.scores}
    full = dataclasses.replace(
        small, player_names=tuple(f"model.layers.{i}" for i in range(n_players)), player_weights=(3539520,) * n_players,
        scores=scores, answers=answers, exams=exams,
    )  # fmt: skip
    full.save(tmp_path / "full.json.bz2")
    assert 110 * (tmp_path / "full.json.bz2").stat().st_size < 3e6


def changed(cell: Cell, **fields: Any) -> Any:
    return lambda: dataclasses.replace(cell, **fields)


def test_what_does_not_fit_together_is_refused_in_a_sentence(cell: Cell) -> None:
    answer, name = cell.answers[0], cell.answers[0].coalition
    fewer = {**cell.exams, name: {**cell.exams[name], "books": Exam(3.0, 0.1, 0.1, 0.1, (3.0,))}}
    for make, told in (
        (changed(cell, player_weights=(1, 2)), "2 weights of 6 players"),
        (changed(cell, scores={"phi": (1.0,)}), "1 scores 'phi' of 6 players"),
        (changed(cell, exams={**cell.exams, "2": cell.exams[name]}), "a coalition '2'"),
        (changed(cell, exams={**cell.exams, "333333": cell.exams[name]}), "a coalition '333333'"),
        (changed(cell, answers=(answer, answer)), "2 answers of 'llm-mq' at 2.25 bits"),
        (changed(cell, exams={k: v for k, v in cell.exams.items() if k != "222222"}), "no exam of '222222'"),
        (changed(cell, exams=fewer), "windows of 'books'"),
        (changed(cell, unquantised={"books": Unquantised(3.0)}), "the unquantised model on"),
    ):
        with pytest.raises(RecordError, match=told) as raised:
            make()
        assert str(raised.value).endswith("make the cell anew.")
        assert cell.name in str(raised.value)


def test_average_bits_weigh_players_by_their_size(cell: Cell) -> None:
    uneven = dataclasses.replace(cell, player_weights=(500, 100, 100, 100, 100, 100))
    assert uneven.average_bits("422222") == 3.0
    assert uneven.average_bits("244444") == 3.0
    assert [uneven.average_bits(name) for name in uneven.uniform.values()] == [2.0, 4.0]


def test_a_folder_of_cells_is_read_whole_or_refused(cell: Cell, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no cell"):
        load_cells(tmp_path)
    other = dataclasses.replace(cell, seed=1)
    for one in (other, cell):
        one.save(cell_path(tmp_path, one))
    (tmp_path / "notes.txt").write_text("no cell")
    assert [found.seed for found in load_cells(tmp_path)] == [0, 1]
    cell.save(tmp_path / "again.json")
    with pytest.raises(RecordError, match=f"2 cells {cell.name}"):
        load_cells(tmp_path)


def test_a_broken_file_is_named(cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "cell.json.bz2"
    cell.save(path)
    packed = path.read_bytes()
    for content in (packed[:-20], b"plain", packed[:20] + bytes(20) + packed[40:], bz2.compress(b"\xff\xfe")):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"cell\.json\.bz2"):
            Cell.load(path)
    data = {**cell.to_json(), "sed": 0}
    path.write_bytes(bz2.compress(json.dumps(data).encode()))
    with pytest.raises(RecordError, match="sed"):
        Cell.load(path)
    with pytest.raises(RecordError, match="does not exist"):
        Cell.load(tmp_path / "none.json.bz2")


def test_equal_losses_are_equal_coalitions_in_made_cells() -> None:
    made = cell_of({"a": {2.5: 4.0}, "b": {2.5: 4.0}, "c": {2.5: 5.0}})
    a, b, c = (answer.coalition for answer in made.answers)
    assert a == b != c
