"""Each method compared with a second formula, based on the Jacobian, or with an independent solver."""

import math
from collections.abc import Callable

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_jd.weighting import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    ConstantWeighting,
    CRMOGMWeighting,
    DWAWeighting,
    FairGradWeighting,
    GradVacWeighting,
    GroupDROWeighting,
    IMTLGWeighting,
    KrumWeighting,
    MeanWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCDWeighting,
    PCGradWeighting,
    RandomWeighting,
    RLWWeighting,
    STCHWeighting,
    SumWeighting,
    UncertaintyWeighting,
    UPGradWeighting,
)
from hf_jd.weighting.pcgrad import visits


def jacobian(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * m + 10 * n + seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


SHAPES = [(2, 4), (3, 5), (5, 9), (8, 4), (12, 30)]
full_rank = pytest.mark.parametrize("m, n", [(m, n) for m, n in SHAPES if n > m])
any_rank = pytest.mark.parametrize("m, n", SHAPES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@any_rank
@pytest.mark.parametrize("mode, of", [("min", min), ("median", None), ("rmse", None)])
def test_aligned_mtl_makes_all_singular_values_equal(m: int, n: int, mode: str, of: Callable | None) -> None:
    rows = jacobian(m, n)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    lengths = {"min": values.min(), "median": values.median(), "rmse": values.square().mean().sqrt()}
    preference = torch.rand(m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = preference @ (left * lengths[mode]) @ right
    weighting = AlignedMTLWeighting(pref_vector=preference, scale_mode=mode)
    close(rows.T @ weighting(rows @ rows.T), expected)


@full_rank
def test_imtl_g_has_equal_projections_and_weights_that_sum_to_one(m: int, n: int) -> None:
    rows = jacobian(m, n)
    weights = IMTLGWeighting()(rows @ rows.T)
    projections = (rows @ (rows.T @ weights)) / rows.norm(dim=1)
    close(projections, projections.mean().expand(m))
    assert weights.sum().item() == pytest.approx(1)
    preferred = IMTLGWeighting(pref_vector=range(1, m + 1))(rows @ rows.T)
    projections = (rows @ (rows.T @ preferred)) / rows.norm(dim=1) / torch.arange(1, m + 1)
    close(projections, projections.mean().expand(m))


def test_imtl_g_of_dependent_rows_uses_the_pseudoinverse() -> None:
    rows = jacobian(8, 4)
    gramian = rows @ rows.T
    solution = torch.linalg.pinv(gramian, hermitian=True) @ rows.norm(dim=1)
    close(IMTLGWeighting()(gramian), solution / solution.sum(), 1e-8)


@any_rank
def test_config_matches_the_pseudoinverse_of_the_unit_rows(m: int, n: int) -> None:
    rows = jacobian(m, n)
    preference = torch.arange(1, m + 1, dtype=torch.float64)
    direction = torch.linalg.pinv(rows / rows.norm(dim=1, keepdim=True)) @ preference
    direction /= direction.norm()
    expected = (rows @ direction).sum() * direction
    close(rows.T @ ConFIGWeighting(pref_vector=preference)(rows @ rows.T), expected, 1e-8)


@any_rank
@pytest.mark.parametrize("c", [0.1, 0.5, 0.95])
def test_cagrad_solves_its_primal_problem(m: int, n: int, c: float) -> None:
    """max_d min_i <g_i, d> in the ball around the mean, by an interior point method."""
    rows = jacobian(m, n) + 0.3
    matrix, mean = rows.numpy(), rows.mean(dim=0).numpy()
    d, worst = cvxpy.Variable(n), cvxpy.Variable()
    ball = cvxpy.norm(d - mean) <= c * np.linalg.norm(mean)
    cvxpy.Problem(cvxpy.Maximize(worst), [matrix @ d >= worst, ball]).solve(
        cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )
    update = rows.T @ CAGradWeighting(c=c)(rows @ rows.T)
    assert (update - rows.mean(dim=0)).norm() <= c * np.linalg.norm(mean) * (1 + 1e-8)
    assert (rows @ update).min().item() == pytest.approx(worst.value.item(), abs=1e-8 * np.linalg.norm(mean) ** 2)
    assert np.linalg.norm(update.numpy() - d.value) < 1e-4 * np.linalg.norm(mean)


@pytest.mark.parametrize("m, n", [(3, 5), (8, 5), (20, 4), (33, 60)])
def test_cagrad_is_zero_where_rows_cancel(m: int, n: int) -> None:
    """With opposite rows, no update makes progress on all: for c >= 1, the best update is 0, not rounding errors."""
    rows = jacobian(m, n)
    rows[1::2] = -2 * rows[::2][: m // 2]
    for radius in (1, 2):
        weights = CAGradWeighting(c=radius)(rows @ rows.T)
        assert (rows.T @ weights).norm() <= 1e-7 * weights.sum() * rows.norm(dim=1).max()
    # Within a smaller radius, it is as short as the ball allows.
    update = rows.T @ CAGradWeighting(c=0.5)(rows @ rows.T)
    mean = rows.mean(dim=0)
    assert (update - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-9)


def test_cagrad_is_the_mean_at_radius_zero_and_ignores_zero_rows() -> None:
    rows = jacobian(4, 6)
    close(CAGradWeighting(c=0)(rows @ rows.T), torch.full((4,), 0.25, dtype=torch.float64))
    padded = torch.cat([rows, torch.zeros(1, 6, dtype=torch.float64)])
    preference = [0.25] * 4
    expected = rows.T @ CAGradWeighting(pref_vector=preference)(rows @ rows.T)
    close(padded.T @ CAGradWeighting(pref_vector=[*preference, 1])(padded @ padded.T), expected)


@full_rank
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 10.0])
def test_fairgrad_solves_its_equation(m: int, n: int, alpha: float) -> None:
    rows = jacobian(m, n)
    gramian = rows @ rows.T
    weights = FairGradWeighting(alpha=alpha)(gramian)
    assert (weights > 0).all()
    close(gramian @ weights * weights ** (1 / alpha), torch.ones(m, dtype=torch.float64), 1e-7)
    rows = rows * torch.logspace(-3, 3, m, dtype=torch.float64)[:, None]
    weights = FairGradWeighting(alpha=alpha)(rows @ rows.T)
    # Progress may be smaller than the terms that cancel in it, so errors are relative to these terms.
    gap = rows @ rows.T @ weights - weights ** (-1 / alpha)
    lengths = rows.norm(dim=1)
    assert (gap.abs() <= 1e-12 * lengths * (weights @ lengths)).all()


@full_rank
def test_nash_mtl_maximises_the_product_of_progress(m: int, n: int) -> None:
    rows = jacobian(m, n)
    gramian = rows @ rows.T
    weights = NashMTLWeighting(max_norm=0)(gramian)
    close(gramian @ weights * weights, torch.ones(m, dtype=torch.float64))
    update = rows.T @ weights
    assert update.norm().item() == pytest.approx(math.sqrt(m))
    product = (rows @ update).log().sum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = update + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
        progress = rows @ (other * update.norm() / other.norm())
        assert (progress <= 0).any() or progress.log().sum() <= product
    limited = rows.T @ NashMTLWeighting(max_norm=0.5)(gramian)
    close(limited, update * 0.5 / update.norm())


def test_nash_mtl_keeps_its_weights_between_updates_until_an_objective_appears() -> None:
    first, second = (jacobian(3, 5, seed) for seed in (1, 2))
    weighting = NashMTLWeighting(max_norm=0, update_weights_every=3)
    weights = weighting(first @ first.T, names="abc")
    close(weighting(second @ second.T, names="abc"), weights)
    close(weighting(second[:2] @ second[:2].T, names="ca"), weights[[2, 0]])
    assert not torch.allclose(weighting(second @ second.T, names="abc"), weights)
    close(weighting(first @ first.T, names="abd"), weights)


def test_nash_mtl_and_fairgrad_return_zero_if_no_update_serves_all() -> None:
    rows = torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    assert torch.equal(NashMTLWeighting()(rows @ rows.T), torch.zeros(3))
    assert torch.equal(FairGradWeighting()(rows @ rows.T), torch.zeros(3))


@any_rank
@pytest.mark.parametrize("f, selected", [(0, 1), (1, 2)])
def test_krum_matches_loops_over_distances(m: int, n: int, f: int, selected: int) -> None:
    rows, near = jacobian(m, n), m - f - 2
    if near < 2:
        pytest.skip("scores tie, or there are too few rows")
    scores = []
    for i in range(m):
        distances = sorted(((rows[i] - rows[j]) ** 2).sum().item() for j in range(m) if j != i)
        scores.append(sum(distances[:near]))
    best = sorted(range(m), key=scores.__getitem__)[:selected]
    expected = torch.zeros(m, dtype=torch.float64)
    expected[best] = 1 / selected
    assert torch.equal(KrumWeighting(n_byzantine=f, n_selected=selected)(rows @ rows.T), expected)


@any_rank
def test_pcgrad_matches_the_papers_loops(m: int, n: int) -> None:
    rows = jacobian(m, n)
    orders = visits(m, torch.Generator().manual_seed(7)).T.tolist()
    update = torch.zeros(n, dtype=torch.float64)
    for i in range(m):
        changed = rows[i].clone()
        for j in orders[i]:
            if changed @ rows[j] < 0:
                changed -= (changed @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        update += changed
    close(rows.T @ PCGradWeighting(seed=7)(rows @ rows.T), update)


@any_rank
def test_gradvac_matches_the_papers_loops(m: int, n: int) -> None:
    weighting, generator = GradVacWeighting(beta=0.3, seed=7), torch.Generator().manual_seed(7)
    targets = torch.zeros(m, m, dtype=torch.float64)
    for step in range(3):
        rows = jacobian(m, n, step) + 0.2 * (2 - step)
        orders = visits(m, generator).T.tolist()
        update = torch.zeros(n, dtype=torch.float64)
        for i in range(m):
            changed = rows[i].clone()
            for j in orders[i]:
                cosine = torch.cosine_similarity(changed, rows[j], dim=0)
                target = targets[i, j].clone()
                if cosine < target:
                    sines = (1 - cosine**2).sqrt(), (1 - target**2).sqrt()
                    length = changed.norm() * (target * sines[0] - cosine * sines[1]) / (rows[j].norm() * sines[1])
                    changed = changed + length * rows[j]
                    torch.testing.assert_close(torch.cosine_similarity(changed, rows[j], dim=0), target)
                targets[i, j] = 0.7 * target + 0.3 * cosine
            update += changed
        close(rows.T @ weighting(rows @ rows.T), update, 1e-8)


def test_visits_are_permutations_of_the_others() -> None:
    orders = visits(6, torch.Generator().manual_seed(0)).T.tolist()
    assert [sorted(order) for order in orders] == [[j for j in range(6) if j != i] for i in range(6)]


@any_rank
@pytest.mark.parametrize("tau", [0.02, 0.5])
def test_pcd_matches_a_convex_solver(m: int, n: int, tau: float) -> None:
    rows = jacobian(m, n) + 0.3
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    d = cvxpy.Variable(n)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(d - unit[0])), [unit[1:] @ d >= tau])
    problem.solve(cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    update = rows.T @ PCDWeighting(tau=tau)(rows @ rows.T)
    direction = unit[0] if problem.status != "optimal" else d.value / np.linalg.norm(d.value)
    assert update.norm().item() == pytest.approx(rows[0].norm().item())
    np.testing.assert_allclose((update / update.norm()).numpy(), direction, atol=1e-6)


def test_pcd_finds_its_primary_objective_by_name() -> None:
    rows = jacobian(3, 5)
    order = [2, 0, 1]
    tau = [0.1, 0.3]
    expected = PCDWeighting(tau=tau)(rows @ rows.T, names="abc")[order]
    permuted = rows[order]
    actual = PCDWeighting(tau=tau[::-1], primary="a")(permuted @ permuted.T, names=["c", "a", "b"])
    close(actual, expected)
    with pytest.raises(ValueError, match=r"primary objective 'x' is not among this step's: \['a', 'b', 'c'\]"):
        PCDWeighting(primary="x")(rows @ rows.T, names="abc")
    with pytest.raises(ValueError, match="tau has 2 entries; this step has 1 objectives besides the primary"):
        PCDWeighting(tau=tau)(rows[:2] @ rows[:2].T)


def test_cr_mogm_averages_what_it_wraps_by_name() -> None:
    inner = MGDAWeighting()
    weighting = CRMOGMWeighting(weighting=inner, alpha=0.75)
    rows = [jacobian(3, 4, seed) for seed in range(3)]
    first, second, third = (inner(r @ r.T) for r in rows)
    close(weighting(rows[0] @ rows[0].T, names="abc"), first)
    smoothed = weighting(rows[1] @ rows[1].T, names="abd")
    close(smoothed[:2], 0.75 * first[:2] + 0.25 * second[:2])
    close(smoothed[2], second[2])
    last = weighting(rows[2] @ rows[2].T, names="cda")
    close(last, 0.75 * torch.stack([first[2], smoothed[2], smoothed[0]]) + 0.25 * third)


def test_cr_mogm_wraps_any_callable_and_weightings_of_losses() -> None:
    weighting = CRMOGMWeighting(weighting=lambda gramian: gramian.diagonal(), alpha=0.5)
    weighting(torch.eye(2))
    close(weighting(3 * torch.eye(2)), torch.tensor([2.0, 2.0]))
    losses = CRMOGMWeighting(weighting=STCHWeighting(), alpha=0.5)
    assert losses.reads == "losses"
    close(losses(torch.tensor([1.0, 2.0])), STCHWeighting()(torch.tensor([1.0, 2.0])), 1e-6)


def test_constant_sum_and_mean_have_their_weights() -> None:
    rows = jacobian(3, 2)
    gramian = rows @ rows.T
    assert ConstantWeighting(weights=[3, 0, 1])(gramian).tolist() == [3, 0, 1]
    assert SumWeighting()(gramian).tolist() == [1, 1, 1]
    assert MeanWeighting()(gramian).tolist() == [1 / 3, 1 / 3, 1 / 3]


def test_preferences_reach_upgrad_and_mgda() -> None:
    rows = jacobian(3, 6)
    gramian = rows @ rows.T
    parts = [UPGradWeighting(pref_vector=row)(gramian) for row in torch.eye(3).tolist()]
    close(UPGradWeighting(pref_vector=[0.5, 2, 0])(gramian), 0.5 * parts[0] + 2 * parts[1])
    preference = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    orthogonal = torch.eye(3, dtype=torch.float64)
    progress = orthogonal @ MGDAWeighting(pref_vector=preference)(orthogonal)
    close(progress / preference, (progress / preference).mean().expand(3))
    close(MGDAWeighting(pref_vector=[1 / 3] * 3)(gramian), MGDAWeighting()(gramian))


def test_uncertainty_weights_descend_on_their_own_loss() -> None:
    losses = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    weighting = UncertaintyWeighting(lr=0.5)
    assert weighting(losses).tolist() == [0.5, 0.5, 0.5]
    before = torch.zeros(3, dtype=torch.float64)
    after = weighting.memory.values["log_variances"]
    close(after, before - 0.5 * (1 - losses * (-after).exp()) / 2)
    for _ in range(300):
        weights = weighting(losses)
    close(2 * weights, 1 / losses, 1e-6)
    huge = torch.tensor([1e30, 0.0])
    assert all(weighting(huge, names="xy").isfinite().all() for _ in range(50))


def test_dwa_uses_the_averages_of_two_windows() -> None:
    weighting = DWAWeighting(temperature=0.5, window=2)
    steps = [[1.0, 4.0], [3.0, 4.0], [1.0, 1.0], [1.0, 3.0]]
    for losses in steps:
        assert weighting(torch.tensor(losses)).tolist() == [1.0, 1.0]
    rates = torch.tensor([1.0 / 2.0, 2.0 / 4.0])
    assert weighting(torch.tensor([9.0, 9.0])).tolist() == pytest.approx((2 * (rates / 0.5).softmax(0)).tolist())
    weighting(torch.tensor([1.0, 9.0]))
    rates = torch.tensor([5.0 / 1.0, 9.0 / 2.0])
    assert weighting(torch.tensor([1.0, 1.0])).tolist() == pytest.approx((2 * (rates / 0.5).softmax(0)).tolist())


def test_stch_is_the_gradient_of_the_smooth_maximum() -> None:
    losses = torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64, requires_grad=True)
    preference, reference, mu = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), [0.1, 0.2, 0.3], 0.2
    smooth = mu * torch.logsumexp(preference * (losses - torch.tensor(reference)) / mu, dim=0)
    (gradient,) = torch.autograd.grad(smooth, losses)
    close(STCHWeighting(mu=mu, weights=preference, reference=reference)(losses), gradient, 1e-7)
    assert STCHWeighting(mu=1e-9)(losses).tolist() == pytest.approx([0, 1 / 3, 0])


