"""Methods that TorchJD calls scalarizers, and methods from recent papers, each compared with its formula."""

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_jd.weighting import (
    CAGradWeighting,
    COSMOSWeighting,
    FAMOWeighting,
    GAPOWeighting,
    GeometricMeanWeighting,
    IMTLLWeighting,
    MGDAWeighting,
    MoDoWeighting,
    PBIWeighting,
    RACOWeighting,
    SDMGradWeighting,
)
from hf_jd.weighting._solvers.simplex import nearest_on_simplex
from tests.weighting.test_methods import any_rank, close, jacobian


def gradient(scalar: Tensor, losses: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, losses)[0]


def some_losses() -> Tensor:
    return torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64, requires_grad=True)


def test_geometric_mean_weights_are_its_gradient() -> None:
    losses = some_losses()
    close(GeometricMeanWeighting()(losses), gradient(losses.prod() ** (1 / 3), losses))


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 8.0])
def test_cosmos_is_the_gradient_of_its_scalar(lambda_: float) -> None:
    losses, r = some_losses(), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    scalar = r @ losses - lambda_ * torch.cosine_similarity(r, losses, dim=0)
    close(COSMOSWeighting(lambda_=lambda_, weights=r)(losses), gradient(scalar, losses))


def test_pbi_is_the_gradient_of_its_scalar() -> None:
    losses, r = some_losses(), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    z = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    ray = r / r.norm()
    along = (losses - z) @ ray
    scalar = along + 3 * (losses - z - along * ray).norm()
    close(PBIWeighting(theta=3, weights=r, reference=z)(losses), gradient(scalar, losses))
    close(PBIWeighting(theta=3, weights=r)(0.7 * r), ray)


def test_famo_matches_the_papers_loop() -> None:
    weighting, logits = FAMOWeighting(lr=0.5, decay=0.1), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([[1.0, 2.0, 0.3], [0.5, 1.9, 0.3], [0.6, 1.0, 0.1]], dtype=torch.float64)
    for i, losses in enumerate(steps):
        if i:
            (delta,) = torch.autograd.grad(logits.softmax(0) @ (steps[i - 1] / losses).log(), logits)
            logits = (logits - 0.5 * (delta + 0.1 * logits)).detach().requires_grad_()
        shares = logits.softmax(0) / losses
        close(weighting(losses), (shares / shares.sum()).detach())


def test_imtl_l_descends_on_its_own_loss_and_ends_at_losses_of_one() -> None:
    losses = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    weighting = IMTLLWeighting(lr=0.5)
    assert weighting(losses).tolist() == [1, 1, 1]
    scales = weighting.memory.values["log_scales"]
    close(scales, -0.5 * (scales.exp() * losses - 1))
    for _ in range(300):
        weights = weighting(losses)
    close(weights, 1 / losses, 1e-6)


@any_rank
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0])
def test_gapo_is_mgda_on_rescaled_rows(m: int, n: int, p: float) -> None:
    rows = jacobian(m, n) + 0.3
    rescaled = rows / rows.norm(dim=1, keepdim=True) ** p
    shares = cvxpy.Variable(m, nonneg=True)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(rescaled.numpy().T @ shares)), [cvxpy.sum(shares) == 1]).solve(
        cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    update = rows.T @ GAPOWeighting(p=p)(rows @ rows.T)
    assert np.linalg.norm(update.numpy() - rescaled.numpy().T @ shares.value) <= 1e-5 * rescaled.norm(dim=1).max()
    if not p:
        close(update, rows.T @ MGDAWeighting()(rows @ rows.T))


@any_rank
def test_raco_clips_cagrads_mixture(m: int, n: int) -> None:
    rows, preference = jacobian(m, n) + 0.3, torch.arange(1, m + 1, dtype=torch.float64)
    preference /= preference.sum()
    mean = rows.T @ preference
    mixture = CAGradWeighting(c=0.5, pref_vector=preference)(rows @ rows.T) - preference
    clipped = torch.minimum(mixture / mixture.sum(), preference)
    direction = rows.T @ clipped
    expected = mean + 0.5 * mean.norm() * direction / direction.norm()
    close(rows.T @ RACOWeighting(c=0.5, pref_vector=preference)(rows @ rows.T), expected)
    assert m == 2 or not torch.allclose(clipped, mixture / mixture.sum())


def test_the_nearest_point_of_the_simplex_matches_a_convex_solver() -> None:
    for seed in range(10):
        point = 2 * jacobian(1, 6, seed)[0]
        x = cvxpy.Variable(6, nonneg=True)
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - point.numpy())), [cvxpy.sum(x) == 1]).solve(cvxpy.CLARABEL)
        np.testing.assert_allclose(nearest_on_simplex(point).numpy(), x.value, atol=1e-6)


def test_modo_steps_on_the_simplex_and_ends_at_mgda() -> None:
    rows = jacobian(3, 5)
    gramian = rows @ rows.T
    weighting = MoDoWeighting(gamma=0.02, rho=0.5)
    first = torch.full((3,), 1 / 3, dtype=torch.float64)
    close(weighting(gramian), nearest_on_simplex(first - 0.02 * (gramian + 0.5 * torch.eye(3)) @ first))
    weighting = MoDoWeighting(gamma=0.02)
    for _ in range(3000):
        weights = weighting(gramian)
    close(rows.T @ weights, rows.T @ MGDAWeighting()(gramian), 1e-6)


def test_shares_of_present_objectives_sum_to_one() -> None:
    weighting, rows = MoDoWeighting(gamma=0.01), jacobian(4, 6)
    weighting(rows @ rows.T, names="abcd")
    part = rows[[3, 1]]
    assert weighting(part @ part.T, names="db").sum().item() == pytest.approx(1)
    assert weighting(rows @ rows.T, names="efgh").sum().item() == pytest.approx(1)


def test_sdmgrad_minimises_its_regularised_length() -> None:
    rows = jacobian(3, 5)
    weighting = SDMGradWeighting(lr=0.2, lambda_=0.3)
    for _ in range(300):
        weights = weighting(rows @ rows.T)
    mean, shares = rows.mean(dim=0).numpy(), cvxpy.Variable(3, nonneg=True)
    length = cvxpy.sum_squares(rows.T.numpy() @ shares + 0.3 * mean)
    cvxpy.Problem(cvxpy.Minimize(length), [cvxpy.sum(shares) == 1]).solve(cvxpy.CLARABEL)
    expected = (rows.T.numpy() @ shares.value + 0.3 * mean) / 1.3
    np.testing.assert_allclose((rows.T @ weights).numpy(), expected, atol=1e-6)


def test_sdmgrads_first_steps_match_the_papers_loop() -> None:
    rows = jacobian(4, 6)
    gramian, equal = rows @ rows.T, torch.full((4,), 0.25, dtype=torch.float64)
    scaled = gramian / rows.norm(dim=1).mean() ** 2
    shares, velocity = equal, 0 * equal
    for _ in range(2):
        velocity = 0.5 * velocity + scaled @ (shares + 0.3 * equal)
        shares = nearest_on_simplex(shares - 0.1 * velocity)
    close(SDMGradWeighting(lr=0.1, n_iter=2)(gramian), (shares + 0.3 * equal) / 1.3)
