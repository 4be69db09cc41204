"""Many non-negative least squares problems with one matrix, solved together on the device of the matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_DIRECT_SIZE = 24  # unknowns per problem up to which batched Cholesky factors are faster than conjugate gradients
_STEPS = 30  # of conjugate gradients: a well-conditioned matrix needs ten; after these, the direct solver takes over
_PRECISION = 1e-13
_FIRST_REDUCTION, _REDUCTION = 5e-2, 1e-3  # of the residual; the first guess changes anyway
_PLAIN = 0.3  # smallest squared pivot that needs no preconditioner: without one, steps are as few, at half the cost
_SINGLE = 1e-3  # smallest squared pivot at which corrections can be computed in single precision


def solve_nonnegative(cosines: Tensor, right: Tensor, start: Tensor | None = None, exchanges: int = 60) -> Tensor:
    """Find z >= 0 with s = C z - b >= 0 and s^T z = 0, for each row b of `right`.

    A primal-dual active set method (Hintermüller, Ito and Kunisch 2003): guess which z are positive, solve for them,
    and flip all wrong guesses at once. A few such exchanges are usually enough; when the number of wrong guesses stops
    falling, flip one at a time (Kim and Park 2011), which is sure to end.

    Args:
        cosines: C, [m, m], positive definite, of unit diagonal.
        right: b, [k, m].
        start: A guess of z, [k, m].
        exchanges: The most exchanges to make.

    Returns:
        z, [k, m]; rows that did not settle hold NaN.
    """
    solution = torch.full_like(right, torch.nan)
    if not len(right):
        return solution
    system = _System.of(cosines)
    problems = _Problems.of(right, start)
    for exchange in range(exchanges):
        slopes = problems.state @ cosines - problems.right
        largest = (slopes * problems.positive).abs().amax(dim=1)
        if exchange:  # before the first one, z does not solve the problem of its guess
            right_guess = ~_wrong(problems.state, slopes, problems.positive).any(dim=1)
            solved = right_guess & (largest <= _PRECISION * (1 + problems.state.amax(dim=1)))
            finished = solved | ~largest.isfinite()
            if finished.any():
                done, left = solved.nonzero()[:, 0], (~finished).nonzero()[:, 0]
                solution[problems.index[done]] = problems.state[done]
                if not len(left):
                    break
                problems, slopes, largest = problems.select(left), slopes[left], largest[left]
        problems = problems.exchanged(
            *system.improve(problems, slopes, largest, _REDUCTION if exchange else _FIRST_REDUCTION)
        )
    return solution


class _Problems(NamedTuple):
    """The k unsolved problems.

    Attributes:
        index: Their rows in the result, [k].
        right: b, [k, m].
        state: z, [k, m], 0 outside of `positive`.
        positive: The guess of which z are positive, [k, m].
        fewest: The smallest number of wrong guesses so far, [k].
        patience: Exchanges left in which that number has to fall, [k].
    """

    index: Tensor
    right: Tensor
    state: Tensor
    positive: Tensor
    fewest: Tensor
    patience: Tensor

    @classmethod
    def of(cls, right: Tensor, start: Tensor | None) -> _Problems:
        index = torch.arange(len(right), device=right.device)
        state, positive = (torch.zeros_like(right), right > 0) if start is None else (start, start > 0)
        fewest = torch.full_like(index, right.shape[1] + 1)
        return cls(index, right, state, positive, fewest, torch.full_like(index, 3))

    def select(self, left: Tensor) -> _Problems:
        return _Problems(*(values[left] for values in self))

    def exchanged(self, state: Tensor, slopes: Tensor) -> _Problems:
        """Flips the guesses that a new z, [k, m], or its slopes, [k, m], prove wrong."""
        wrong = _wrong(state, slopes, self.positive)
        count = wrong.sum(dim=1)
        patience = torch.where(count < self.fewest, 3, self.patience - 1)
        stuck = patience < 0
        if stuck.any():  # flip only the last wrong guess: this cannot cycle
            wrong[stuck] &= wrong[stuck].cumsum(dim=1) == count[stuck, None]
        positive = self.positive ^ wrong
        fewest = torch.minimum(self.fewest, count)
        return _Problems(self.index, self.right, state * positive, positive, fewest, patience)


def _wrong(state: Tensor, slopes: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, state < 0, slopes < -10 * _PRECISION)


class _System(NamedTuple):
    """C [m, m], with a copy of it and its inverse (if it pays) in the precision that corrections need."""

    cosines: Tensor
    copy: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, cosines: Tensor) -> _System:
        factor = torch.linalg.cholesky(cosines)
        pivot = factor.diagonal().amin().square().item()
        dtype = torch.float32 if pivot > _SINGLE else torch.float64
        return cls(cosines, cosines.to(dtype), None if pivot > _PLAIN else torch.cholesky_inverse(factor).to(dtype))

    def precondition(self, residual: Tensor, mask: Tensor) -> Tensor:
        """Apply the inverse of C, restricted to P: a good preconditioner even where C is ill-conditioned."""
        return residual.clone() if self.inverse is None else (residual @ self.inverse).mul_(mask)

    def improve(self, problems: _Problems, slopes: Tensor, largest: Tensor, reduction: float) -> tuple[Tensor, Tensor]:
        """Bring z_P nearer to C_PP z_P = b_P for all problems at once.

        Args:
            problems: z, and the guess P.
            slopes: C z - b, [k, m].
            largest: The largest of |C z - b| in P, [k].
            reduction: The fraction of it that may remain.

        Returns:
            The improved z and its slopes, [k, m] each.
        """
        right, state, positive = problems.right, problems.state, problems.positive
        size = int(positive.sum(dim=1).max())
        if size <= _DIRECT_SIZE:
            state = _cholesky(self.cosines, right, positive, size)
            return state, state @ self.cosines - right
        # Corrections shrink from exchange to exchange: scaled to size 1, they keep their digits in single precision.
        scale = largest.clamp(min=_PRECISION)[:, None]
        correction, change, missed = self._conjugate_gradients((-slopes / scale).to(self.copy), positive, reduction)
        state, slopes = torch.addcmul(state, correction, scale), torch.addcmul(slopes, change, scale)
        if missed.any():
            state[missed] = _cholesky(self.cosines, right[missed], positive[missed], size)
            slopes[missed] = state[missed] @ self.cosines - right[missed]
        return state, slopes

    def _conjugate_gradients(
        self, residual: Tensor, positive: Tensor, reduction: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve C_PP x_P = r_P, x = 0 elsewhere, up to the reduction, with one or two matrix products per step.

        Returns x and C x, [k, m], and which problems missed the reduction, [k].
        """
        mask = positive.to(residual)
        residual = residual * mask
        solution, product = torch.zeros_like(residual), torch.zeros_like(residual)
        direction = self.precondition(residual, mask)
        square = (residual * direction).sum(dim=1, keepdim=True)
        every = 1 if self.inverse is not None else 2  # without a preconditioner, a step costs little more than a check
        for step in range(_STEPS):
            image = direction @ self.copy
            length = square / (direction * image).sum(dim=1, keepdim=True).clamp(min=1e-30)
            solution.addcmul_(direction, length)
            product.addcmul_(image, length)
            residual.addcmul_(image.mul_(mask), length, value=-1)
            if (step + 1) % every == 0 and residual.abs().max() <= reduction:
                break
            conditioned = self.precondition(residual, mask)
            previous, square = square, (residual * conditioned).sum(dim=1, keepdim=True)
            direction.mul_(square / previous.clamp(min=1e-30)).add_(conditioned)
        return solution, product, residual.abs().amax(dim=1) > reduction


def _cholesky(cosines: Tensor, right: Tensor, positive: Tensor, size: int) -> Tensor:
    """Solve all problems by one batch of Cholesky factors, each padded to `size` unknowns with the identity."""
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
