import numpy as np
import pytest
from scipy import stats
from simulated import cell_of, played

from impq_edge.study import markdown
from impq_edge.study.transfer import lent_allocations, spearman, transfer


def test_rank_correlation_is_that_of_scipy_with_ties_and_without() -> None:
    random = np.random.default_rng(0)
    for levels in (1000, 5, 2):
        one, other = random.integers(levels, size=(2, 30)).astype(float)
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)
    assert spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_backends_are_matched_by_players_text_and_seed() -> None:
    up, down = tuple(range(12)), tuple(range(12, 0, -1))
    losses = {"ours": {2.5: 4.0}}

    def made(backend: str, singles: tuple[int, ...], **which: object):  # type: ignore[no-untyped-def]
        return cell_of(losses, scores={"singles": tuple(map(float, singles))}, backend=backend, **which)

    rows = transfer(
        [
            made("hqq", up), made("kquant", up), made("hqq", up, seed=1), made("kquant", down, seed=1),
            made("hqq", up, seed=2), made("kquant", up, seed=3), made("kquant", down, model="other"),
        ]
    )  # fmt: skip
    at = {(row.model, row.score, row.backend, row.other): row for row in rows}
    both = at["toy", "singles", "hqq", "kquant"]
    assert (both.pairs, both.lowest, both.median, both.highest) == (2, -1, 0, 1)
    assert at["toy", "singles", "hqq", "hqq"].pairs == 3  # of three seeds
    assert at["toy", "singles", "hqq", "hqq"].lowest == 1
    gap = at["toy", "phi", "hqq", "kquant"]  # no cell has that score
    assert (gap.pairs, gap.median) == (0, None)
    assert "| – | – | – |" in markdown.transfers(rows, [])


def test_a_lent_choice_is_charged_against_the_methods_own() -> None:
    """What hqq chose at 2.5 bits is what kquant's phi chose: examined there, and worse than ours."""
    lender = cell_of({"ours": {2.5: 4.2, 3.0: 3.9}})
    user = cell_of({"ours": {2.5: 3.8, 3.0: 3.5}, "phi": {2.5: 4.0}}, backend="kquant")
    taken = {answer.coalition for answer in lender.answers}
    known = [answer.coalition for answer in user.answers if answer.coalition in taken]
    (row,) = (r for r in lent_allocations([lender, user], ["ours"]) if r.used_on == "kquant")
    assert (row.chosen_on, row.allocations) == ("hqq", 2)
    assert row.known == len(known) > 0
    theirs = {a.average_bits: a.coalition for a in lender.answers}
    own = {a.average_bits: a.loss for a in user.answers if a.method == "ours"}
    lost = [
        user.exams[theirs[bits]]["books"].loss - own[bits] for bits in theirs if theirs[bits] in user.exams
    ]  # fmt: skip
    assert row.loss.value == pytest.approx(np.mean(lost))


def test_a_backend_that_lends_itself_a_choice_loses_nothing() -> None:
    cells = [played(backend="hqq", n_players=6), played(backend="gptq", n_players=6)]
    for row in lent_allocations(cells, ["ours", "phi"]):
        assert row.known <= row.allocations == 7
        if row.method == "ours" and row.loss.value is not None:
            assert row.loss.value >= -1e-12  # ours is the best of its cell
