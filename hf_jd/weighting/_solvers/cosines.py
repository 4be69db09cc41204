"""A Gramian scaled to unit rows, and its factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SINGULAR = 1e-10  # smallest squared pivot of a matrix of cosines whose rank is beyond doubt
EPSILON = float(np.finfo(np.float64).eps)
_BEYOND_ONE = 1e-12  # what the rounding of float64 adds to a cosine, and more
_COARSEST = 2 * torch.finfo(torch.bfloat16).eps  # the error of a cosine; m such errors change an eigenvalue by m of it

Array = Any
"""A tensor or a numpy array: what takes one takes the other, and gives the same back."""


def cosine_matrix(gramian: Array, lengths: Array) -> Array:
    """Scales G [m, m] to a unit diagonal, positive semi-definite; a zero row is given the cosine 0 with every other.

    Raises:
        ValueError: G has negative eigenvalues that no rounding explains.
    """
    return factored_cosines(gramian, lengths)[0]


def factored_cosines(gramian: Array, lengths: Array) -> tuple[Array, Array | None]:
    """The matrix of cosines C [m, m], and its Cholesky factor; None where rounding leaves C none.

    Raises:
        ValueError: G has negative eigenvalues that no rounding explains; the message has those of the cosines.
    """
    cosines = _unit(gramian, lengths)
    factor = _cholesky(cosines)
    if factor is not None:
        return cosines, factor
    diagonal = cosines.reshape(-1)[:: len(cosines) + 1]
    if abs(cosines).max() <= 1 + _BEYOND_ONE:
        cosines = cosines.clip(-1, 1)
        diagonal = cosines.reshape(-1)[:: len(cosines) + 1]
    diagonal[:] = 1 + len(cosines) * EPSILON  # negative eigenvalues of this size come from rounding, and do no harm
    definite = _cholesky(cosines) is not None
    diagonal[:] = 1
    if definite:
        return cosines, None
    cosines = _semidefinite(cosines)
    return cosines, _cholesky(cosines)


def shrunk(gramian: Array, noise: float) -> Array:
    """Divides all but the diagonal of G [m, m] by 1 + noise: the same as a larger diagonal, but for a factor."""
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
    """Takes from C [m, m] the negative eigenvalues that rounding left in it, whose size is that of its errors.

    Errors of float64 are removed, and positive eigenvalues of their size, which mean as little, with them. Those of a
    lower precision are outweighed by twice their size on the diagonal. The result is one of the Gramians that G can't
    be told from, and definite: every problem has one solution, which follows G continuously and takes few digits to
    find. Were they removed, solutions might weigh rows by 1e9 to make use of those that are left, and jump.
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
        f"to bfloat16 makes none of {len(values)} lower than {-largest:g}; this one's are {values.tolist()}. Hand over "
        f"J J^T, or let the engine compute it."
    )


def independent(factor: Array) -> bool:
    """Whether the rank of C = L L^T is beyond doubt, from L [m, m]."""
    return bool(factor.diagonal().min() ** 2 >= SINGULAR)


def dependent(gramian: Array, pivot: float) -> bool:
    """Whether a row depends on others, up to a squared pivot of the rows' cosines."""
    factor = _cholesky(_unit(gramian, gramian.diagonal() ** 0.5))
    return factor is None or bool(factor.diagonal().min() ** 2 < pivot)


def cosine_factor(cosines: np.ndarray) -> np.ndarray:
    """Factors C = L L^T: L [m, r], r the rank of C [m, m]; eigenvalues that are rounding errors are left out."""
    factor = _cholesky(cosines)
    if factor is not None and independent(factor):
        return factor
    values, vectors = np.linalg.eigh(cosines)
    # A negative eigenvalue shows how large the errors in G are; below that, a positive one means as little.
    noise = max(-values[0], values[-1] * len(values) * EPSILON)
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])


def solve_semidefinite(matrix: Tensor, right: Tensor) -> Tensor:
    """Computes A^+ b for a positive semi-definite A [m, m] and b [m]; rounding errors count as zero eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not failed and pivots.amin() >= SINGULAR * pivots.amax():
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    noise = torch.maximum(-values[0], values[-1] * len(values) * EPSILON)
    return vectors @ (torch.where(values > noise, 1 / values, 0) * (vectors.mT @ right))


def divide(values: Tensor, lengths: Tensor) -> Tensor:
    """Divides values [m] by the rows' lengths [m]; a zero row gets 0."""
    return torch.where(lengths > 0, values / lengths, 0)