def test_group_dro_ascends_by_exponentiated_gradients() -> None:
    weighting = GroupDROWeighting(step_size=0.5)
    first = weighting(torch.tensor([1.0, 2.0], dtype=torch.float64), names="ab")
    expected = torch.tensor([0.5, 1.0], dtype=torch.float64).softmax(0)
    close(first, expected)
    mixture = torch.cat([expected, expected.new_tensor([1 / 3])])
    mixture *= mixture.new_tensor([1, math.exp(1.5), math.exp(0.5)])
    second = weighting(torch.tensor([3.0, 1.0], dtype=torch.float64), names="bc")
    close(second, (mixture / mixture.sum())[1:])


def test_random_weights_are_a_distribution() -> None:
    weighting = RLWWeighting()
    draws = torch.stack([weighting(torch.ones(3, dtype=torch.float64)) for _ in range(2000)])
    close(draws.sum(dim=1), torch.ones(2000, dtype=torch.float64))
    assert (draws.mean(dim=0) - 1 / 3).abs().max() < 0.02
    assert draws.std(dim=0).min() > 0.15


def test_mgda_shares_its_weight_among_zero_rows() -> None:
    rows = torch.tensor([[1.0, 0], [0, 0], [-1, 0], [0, 0]], dtype=torch.float64)
    assert MGDAWeighting()(rows @ rows.T).tolist() == [0, 0.5, 0, 0.5]


