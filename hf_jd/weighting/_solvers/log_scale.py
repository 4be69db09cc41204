"""Update a loss's learnt scale by implicit gradient descent."""

from __future__ import annotations

from torch import Tensor


def descend_log_scale(start: Tensor, losses: Tensor, rate: float) -> Tensor:
    """Solves s = start - rate (1 - L exp(-s)): a step on L exp(-s) + s with the gradient at its end point, [m]."""
    # The left side minus the right is increasing and concave in s: started left of the solution, Newton's method
    # converges without overshooting.
    s = start - rate
    for _ in range(100):
        pull = rate * losses * (-s).exp()
        step = (start - rate - s + pull) / (1 + pull)
        s = s + step
        if (step.abs() <= 1e-12 * (1 + s.abs())).all():
            break
    return s
