import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from simulated import BITS, TEXTS, cell_of, played

from impq_edge.study import markdown, tables
from impq_edge.study.cells import Cell
from impq_edge.study.contests import BEST_ISOLATED, CALIBRATION, ISOLATED, RANDOM_MEAN, contests_of
from impq_edge.study.finer import finer
from impq_edge.study.regret import EVERY_MODEL, HELD_OUT, regret
from impq_edge.study.tables import EVERYTHING, LOW_SCOPE, PUBLISHED
from impq_edge.study.tally import mean, pairs_of, sign_test, tally

METRICS = {name: {2.5: 5.0 + k / 10} for k, name in enumerate(ISOLATED)}


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return tuple(
        played(model, backend, players, seed=seed, n_players=7)
        for model, backend, players in (
            ("a", "hqq", "blocks"), ("a", "quanto", "blocks"), ("b", "kquant", "blocks"), ("b", "kquant", "sublayers"),
        )
        for seed in range(2)
    )  # fmt: skip


def win(rows: Sequence[tables.Win], against: str, scope: str = EVERYTHING, text: str = "all") -> tables.Win:
    return next(row for row in rows if (row.against, row.scope, row.text) == (against, scope, text))


@pytest.mark.parametrize(("lower", "higher"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 40), (700, 812)])
def test_the_sign_test_is_that_of_a_fair_coin(lower: int, higher: int) -> None:
    assert sign_test(lower, higher) == sign_test(higher, lower)
    if lower + higher:
        assert sign_test(lower, higher) == pytest.approx(stats.binomtest(lower, lower + higher).pvalue, rel=1e-9)


def test_the_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(1, 5) == 2 * (1 + 6) / 64
    assert sign_test(4, 4) == 1.0
    assert sign_test(2000, 0) == pytest.approx(0.0, abs=1e-300)


def test_a_method_that_is_the_best_by_construction_never_loses(cells: tuple[Cell, ...]) -> None:
    rows = tables.wins(cells, "ours")
    assert all(row.tally.higher == 0 == row.tally.clear_higher for row in rows)
    for row in rows:
        assert row.tally.lower + row.tally.equal == row.tally.contests
        assert row.tally.median_change is not None and row.tally.median_change <= 0
    assert win(rows, BEST_ISOLATED).tally.contests == len(cells) * len(BITS) * len(TEXTS)
    assert win(rows, BEST_ISOLATED).tally.games == 4
    assert win(rows, "zd").tally.lower > win(rows, "pairwise").tally.lower


def test_one_who_wins_every_contest_strictly_has_all_shares_and_the_smallest_p() -> None:
    found = [
        cell_of({**METRICS, "ours": {2.5: 4.0 + seed / 100}}, seed=seed, model=model)
        for seed in range(3)
        for model in "xy"
    ]
    tally_ = win(tables.wins(found, "ours"), BEST_ISOLATED).tally
    assert (tally_.lower, tally_.equal, tally_.higher) == (6, 0, 0)
    assert tally_.p == 2 / 2**6
    assert (tally_.games_lower, tally_.games_p) == (2, 0.5)
    assert tally_.median_change == pytest.approx(math.exp(4.01 - 5.0) - 1)
    assert [aim.passed for aim in tables.aims(found, "ours")[:2]] == [True, True]


def test_ties_are_the_same_allocation_and_left_out_of_the_test() -> None:
    losses = [(4.0, 4.0), (4.0, 4.0), (4.0, 4.5), (4.0, 4.5), (4.0, 3.9)]
    found = [cell_of({"ours": {2.5: a}, "singles": {2.5: b}}, seed=k) for k, (a, b) in enumerate(losses)]
    tally_ = win(tables.wins(found, "ours"), "singles").tally
    assert (tally_.lower, tally_.equal, tally_.higher) == (2, 2, 1)
    assert tally_.p == sign_test(2, 1) == 1.0
    assert tally_.games_equal == 1  # the median of its five is a tie
    assert tally_.median_change == 0


