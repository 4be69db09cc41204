"""A learnt scale of a loss, moved by implicit gradient descent."""

from __future__ import annotations

from torch import Tensor


def descend_log_scale(start: Tensor, losses: Tensor, rate: float) -> Tensor:
    """Solves s = start - rate (1 - L exp(-s)): a step on L exp(-s) + s with the gradient of where it arrives, [m]."""
    # The difference of both sides is increasing and concave in s: from the left of the solution Newton's method goes to
    # it without overshooting.
    s = start - rate
    for _ in range(100):
        pull = rate * losses * (-s).exp()
        step = (start - rate - s + pull) / (1 + pull)
        s = s + step
        if (step.abs() <= 1e-12 * (1 + s.abs())).all():
            break
    return s
