import itertools

import numpy as np
import pytest

from impq_edge.devices.nonnegative import nonnegative_least_squares


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_columns_is_better(seed: int) -> None:
    """The optimum is the unconstrained one over some set of columns: all sets are tried."""
    generator = np.random.default_rng(seed)
    rows, columns = int(generator.integers(2, 9)), int(generator.integers(1, 6))
    matrix = generator.normal(size=(rows, columns)) * 10.0 ** generator.integers(-9, 9, size=columns)
    if seed % 3 == 0:
        matrix = np.abs(matrix)
    target = generator.normal(size=rows)
    found = nonnegative_least_squares(matrix, target)
    assert (found >= 0).all()
    best = np.linalg.norm(target)
    for size in range(1, columns + 1):
        for chosen in map(list, itertools.combinations(range(columns), size)):
            scale = np.linalg.norm(matrix[:, chosen], axis=0)
            x = np.linalg.lstsq(matrix[:, chosen] / scale, target, rcond=None)[0] / scale
            if (x >= 0).all():
                best = min(best, np.linalg.norm(matrix[:, chosen] @ x - target))
    assert np.linalg.norm(matrix @ found - target) <= best * (1 + 1e-9) + 1e-12


def test_what_was_put_in_comes_out() -> None:
    generator = np.random.default_rng(0)
    matrix = np.abs(generator.normal(size=(40, 12)))
    true = np.abs(generator.normal(size=12)) * (generator.random(12) < 0.7)
    assert nonnegative_least_squares(matrix, matrix @ true) == pytest.approx(true, abs=1e-9)


def test_a_column_of_nothing_gets_nothing() -> None:
    found = nonnegative_least_squares(np.array([[0.0, 2.0], [0.0, 2.0]]), np.array([2.0, 4.0]))
    assert found[0] == 0 and found[1] == pytest.approx(1.5)
