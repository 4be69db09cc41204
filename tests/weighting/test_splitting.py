"""Low rank, solved by splitting: compared with quadprog, one problem at a time, and with the optimality conditions."""

import pytest
import torch
from torch import Tensor

from hf_jd.weighting import UPGradWeighting
from hf_jd.weighting._solvers import projection, splitting

M = 64


def low_rank(rank: int, seed: int, dtype: torch.dtype = torch.float64, common: float = 0.0, m: int = M) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, rank, generator=generator, dtype=torch.float64).add(common).to(dtype)


def is_zero_cone(rows: Tensor) -> bool:
    mean = torch.full((1, len(rows)), 1 / len(rows), dtype=torch.float64)
    weights, _ = projection.one_by_one(rows @ rows.T, mean)
    return bool((weights @ rows).norm() < 1e-6)


@pytest.mark.parametrize(
    "rank, common, zero_cone",
    [(32, 0.0, True), (32, 0.0, False), (48, 0.0, False), (8, 0.0, True), (8, 1.0, False)],
)
def test_the_solution_is_quadprogs(rank: int, common: float, zero_cone: bool) -> None:
    """With a dual cone of {0} there are many solutions, and the smallest is wanted; with another cone there are few."""
    draws = (low_rank(rank, seed, common=common) for seed in range(20))
    rows = next(rows for rows in draws if is_zero_cone(rows) == zero_cone)
    targets = torch.eye(M, dtype=torch.float64)
    actual, violation = projection.together(rows @ rows.T, targets)
    expected, _ = projection.one_by_one(rows @ rows.T, targets)
    assert violation.max() <= 1e-10
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(actual * lengths, expected * lengths, rtol=0, atol=1e-7 * expected.max().item())


@pytest.mark.parametrize("rank", [8, 32])
def test_a_dual_cone_of_zero_is_solved_in_the_null_space(rank: int) -> None:
    rows = next(rows for rows in (low_rank(rank, seed) for seed in range(20)) if is_zero_cone(rows))
    rows /= rows.norm(dim=1, keepdim=True)
    cosines, targets = rows @ rows.T, 0.5 * torch.eye(M, dtype=torch.float64)
    actual = splitting._solve_in_null_space(splitting._Problems(cosines, targets, targets @ cosines, 1e-8))
    settled = ~actual[:, 0].isnan()
    assert settled.sum() >= M - 2
    expected, _ = projection.one_by_one(cosines, targets)
    difference = (targets + actual - expected)[settled]
    assert difference.abs().max() <= 1e-7 * expected.max()


def test_another_dual_cone_has_no_solution_in_the_null_space() -> None:
    rows = next(rows for rows in (low_rank(32, seed) for seed in range(20)) if not is_zero_cone(rows))
    rows /= rows.norm(dim=1, keepdim=True)
    cosines, targets = rows @ rows.T, torch.eye(M, dtype=torch.float64)
    problems = splitting._Problems(cosines, targets, targets @ cosines, 1e-8)
    assert splitting._solve_in_null_space(problems).isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_solved_for_the_gramian_that_it_gives(seed: int) -> None:
    rows = low_rank(32, seed, torch.float32)
    gramian = (rows @ rows.T).double()
    gramian = (gramian + gramian.T) / 2
    targets = torch.eye(M, dtype=torch.float64)
    actual, violation = projection.together(gramian, targets)
    expected, _ = projection.one_by_one(gramian, targets)
    assert violation.max() <= 1e-10
    difference = actual - expected
    assert ((difference @ gramian) * difference).sum(dim=1).max() <= 1e-12 * gramian.max()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [12, 64, 96, 124])
def test_larger_ones_meet_the_optimality_conditions(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(128, rank, generator=generator, dtype=torch.float64)
    targets = torch.eye(128, dtype=torch.float64)
    weights = projection.cone_projection(rows @ rows.T, targets)
    slopes, lengths = weights @ rows @ rows.T, rows.norm(dim=1)
    assert (weights >= targets).all()
    assert (slopes >= -1e-9 * lengths * (weights * lengths).sum(dim=1, keepdim=True)).all()
    assert (slopes * (weights - targets)).abs().max() <= 1e-8 * lengths.max() ** 2


def test_what_splitting_leaves_goes_to_quadprog(monkeypatch: pytest.MonkeyPatch) -> None:
    m = 80  # Smaller problems go to quadprog directly.
    rows = low_rank(40, 0, m=m)
    expected = UPGradWeighting()(rows @ rows.T)
    solve, left = splitting.solve_low_rank, []

    def half(cosines: Tensor, targets: Tensor, regularisation: float = 0.0) -> Tensor:
        corrections = solve(cosines, targets, regularisation)
        corrections[::2] = torch.nan
        left.append(len(corrections[::2]))
        return corrections

    monkeypatch.setattr(projection, "solve_low_rank", half)
    torch.testing.assert_close(UPGradWeighting()(rows @ rows.T), expected, rtol=1e-6, atol=1e-8)
    assert left == [m // 2]


@pytest.mark.parametrize(
    ("m", "rank", "first"),
    [
        (64, 32, "one_by_one"),
        (64, 63, "one_by_one"),
        (64, 128, "together"),
        (80, 40, "together"),
        (32, 64, "one_by_one"),
    ],
)
def test_few_dependent_rows_are_solved_one_by_one(m: int, rank: int, first: str) -> None:
    rows = low_rank(rank, 0, m=m)
    actual = projection.chosen_solvers(rows @ rows.T, torch.eye(m, dtype=torch.float64))
    assert [solver.__name__ for solver in actual][0] == first


def test_problems_that_never_settle_are_handed_back_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "_STEPS", (1,))
    rows = low_rank(32, 0)
    rows /= rows.norm(dim=1, keepdim=True)
    assert splitting.solve_low_rank(rows @ rows.T, torch.eye(M, dtype=torch.float64), 1e-8).isnan().all()