def test_games_vote_once_however_many_cells_they_have() -> None:
    won = [cell_of({"ours": {2.5: 4.0}, "singles": {2.5: 4.5}}, seed=k, model="x") for k in range(9)]
    lost = [cell_of({"ours": {2.5: 4.5}, "singles": {2.5: 4.0}}, model=model) for model in "yz"]
    tally_ = win(tables.wins([*won, *lost], "ours"), "singles").tally
    assert (tally_.lower, tally_.higher) == (9, 2)
    assert (tally_.games_lower, tally_.games_higher, tally_.games_p) == (1, 2, 1.0)


def test_five_equal_random_allocations_tie_with_their_mean() -> None:
    for loss in (4.1, 3.3333333, 5.0000007):
        made = cell_of({f"{RANDOM_MEAN}-{k}": {2.5: loss} for k in range(5)} | {"ours": {2.5: loss}})
        assert tally(pairs_of(contests_of([made]), "ours", RANDOM_MEAN)).equal == 1


def test_a_difference_is_clear_by_its_windows() -> None:
    """Every window of a made exam moves by the same amount, so a small difference is clear though the spread is not."""
    tally_ = win(tables.wins([cell_of({"ours": {2.5: 4.0}, "phi": {2.5: 4.001}})], "ours"), "phi").tally
    assert (tally_.clear_lower, tally_.clear_higher) == (1, 0)
    noisy = cell_of({"ours": {2.5: 4.0}, "phi": {2.5: 4.001}})
    exams = {name: dict(found) for name, found in noisy.exams.items()}
    coalition = noisy.answers[1].coalition
    windows = np.random.default_rng(1).permutation(exams[coalition]["books"].losses)
    exams[coalition]["books"] = dataclasses.replace(exams[coalition]["books"], losses=tuple(map(float, windows)))
    tally_ = win(tables.wins([dataclasses.replace(noisy, exams=exams)], "ours"), "phi").tally
    assert (tally_.lower, tally_.clear_lower) == (1, 0)


def test_perplexity_is_a_geometric_mean_and_its_difference_is_paired() -> None:
    """Cells differ by whole nats, methods by little: paired errors are of the little."""
    shifts = (0.0, 1.0, 2.0)
    found = [cell_of({"ours": {2.5: 3.0 + s}, "phi": {2.5: 3.1 + s + 0.01 * k}}, seed=k) for k, s in enumerate(shifts)]
    rows = tables.perplexity_table(found, "ours")
    phi = next(row for row in rows if row.method == "phi")
    ours = next(row for row in rows if row.method == "ours")
    assert ours.perplexity == pytest.approx(math.exp(4.0))
    assert ours.log_perplexity.stderr == pytest.approx(1 / math.sqrt(3))
    assert phi.against_ours.value == pytest.approx(0.11)
    assert phi.against_ours.stderr == pytest.approx(0.01 / math.sqrt(3))
    assert ours.against_ours == mean([0.0, 0.0, 0.0])
    assert {row.method for row in rows} >= set(tables.REFERENCES)


def test_one_cell_has_no_error_bar_and_none_has_no_mean() -> None:
    assert mean([2.0]).stderr is None
    assert mean([]).value is None
    assert mean([1.0, 3.0]).stderr == pytest.approx(statistics.stdev([1.0, 3.0]) / math.sqrt(2))


def test_best_isolated_needs_every_metric() -> None:
    """Without one of them nobody knows whether ours beats every one."""
    whole = cell_of({**METRICS, "ours": {2.5: 4.0}})
    fewer = cell_of({name: METRICS[name] for name in ISOLATED[1:]} | {"ours": {2.5: 4.0}}, seed=1)
    tally_ = win(tables.wins([whole, fewer], "ours"), BEST_ISOLATED).tally
    assert tally_.contests == 1
    assert contests_of([whole])[0].points[BEST_ISOLATED].loss == 5.0


