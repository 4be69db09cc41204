"""The equation of alpha-fair weights, which FairGrad and Nash-MTL share."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import cosine_matrix

_STEPS = 200
_STATIONARY = 1e-7  # |J^T w| / sum_i w_i |g_i| below which the rows cancel as far as float64 can tell


def fair_weights(gramian: Tensor, alpha: float) -> Tensor:
    """Solves G w = w^(-1/alpha) for w > 0, by Newton's method on the convex function with gradient G w - w^(-1/alpha).

    The solution is unique, unless 0 is a combination of the rows with all weights positive (the step is Pareto
    stationary): then the weights are 0. Zero rows, which can make no progress, also get 0.

    Args:
        gramian: G, [m, m], float64.
        alpha: Positive.

    Returns:
        w, [m].
    """
    lengths = gramian.diagonal().sqrt()
    present = lengths > 0
    if not present.all():
        weights = torch.zeros_like(lengths)
        if present.any():
            weights[present] = fair_weights(gramian[present][:, present], alpha)
        return weights
    cosines = cosine_matrix(gramian, lengths)
    # For multiples mu = n w of unit rows: C mu = a mu^(-1/alpha), a = n^(1/alpha - 1); a common factor only scales mu.
    exponent = 1 / alpha
    logarithms = lengths.log() * (exponent - 1)
    level = logarithms.mean()
    multiples = _newton(cosines, (logarithms - level).exp(), exponent)
    if multiples is None:
        return torch.zeros_like(lengths)
    return multiples / lengths * (level / (1 + exponent)).exp()


def _newton(cosines: Tensor, right: Tensor, exponent: float) -> Tensor | None:
    """Solves C mu = a mu^(-e), from the solution for orthogonal rows, scaled to fit; None if there is no solution."""
    multiples = right ** (1 / (1 + exponent))
    for _ in range(_STEPS):
        image = cosines @ multiples
        square = multiples @ image
        if square <= (_STATIONARY * multiples.sum()) ** 2:
            return None
        # Rescale by the best common factor, in closed form: where rows nearly agree or nearly cancel, the solution for
        # orthogonal rows has the wrong size.
        factor = ((right * multiples ** (1 - exponent)).sum() / square) ** (1 / (1 + exponent))
        multiples, image = multiples * factor, image * factor
        wanted = right * multiples**-exponent
        # In relative steps, the Hessian diag(mu) C diag(mu) + e diag(mu wanted) is definite even if C is singular.
        hessian = multiples[:, None] * cosines * multiples
        hessian.diagonal().add_(exponent * multiples * wanted)
        triangle, _ = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve((multiples * (wanted - image))[:, None], triangle)[:, 0]
        multiples = _descend(cosines, right, exponent, multiples, step)
        if step.abs().max() <= 1e-12:
            break
    return multiples


def _descend(cosines: Tensor, right: Tensor, exponent: float, multiples: Tensor, step: Tensor) -> Tensor:
    """Backtracks along the relative step until mu is positive and mu^T C mu / 2 - sum_i a_i u(mu_i) has not risen."""

    def value(mu: Tensor) -> Tensor:
        utility = mu.log() if exponent == 1 else mu ** (1 - exponent) / (1 - exponent)
        return mu @ (cosines @ mu) / 2 - (right * utility).sum()

    length = 1 / (-step / 0.9).amax().clamp(min=1)
    start = value(multiples)
    for _ in range(30):
        candidate = multiples * (1 + length * step)
        # Near the solution, rounding hides the differences; the full step is right there.
        if value(candidate) <= start or step.abs().max() < 1e-4:
            return candidate
        length = length / 2
    return multiples
