"""A Gramian scaled to unit rows, and its factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SINGULAR = 1e-10  # smallest squared pivot at which a matrix of cosines certainly has full rank
EPSILON = float(np.finfo(np.float64).eps)
_BEYOND_ONE = 1e-12  # above float64's rounding error in a cosine
_COARSEST = 2 * torch.finfo(torch.bfloat16).eps  # largest error of a cosine; up to m times as much in an eigenvalue

Array = Any
"""A tensor or a numpy array; functions return the kind that they are given."""


def cosine_matrix(gramian: Array, lengths: Array) -> Array:
    """Scale G [m, m] to a unit diagonal, positive semi-definite; a zero row gets the cosine 0 with every other.

    Raises:
        ValueError: G has negative eigenvalues too large for rounding errors.
    """
    return factored_cosines(gramian, lengths)[0]


def factored_cosines(gramian: Array, lengths: Array) -> tuple[Array, Array | None]:
    """Return the cosines C [m, m] and their Cholesky factor, or None if C has none in floating point.

    Raises:
        ValueError: G has negative eigenvalues too large for rounding errors; the message lists C's.
    """
    cosines = _unit(gramian, lengths)
    factor = _cholesky(cosines)
    if factor is not None:
        return cosines, factor
    diagonal = cosines.reshape(-1)[:: len(cosines) + 1]
    if abs(cosines).max() <= 1 + _BEYOND_ONE:
        cosines = cosines.clip(-1, 1)
        diagonal = cosines.reshape(-1)[:: len(cosines) + 1]
    # If this much more diagonal makes C definite, its negative eigenvalues are float64's rounding, and do no harm.
    diagonal[:] = 1 + len(cosines) * EPSILON
    definite = _cholesky(cosines) is not None
    diagonal[:] = 1
    if definite:
        return cosines, None
    cosines = _semidefinite(cosines)
    return cosines, _cholesky(cosines)


def shrunk(gramian: Array, noise: float) -> Array:
    """Divide all but the diagonal of G [m, m] by 1 + noise: up to a factor, this enlarges the diagonal."""
    smaller = gramian / (1 + noise)
    index = list(range(len(gramian)))
    smaller[index, index] = gramian.diagonal()
    return smaller


def _unit(gramian: Array, lengths: Array) -> Array:
    inverse = (lengths > 0) / (lengths + (lengths == 0))
    cosines = gramian * inverse * inverse[:, None]
    cosines.reshape(-1)[:: len(cosines) + 1] = 1
    return cosines


def _cholesky(matrix: Array) -> Array | None:
    if isinstance(matrix, Tensor):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed else factor
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None


def _semidefinite(cosines: Array) -> Array:
    """Remove or outweigh the negative eigenvalues of C [m, m]; the lowest one shows the size of the rounding errors.

    Errors of float64 are removed, along with positive eigenvalues of the same size, which mean as little. Errors of a
    lower precision are outweighed: twice their size is added to the diagonal. The result is as close to the true
    Gramian as G is, and definite: every problem has one solution, which changes continuously with G and needs few
    digits. With such eigenvalues removed instead, solutions could weigh rows by 1e9 to exploit what remains, and jump.
    """
    linalg = np.linalg if isinstance(cosines, np.ndarray) else torch.linalg
    values, vectors = linalg.eigh(cosines)
    noise, largest = -float(values[0]), len(values) * _COARSEST
    if noise <= values[-1] * len(values) * EPSILON:
        return cosines
    if noise <= SINGULAR:
        return (vectors * (values * (values > noise))) @ vectors.T
    if noise <= largest:
        return shrunk(cosines, 2 * noise)
    raise ValueError(
        f"A Gramian is positive semi-definite: scaled to a unit diagonal, its eigenvalues are 0 or more, and rounding "
        f"to bfloat16 makes none of {len(values)} lower than {-largest:g}; this one's are {values.tolist()}. Pass "
        f"J J^T, or let the engine compute it."
    )


def independent(factor: Array) -> bool:
    """Return whether C = L L^T certainly has full rank, from L [m, m]."""
    return bool(factor.diagonal().min() ** 2 >= SINGULAR)


def dependent(gramian: Array, pivot: float) -> bool:
    """Return whether a row depends on others, up to a squared pivot of the rows' cosines."""
    factor = _cholesky(_unit(gramian, gramian.diagonal() ** 0.5))
    return factor is None or bool(factor.diagonal().min() ** 2 < pivot)


def cosine_factor(cosines: np.ndarray) -> np.ndarray:
    """Factors C = L L^T into L [m, r], r the rank of C [m, m], without eigenvalues that are rounding errors."""
    factor = _cholesky(cosines)
    if factor is not None and independent(factor):
        return factor
    values, vectors = np.linalg.eigh(cosines)
    # A negative eigenvalue shows how large the errors in G are: a positive one of that size means nothing either.
    noise = max(-values[0], values[-1] * len(values) * EPSILON)
    significant = values > noise
    return vectors[:, significant] * np.sqrt(values[significant])


def solve_semidefinite(matrix: Tensor, right: Tensor) -> Tensor:
    """Compute A^+ b for a positive semi-definite A [m, m] and b [m]; rounding errors count as zero eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not failed and pivots.amin() >= SINGULAR * pivots.amax():
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    noise = torch.maximum(-values[0], values[-1] * len(values) * EPSILON)
    return vectors @ (torch.where(values > noise, 1 / values, 0) * (vectors.mT @ right))


def divide(values: Tensor, lengths: Tensor) -> Tensor:
    """Divide values [m] by the rows' lengths [m]; a zero row gets 0."""
    return torch.where(lengths > 0, values / lengths, 0)