def test_aims_fail_where_they_should() -> None:
    spent = {"ours": 400, PUBLISHED: 1000}
    lost = cell_of({**METRICS, "ours": {2.5: 4.9}, PUBLISHED: {2.5: 4.8}}, evaluations=spent)
    share, median, even, dear = tables.aims([lost], "ours")[:4]
    assert (share.passed, median.passed, even.passed, dear.passed) == (True, False, False, False)
    assert median.value == pytest.approx(math.exp(-0.1) - 1)
    assert (even.value, dear.value) == (0.0, 0.4)
    nothing = tables.aims([cell_of({"ours": {2.5: 4.0}})], "ours")
    assert {aim.passed for aim in nothing} == {None}


def test_regret_counts_what_is_known_for_fewer_bits_too() -> None:
    made = cell_of({"phi": {2.5: 4.0, 3.0: 4.2}, "ours": {2.5: 4.1, 3.0: 3.9}})
    more = dataclasses.replace(made, seed=1)
    found = {(r.judged, r.method): r for r in regret([made, more]) if r.model == EVERY_MODEL}
    for judged in (CALIBRATION, HELD_OUT):
        assert found[judged, "phi"].median_nats == pytest.approx(0.15)  # 0 and 0.3
        assert found[judged, "ours"].median_nats == pytest.approx(0.05)  # 0.1 and 0
        assert found[judged, "ours"].at_best == 2
    worse = cell_of({"phi": {2.5: 4.0}, "ours": {3.0: 4.4}})
    assert next(r for r in regret([worse]) if r.method == "ours").median_nats == pytest.approx(0.4)


def test_regret_is_never_negative_and_its_interval_holds_the_median(cells: tuple[Cell, ...]) -> None:
    for row in regret(cells):
        assert row.median_nats is not None and row.low_nats is not None and row.high_nats is not None
        assert 0 <= row.low_nats <= row.high_nats
    ours = [row for row in regret(cells) if row.method == "ours"]
    assert all(row.at_best == row.contests for row in ours)


def test_variants_that_choose_alike_are_counted_once_per_allocation() -> None:
    texts = {text: lambda loss: loss for text in TEXTS}
    made = cell_of({"impq-0.5": {2.5: 4.0, 3.0: 3.5}, "impq-1": {2.5: 4.0, 3.0: 3.6}}, texts=texts)
    row = next(r for r in tables.interactions([made]) if (r.method, r.other, r.scope) == ("impq-0.5", "impq-1", "all"))
    assert (row.allocations, row.same) == (2, 1)
    assert (row.tally.contests, row.tally.lower, row.tally.equal) == (4, 2, 2)


def test_player_sizes_are_paired_and_the_best_is_chosen_before_the_exam() -> None:
    """Phi is better on the calibration text, ours on the exam: phi is the best of all."""
    exam = {"books": lambda loss: 8.0 - loss}
    blocks = [cell_of({"ours": {2.5: 4.0}, "phi": {2.5: 3.9}}, texts=exam, seed=k) for k in range(2)]
    finer = [
        cell_of({"ours": {2.5: 4.0}, "phi": {2.5: 3.7}}, texts=exam, seed=k, players="sublayers") for k in range(2)
    ]
    alone = cell_of({"ours": {2.5: 4.0}}, backend="gptq")
    rows = tables.player_size([*blocks, *finer, alone], "ours")
    assert {row.backend for row in rows} == {"hqq"}
    at = {(row.method, row.players): row for row in rows}
    assert at[tables.BEST, "blocks"].log_perplexity.value == pytest.approx(4.1)
    assert at[tables.BEST, "sublayers"].against_blocks.value == pytest.approx(0.2)
    assert at["ours", "sublayers"].against_blocks.value == pytest.approx(0.0)
    assert at["ours", "blocks"].against_blocks.value is None


