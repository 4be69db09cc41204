"""Many non-negative least squares problems with one matrix, solved together on the device of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECT_SIZE = 24  # up to this many unknowns a problem, a batch of Cholesky factors is faster than conjugate gradients
_EXCHANGES = 40
_STEPS = 30  # of conjugate gradients; a well-conditioned matrix needs ten, and what they don't solve is solved directly
_PRECISION = 1e-13


def solve_nonnegative(cosines: Tensor, right: Tensor) -> Tensor:
    """Finds z >= 0 with s = C z - b >= 0 and s^T z = 0, for each row b of `right`.

    A projected Newton method, as a primal-dual active set method (Hintermüller, Ito and Kunisch 2003): given a guess of
    which z are positive, solve for them, and exchange all that turn out wrong. A handful of exchanges is usual; where
    the number of wrong ones stops falling, one is exchanged at a time (Kim and Park 2011), which must end.

    Args:
        cosines: C, [m, m], positive definite, of unit diagonal.
        right: b, [k, m].

    Returns:
        z, [k, m]; rows that did not settle hold NaN.
    """
    solution = torch.full_like(right, torch.nan)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(cosines))
    rows = torch.arange(len(right), device=right.device)
    positive = right > 0
    state = torch.zeros_like(right)
    fewest = torch.full((len(right),), right.shape[1] + 1, device=right.device)
    patience = torch.full_like(fewest, 3)
    for exchange in range(_EXCHANGES):
        # The first guesses change anyway: they need no exact solution.
        precision = max(_PRECISION, 10.0 ** (-2 - 2 * exchange))
        size = int(positive.sum(dim=1).max())
        if size <= _DIRECT_SIZE:
            precision, state = _PRECISION, _cholesky(cosines, right, positive, size)
        else:
            state, missed = _conjugate_gradients(cosines, inverse, right, positive, state, precision)
            if precision == _PRECISION and missed.any():
                state[missed] = _cholesky(cosines, right[missed], positive[missed], size)
        slopes = state @ cosines - right
        wrong = torch.where(positive, state < 0, slopes < -10 * _PRECISION)
        count = wrong.sum(dim=1)
        settled = (count == 0) & (precision == _PRECISION)
        finished = settled | ~slopes.isfinite().all(dim=1)
        better = count < fewest
        patience = torch.where(better, 3, patience - 1)
        fewest = torch.minimum(fewest, count)
        # The last wrong one of a row is its single exchange.
        last = wrong.cumsum(dim=1) == count[:, None]
        positive = positive ^ torch.where((patience >= 0)[:, None], wrong, wrong & last)
        if finished.any():
            solution[rows[settled]] = state[settled]
            left = ~finished
            rows, right, positive, state = rows[left], right[left], positive[left], state[left]
            fewest, patience = fewest[left], patience[left]
            if not len(rows):
                break
    return solution


def _conjugate_gradients(
    cosines: Tensor, inverse: Tensor, right: Tensor, positive: Tensor, state: Tensor, precision: float
) -> tuple[Tensor, Tensor]:
    """Improves z_P towards C_PP z_P = b_P for all rows at once: two products of matrices a step.

    The inverse of C, restricted to P, is a preconditioner good enough for ill-conditioned C too. Returns z [k, m], and
    which rows missed the precision [k].
    """
    mask = positive.to(right)
    state = state * mask
    residual = (right - state @ cosines).mul_(mask)
    direction = (residual @ inverse).mul_(mask)
    product = (residual * direction).sum(dim=1, keepdim=True)
    for _ in range(_STEPS):
        image = (direction @ cosines).mul_(mask)
        length = product / (direction * image).sum(dim=1, keepdim=True).clamp(min=1e-300)
        state.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        if residual.abs().max() <= precision:
            break
        conditioned = (residual @ inverse).mul_(mask)
        previous, product = product, (residual * conditioned).sum(dim=1, keepdim=True)
        direction.mul_(product / previous.clamp(min=1e-300)).add_(conditioned)
    return state, residual.abs().amax(dim=1) > precision


def _cholesky(cosines: Tensor, right: Tensor, positive: Tensor, size: int) -> Tensor:
    """Solves all problems by one batch of Cholesky factors, each padded to `size` unknowns by the identity."""
    state = torch.zeros_like(right)
    if not size:
        return state
    chosen, index = positive.to(torch.int8).topk(size, dim=1)
    used = chosen.bool()
    systems = cosines[index[:, :, None], index[:, None, :]]
    systems *= used[:, :, None] & used[:, None, :]
    systems.diagonal(dim1=1, dim2=2).masked_fill_(~used, 1)
    values = right.gather(1, index) * used
    factors, failed = torch.linalg.cholesky_ex(systems)
    values = torch.cholesky_solve(values[:, :, None], factors)[:, :, 0]
    values[failed > 0] = torch.nan
    return state.scatter_(1, index, values)
