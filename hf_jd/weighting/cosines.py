"""A Gramian scaled to unit rows, and its factor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SINGULAR = 1e-10  # smallest squared pivot of a matrix of cosines whose rank is beyond doubt


def cosine_matrix(gramian: Tensor, lengths: Tensor) -> Tensor:
    """Scales G [m, m] to a unit diagonal, positive semi-definite; a zero row is given the cosine 0 with every other."""
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    cosines = (gramian * inverse).mul_(inverse[:, None]).clamp_(-1, 1)
    cosines.fill_diagonal_(1)
    return _semidefinite(cosines)


def _semidefinite(matrix: Tensor) -> Tensor:
    """Removes the negative eigenvalues that rounding left in a Gramian of low precision.

    They show how large its errors are, so positive ones of that size mean as little and go too.
    """
    _, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    noise = -values[0]
    if noise <= values[-1] * len(values) * torch.finfo(values.dtype).eps:
        return matrix
    return (vectors * torch.where(values > noise, values, 0)) @ vectors.mT


def cosine_factor(cosines: np.ndarray) -> np.ndarray:
    """Factors C = L L^T: L [m, r], r the rank of C [m, m]; eigenvalues that are rounding errors are left out."""
    try:
        factor = np.linalg.cholesky(cosines)
        if factor.diagonal().min() ** 2 >= SINGULAR:
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(cosines)
    # A negative eigenvalue shows how large the errors in G are; below that, a positive one means as little.
    noise = max(-values[0], values[-1] * len(values) * np.finfo(float).eps)
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])


def solve_semidefinite(matrix: Tensor, right: Tensor) -> Tensor:
    """Computes A^+ b for a positive semi-definite A [m, m] and b [m]; rounding errors count as zero eigenvalues."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not failed and pivots.amin() >= SINGULAR * pivots.amax():
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    noise = torch.maximum(-values[0], values[-1] * len(values) * torch.finfo(values.dtype).eps)
    return vectors @ (torch.where(values > noise, 1 / values, 0) * (vectors.mT @ right))


def divide(values: Tensor, lengths: Tensor) -> Tensor:
    """Divides values [m] by the rows' lengths [m]; a zero row gets 0."""
    return torch.where(lengths > 0, values / lengths, 0)