def test_finer_players_meet_blocks_in_the_same_contest_and_no_other() -> None:
    exam = {"books": lambda loss: 2 * loss}
    blocks = [cell_of({"ours": {2.5: 4.0, 3.0: 3.5}, "singles": {2.5: 4.2}}, texts=exam, seed=k) for k in range(2)]
    better = cell_of({"ours": {2.5: 3.9, 3.0: 3.5}, "singles": {2.5: 4.1}}, texts=exam, players="tensors")
    unmatched = cell_of({"ours": {2.5: 1.0}}, texts=exam, players="tensors", seed=7)
    rows = {
        (r.method, r.against): r for r in finer(contests_of([*blocks, better, unmatched]), "ours") if r.text == "all"
    }
    assert set(rows) == {("ours", "ours"), ("singles", "ours"), ("singles", "singles")}
    ours = rows["ours", "ours"]
    assert (ours.players, ours.contests, ours.lower, ours.equal) == ("tensors", 2, 1, 1)
    assert ours.change == pytest.approx(math.expm1(-0.1))
    assert (rows["singles", "ours"].lower, rows["singles", "singles"].lower) == (0, 1)
    assert "| tensors | ours | ours |" in markdown.finer(tuple(rows.values()))
    assert finer(contests_of(blocks), "ours") == ()


def blocks(text: str) -> list[list[str]]:
    """The tables of a Markdown text, line by line."""
    groups = itertools.groupby(text.splitlines(), lambda line: line.startswith("|"))
    found = [list(lines) for is_table, lines in groups if is_table]
    assert found
    return found


def test_gaps_show_as_gaps_and_break_nothing(cells: tuple[Cell, ...]) -> None:
    """One cell lacks a method, one a few averages, one a held-out text; another method is in one cell only."""
    first, second, third, *rest = cells
    first = dataclasses.replace(first, answers=tuple(a for a in first.answers if a.method != "evolution"))
    second = dataclasses.replace(second, answers=tuple(a for a in second.answers if a.average_bits < tables.LOW_BITS))
    third = dataclasses.replace(
        third,
        exams={name: {"books": found["books"]} for name, found in third.exams.items()},
        unquantised={"books": third.unquantised["books"]},
        answers=(*third.answers, dataclasses.replace(third.answers[0], method="other")),
    )
    found = [first, second, third, *rest]
    rows = tables.perplexity_table(found, "ours")
    other = [row for row in rows if row.method == "other"]
    assert {row.log_perplexity.cells for row in other} == {0, 1}
    assert win(tables.wins(found, "ours"), "other").tally.contests == 1
    for text in (
        markdown.perplexities(rows), markdown.divergences(rows), markdown.differences(rows, "ours"),
        markdown.wins(tables.wins(found, "ours")), markdown.aims(tables.aims(found, "ours")),
        markdown.regrets(regret(found)), markdown.interactions(tables.interactions(found)),
        markdown.player_sizes(tables.player_size(found, "ours")),
    ):  # fmt: skip
        assert "nan" not in text and "None" not in text
        assert all(len(block) > 2 and len({line.count("|") for line in block}) == 1 for block in blocks(text))
    assert f"| {markdown.GAP} |" in markdown.perplexities(rows)


def test_the_scope_of_few_bits_is_below_three(cells: tuple[Cell, ...]) -> None:
    low = win(tables.wins(cells, "ours"), "phi", LOW_SCOPE).tally
    assert low.contests == len(cells) * len(TEXTS) * sum(bits < 3 for bits in BITS)


def test_bold_is_the_lowest_of_its_column(cells: tuple[Cell, ...]) -> None:
    text = markdown.perplexities(tables.perplexity_table(cells[:2], "ours"))
    ours = [line for line in text.splitlines() if line.startswith("| ours |")]
    assert len(ours) == len(TEXTS)  # one game
    assert all(line.count("**") == 2 * len(BITS) for line in ours)
