"""CAGrad's search for its mixture where rows depend on each other."""

import numpy as np
import pytest

from hf_jd.weighting import CAGradWeighting, cagrad
from hf_jd.weighting._solvers.minimum_norm import hull_point
from tests.weighting.test_methods import close, jacobian


@pytest.mark.parametrize("c", [0.1, 0.5, 0.95, 2.0])
def test_cagrad_of_dependent_rows_takes_few_exact_steps(c: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """d/dw of <g_w, g_0> + c |g_0| |g_w| is the same for the whole support, and no smaller elsewhere."""
    points = []

    def counted(*arguments: np.ndarray) -> np.ndarray:
        points.append(hull_point(*arguments))
        return points[-1]

    monkeypatch.setattr(cagrad, "hull_point", counted)
    rows = jacobian(60, 30) + 0.3
    weights = CAGradWeighting(c=c)(rows @ rows.T)
    mean, mixture = rows.mean(dim=0), weights - 1 / 60
    correction = rows.T @ mixture
    close(correction.norm(), c * mean.norm())
    slopes = rows @ (mean + c * mean.norm() * correction / correction.norm())
    support = mixture > 1e-12
    assert mixture.min() > -1e-15
    close(slopes[support], slopes.min().expand(int(support.sum())))
    assert 2 <= len(points) <= 10  # 52 bisections
