"""Find the point of a polyhedron nearest to a target, with quadprog."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import quadprog  # ty: ignore[import-not-found]  # a compiled module without types


class Nearest(NamedTuple):
    """The nearest point [n], and the constraints' multipliers [k]: point = target + constraints @ multipliers."""

    point: np.ndarray
    multipliers: np.ndarray


def nearest_point(
    target: np.ndarray, constraints: np.ndarray, bounds: np.ndarray, equalities: int = 0
) -> Nearest | None:
    """Find argmin_x |x - target| subject to constraints^T x >= bounds, by Goldfarb and Idnani's dual method.

    The method starts at the target and adds violated constraints: the fewer there are, the faster it is.

    Args:
        target: [n].
        constraints: One constraint per column, [n, k].
        bounds: [k].
        equalities: How many constraints, from the first on, are equalities.

    Returns:
        The solution; None if no point meets the constraints, or rounding makes it seem so.
    """
    try:
        solution = quadprog.solve_qp(_identity(len(target)), target, constraints, bounds, equalities, True)
    except ValueError:
        return None
    return Nearest(solution[0], solution[4])


@lru_cache(maxsize=8)
def _identity(size: int) -> np.ndarray:
    return np.eye(size)
