"""Least squares with coefficients of at least 0: Lawson and Hanson, Solving Least Squares Problems (1974), ch. 23."""

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-10


def nonnegative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the x ≥ 0 that minimises ‖matrix · x − target‖.

    Parameters
    ----------
    matrix
        (M, N).
    target
        (M,).

    Returns
    -------
    (N,). Columns of zeros get 0.
    """
    norms = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(norms > 0, norms, 1.0)
    count = scaled.shape[1]
    x, active = np.zeros(count), np.zeros(count, bool)
    enough = _TOLERANCE * max(1.0, float(np.linalg.norm(target)))
    for _ in range(10 * count):  # it ends long before; rounding could make it go in circles
        gain = np.where(active, -np.inf, scaled.T @ (target - scaled @ x))
        if gain.max(initial=-np.inf) <= enough:
            break
        active[int(gain.argmax())] = True
        x = _descend(scaled, target, x, active)
    found: NDArray[np.float64] = x / np.where(norms > 0, norms, 1.0)
    return found


def _descend(
    matrix: NDArray[np.float64], target: NDArray[np.float64], x: NDArray[np.float64], active: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Go to the optimum over the active columns, stopping to drop those that reach 0 on the way."""
    while active.any():
        goal = np.zeros_like(x)
        goal[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
        if goal[active].min() > 0:
            return goal
        falling = active & (goal <= 0)
        step = (x[falling] / np.maximum(x[falling] - goal[falling], np.finfo(float).tiny)).min()
        x = np.maximum(x + step * (goal - x), 0.0)
        active &= x > _TOLERANCE
        x[~active] = 0.0
    return x