def test_cr_mogm_resets_what_it_wraps() -> None:
    weighting = CRMOGMWeighting(weighting=RandomWeighting(), alpha=0.5)
    gramian = torch.eye(3, dtype=torch.float64)
    draws = [weighting(gramian) for _ in range(3)]
    weighting.reset()
    assert all(torch.equal(weighting(gramian), draw) for draw in draws)


def test_pcd_normalises_by_moving_averages() -> None:
    """A row that was longer before now counts as short: its constraint asks for less of its possible progress."""
    rows = torch.tensor([[1.0, 0], [-0.5, 1]], dtype=torch.float64)
    fresh = PCDWeighting(tau=0.5, beta=0.9)(rows @ rows.T)
    weighting = PCDWeighting(tau=0.5, beta=0.9)
    scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
    weighting(rows @ rows.T * torch.outer(scale, scale))
    later = weighting(rows @ rows.T)
    average = (0.9 * 0.1 * 125 + 0.1 * 1.25) / (1 - 0.9**2)
    h = torch.stack([rows[0], rows[1] / average**0.5])
    short = torch.relu(0.5 * h[1] @ h[1] - h[0] @ h[1]) / (h[1] @ h[1])
    direction = h[0] + short * h[1]
    close(rows.T @ later, direction / direction.norm())
    assert not torch.allclose(later, fresh)
