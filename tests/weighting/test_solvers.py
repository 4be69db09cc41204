"""The projection's two solvers agree, replace each other, and report failure; an independent solver agrees, too."""

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_jd.weighting import DualProjWeighting, MGDAWeighting, UPGradWeighting
from hf_jd.weighting._solvers import projection
from hf_jd.weighting._solvers.batched import solve_nonnegative
from hf_jd.weighting._solvers.projection import _solve_batched, _solve_quadprog, cone_projection


def jacobian(m: int, n: int, seed: int = 0, common: float = 0.0, decay: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return (rows + common) * torch.arange(1, n + 1, dtype=torch.float64) ** -decay


def unit_gramian(rows: Tensor) -> Tensor:
    rows = rows / rows.norm(dim=1, keepdim=True)
    return (rows @ rows.T).fill_diagonal_(1)


def one_by_one(cosines: Tensor, targets: Tensor) -> Tensor:
    return torch.from_numpy(_solve_quadprog(cosines.numpy(), targets.numpy(), None))


SPECTRA = [(60, 300, 0.0, 0.0), (60, 70, 0.0, 0.0), (60, 300, 0.3, 0.0), (60, 300, 0.0, 1.0), (60, 61, 0.0, 1.5)]


@pytest.mark.parametrize("m, n, common, decay", SPECTRA)
def test_the_solvers_agree(m: int, n: int, common: float, decay: float) -> None:
    cosines = unit_gramian(jacobian(m, n, common=common, decay=decay))
    targets = torch.eye(m, dtype=torch.float64)
    batched, single = _solve_batched(cosines, targets, torch.linalg.cholesky(cosines)), one_by_one(cosines, targets)
    difference = batched - single
    assert ((difference @ cosines) * difference).sum(dim=1).max().clamp(min=0).sqrt() < 1e-9
    assert (batched > 0).any()


def repeated(m: int, n: int) -> Tensor:
    """Repeat some rows two or three times, also with other lengths, as in a batch that holds an example twice."""
    rows = jacobian(m, n, common=-0.1)
    rows[1], rows[7], rows[m - 1], rows[9] = rows[0], 3 * rows[0], rows[4], 0
    return rows


def nearly_opposite(m: int, distance: float = 1e-9) -> Tensor:
    rows = jacobian(m, 2 * m)
    pairs = m // 2
    rows[1::2] = -rows[::2][:pairs] + distance * jacobian(pairs, 2 * m, seed=1)
    return rows


@pytest.mark.parametrize("m, n", [(40, 120), (64, 80)])
def test_repeated_rows_are_solved_together_too_and_share_their_weight(m: int, n: int) -> None:
    rows = repeated(m, n)
    targets = torch.eye(m, dtype=torch.float64)
    found, violation = projection.together(rows @ rows.T, targets)
    expected, _ = projection.one_by_one(rows @ rows.T, targets)
    assert violation.max() <= 1e-10
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(found * lengths, expected * lengths, rtol=1e-8, atol=1e-8)


def test_mixed_targets_are_shared_from_the_least_up() -> None:
    """Equal rows with different targets: the correction raises the smallest target first."""
    rows = jacobian(12, 30)
    rows[0] *= 0.01
    rows[1] = rows[2] = rows[0]
    targets = torch.rand(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = projection.together(rows @ rows.T, targets)
    expected, _ = projection.one_by_one(rows @ rows.T, targets)
    assert (found - targets)[:, :3].max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [36, 39])
def test_a_few_dependent_rows_are_solved_together(n: int) -> None:
    rows = jacobian(40, n)
    targets = torch.eye(40, dtype=torch.float64)
    found, violation = projection.together(rows @ rows.T, targets)
    expected, _ = projection.one_by_one(rows @ rows.T, targets)
    assert violation.max() <= 1e-10
    torch.testing.assert_close(found @ rows, expected @ rows, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [1e-6, 1e-8, 1e-9, 0.0])
@pytest.mark.parametrize("m", [3, 8, 33, 64])
def test_nearly_opposite_rows(m: int, distance: float, dtype: torch.dtype) -> None:
    """A Gramian can't resolve how rows opposite up to 1e-8 differ; the conditions that it can resolve must hold."""
    rows = nearly_opposite(m, distance).to(dtype)
    product = rows @ rows.T
    gramian = (product + product.T).double() / 2  # like engines do: processors round its two halves differently
    lengths = gramian.diagonal().sqrt()
    for weighting in (UPGradWeighting(), DualProjWeighting(), MGDAWeighting()):
        weights = weighting(gramian)
        assert weights.isfinite().all()
        slopes = gramian @ weights / lengths
        assert slopes.min() >= -(1e-8 if dtype == torch.float64 else 1e-7) * (weights.abs() * lengths).sum()


@pytest.mark.slow
def test_the_solvers_agree_on_many_problems() -> None:
    """Enough unknowns per problem for conjugate gradients, and an ill-conditioned matrix on which they fail."""
    for decay in (0.0, 0.7):
        cosines = unit_gramian(jacobian(160, 640, decay=decay))
        targets = torch.eye(160, dtype=torch.float64)
        torch.testing.assert_close(
            _solve_batched(cosines, targets, torch.linalg.cholesky(cosines)),
            one_by_one(cosines, targets),
            atol=1e-9,
            rtol=1e-9,
        )


def test_a_problem_that_one_solver_fails_goes_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = jacobian(6, 9)
    expected = UPGradWeighting()(rows @ rows.T)

    def half(cosines: np.ndarray, targets: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
        corrections = _solve_quadprog(cosines, targets, factor)
        corrections[::2] = np.nan
        corrections[1] += 1e-3
        return corrections

    monkeypatch.setattr(projection, "_solve_quadprog", half)
    torch.testing.assert_close(UPGradWeighting()(rows @ rows.T), expected, rtol=1e-9, atol=0)


def test_when_every_solver_fails_the_error_has_the_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = jacobian(3, 4)

    def wrong(cosines: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
        return targets * 0

    monkeypatch.setattr(projection, "_solve_quadprog", wrong)
    monkeypatch.setattr(projection, "_solve_batched", wrong)
    with pytest.raises(ValueError, match=r"did not reach the tolerance .* eigenvalues are \[0\."):
        UPGradWeighting()(rows @ rows.T)


def test_a_row_that_does_not_settle_is_handed_back_as_nan() -> None:
    cosines = unit_gramian(jacobian(4, 6))
    right = torch.stack([cosines[0], torch.full((4,), torch.nan, dtype=torch.float64)])
    solution = solve_nonnegative(cosines, right)
    assert solution[0].isfinite().all()
    assert solution[1].isnan().all()


@pytest.mark.parametrize("m, n", [(20, 60), (40, 25), (48, 200)])
def test_dualproj_against_a_convex_solver(m: int, n: int) -> None:
    rows = jacobian(m, n)
    x = cvxpy.Variable(n)
    mean = rows.mean(dim=0).numpy()
    matrix = rows.numpy()
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - mean)), [matrix @ x >= 0]).solve(
        cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    update = rows.T.numpy() @ DualProjWeighting()(rows @ rows.T).numpy()
    assert np.linalg.norm(update - x.value) <= 1e-6 * np.linalg.norm(mean)


@pytest.mark.parametrize("m, n", [(20, 60), (40, 25), (100, 30), (100, 400)])
def test_mgda_against_a_convex_solver(m: int, n: int) -> None:
    rows = jacobian(m, n, common=0.2)
    weights = cvxpy.Variable(m, nonneg=True)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(rows.T.numpy() @ weights)), [cvxpy.sum(weights) == 1]).solve(
        cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    found = MGDAWeighting()(rows @ rows.T)
    update, expected = rows.T @ found, rows.T @ torch.from_numpy(weights.value)
    assert (update - expected).norm() <= 1e-6 * rows.norm(dim=1).max()
    assert update.norm() <= expected.norm() * (1 + 1e-9) + 1e-12
    # A certificate: no vertex of the hull is nearer.
    assert (rows @ update - update @ update >= -1e-9 * rows.norm(dim=1) * rows.norm(dim=1).min()).all()


@pytest.mark.parametrize("m, n", [(30, 12), (24, 23), (30, 5)])
def test_upgrad_of_dependent_rows_meets_the_optimality_conditions(m: int, n: int) -> None:
    rows = jacobian(m, n, common=0.3)
    weights = cone_projection(rows @ rows.T, torch.eye(m, dtype=torch.float64))
    corrections = weights - torch.eye(m, dtype=torch.float64)
    updates = weights @ rows
    lengths = rows.norm(dim=1)
    assert (corrections >= 0).all()
    assert (updates @ rows.T >= -1e-9 * lengths * lengths[:, None]).all()
    assert ((updates @ rows.T) * corrections).abs().max() <= 1e-8 * (lengths**2).max()
