"""Float32 and bfloat16 Gramians have rounding errors: these make no step fail, and don't dominate any update.

Errors are drawn from seeds and added, so that they are the same on every processor.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_jd.weighting import DualProjWeighting, UPGradWeighting
from hf_jd.weighting._solvers import projection
from hf_jd.weighting._solvers.projection import cone_projection
from tests.weighting.test_contract import GRAMIAN, build, smallest_size, update_difference
from tests.weighting.test_solvers import nearly_opposite

FLOAT32, BFLOAT16 = 6e-8, 4e-3  # the largest relative rounding error of a number
SIZES = [2, 3, 8, 17, 33, 64]
UNIQUE = ["upgrad", "dualproj", "mgda", "pcd"]
SEMIDEFINITE = [*UNIQUE, "cagrad", "config", "nash_mtl", "fairgrad", "cr_mogm"]


def normal(generator: torch.Generator, m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def low_rank(generator: torch.Generator, m: int) -> Tensor:
    return normal(generator, m, max(1, m // 3))


def one_rank_less(generator: torch.Generator, m: int) -> Tensor:
    return normal(generator, m, m - 1)


def one_direction(generator: torch.Generator, m: int) -> Tensor:
    return normal(generator, m, 1) @ normal(generator, 1, m)


def duplicates(generator: torch.Generator, m: int) -> Tensor:
    rows = normal(generator, m, 2 * m)
    rows[1::2] = 3 * rows[::2][: m // 2]
    return rows


def opposite(generator: torch.Generator, m: int, distance: float = 0.0) -> Tensor:
    rows = normal(generator, m, 2 * m)
    rows[1::2] = -rows[::2][: m // 2] + distance * normal(generator, m // 2, 2 * m)
    return rows


def nearly(generator: torch.Generator, m: int) -> Tensor:
    return opposite(generator, m, 1e-4)


def opposite_with_zero(generator: torch.Generator, m: int) -> Tensor:
    rows = opposite(generator, m)
    rows[-1], rows[m // 2] = rows[0], 0
    return rows


def stationary(generator: torch.Generator, m: int) -> Tensor:
    rows = normal(generator, m, 2 * m)
    rows[-1] = -rows[:-1].sum(dim=0)
    return rows


def many_lengths(generator: torch.Generator, m: int) -> Tensor:
    return opposite(generator, m) * 10 ** torch.linspace(-6, 6, m, dtype=torch.float64)[:, None]


Rows = Callable[[torch.Generator, int], Tensor]
FAMILIES: list[Rows] = [
    low_rank,
    one_rank_less,
    one_direction,
    duplicates,
    opposite,
    nearly,
    opposite_with_zero,
    stationary,
    many_lengths,
]


def with_errors(rows: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """Compute the rows' Gramian with errors of up to `error` times both rows' lengths; float32 values, in float64."""
    signs = torch.randint(-1, 2, (len(rows), len(rows)), generator=generator).double().triu(1)
    lengths = rows.norm(dim=1)
    return (rows @ rows.T + error * (signs + signs.T) * lengths.outer(lengths)).float().double()


def cases(family: Rows, error: float, sizes: list[int] = SIZES) -> list[tuple[Tensor, Tensor]]:
    generators = {m: torch.Generator().manual_seed(m) for m in sizes}
    rows = {m: family(generator, m) for m, generator in generators.items()}
    return [(rows[m], with_errors(rows[m], error, generators[m])) for m in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("error", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weighting_accepts_low_precision(family: Rows, error: float, dtype: torch.dtype) -> None:
    for name in GRAMIAN:
        for rows, gramian in cases(family, error, [2, 3, 8, 33]):
            if len(rows) >= smallest_size(name):
                assert build(name, len(rows))(gramian.to(dtype)).isfinite().all(), name


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
@pytest.mark.parametrize("error", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("family", FAMILIES)
def test_conflicts_and_updates_are_not_dominated_by_rounding(family: Rows, error: float, name: str) -> None:
    for rows, gramian in cases(family, error):
        weights = build(name, len(rows))(gramian)
        update, lengths = rows.T @ weights, rows.norm(dim=1)
        assert ((rows @ update) >= -4 * error * lengths * (weights * lengths).sum()).all()
        assert update.norm() <= (1 + 4 * error) * (lengths.min() if name == "mgda" else lengths.mean())


@pytest.mark.parametrize("name", UNIQUE)
@pytest.mark.parametrize("error", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_of_all_losses_and_their_order_change_no_weight(family: Rows, error: float, name: str) -> None:
    for rows, gramian in cases(family, error):
        m = len(rows)
        weights = build(name, m)(gramian)
        assert update_difference(rows, build(name, m)(gramian * 1e-16), weights) < 1e-6
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(m - 1).flip(0)])  # keeps PCD's first
        assert update_difference(rows[order], build(name, m)(gramian[order][:, order]), weights[order]) < 1e-6


@pytest.mark.parametrize("distance", [1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("m", [3, 8, 17, 33])
def test_opposite_rows_tolerate_the_last_bit_of_float32(m: int, distance: float) -> None:
    rows = nearly_opposite(m, distance).float().double()
    lengths = rows.norm(dim=1)
    for seed in range(25):
        bits = torch.randint(-1, 2, (m, m), generator=torch.Generator().manual_seed(seed)).double().triu()
        product = rows @ rows.T
        gramian = (product + FLOAT32 * (bits + bits.triu(1).T) * product.abs()).float().double()
        for weights in (UPGradWeighting()(gramian), DualProjWeighting()(gramian)):
            assert ((gramian @ weights) / lengths).min() >= -1e-7 * (weights * lengths).sum()
            assert (rows.T @ weights).norm() <= lengths.mean()


@pytest.mark.parametrize("distance", [7e-8, 1e-7, 3e-7, 7e-7])
def test_opposite_rows_meet_the_tolerance_of_float64(distance: float) -> None:
    m = 33
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rows = normal(generator, m, 66)
        rows[1::2] = -rows[::2][:16] + distance * normal(generator, 16, 66)
        rows /= rows.norm(dim=1, keepdim=True)
        gramian, targets = rows @ rows.T, torch.eye(m, dtype=torch.float64)
        weights = cone_projection(gramian, targets)
        slopes, sums = weights @ gramian, weights.sum(dim=1)
        infeasible = (-slopes).clamp(min=0).sum(dim=1)
        unequal = (slopes * (weights - targets)).abs().sum(dim=1) / sums
        lengths = (slopes * weights).sum(dim=1).abs().sqrt()
        assert ((infeasible + unequal) / (lengths + 1e-3 * sums)).max() <= 1e-6


@pytest.mark.parametrize("name", SEMIDEFINITE)
@pytest.mark.parametrize("scale", [1.0, 1e-16])
@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, -5.0], [-5.0, 1.0]]),
        torch.tensor([[1.0, -1.1], [-1.1, 1.0]]),
        torch.tensor([[1.0, -0.9, -0.9], [-0.9, 1.0, -0.9], [-0.9, -0.9, 1.0]]),
        torch.full((8, 8), -0.5).fill_diagonal_(1),
    ],
    ids=["far", "beyond_one", "three", "eight"],
)
def test_matrices_far_from_a_gramian_are_refused(matrix: Tensor, scale: float, name: str) -> None:
    with pytest.raises(ValueError, match=r"A Gramian is positive semi-definite: .* this one's are \[-"):
        build(name, len(matrix))(matrix.double() * scale)


@pytest.mark.parametrize("name", GRAMIAN)
def test_a_transposed_gramian_gives_the_same_weights(name: str) -> None:
    for _, gramian in cases(opposite_with_zero, FLOAT32, [8]):
        assert torch.equal(build(name, 8)(gramian.t().contiguous().t()), build(name, 8)(gramian))


def test_many_problems_of_low_rank_are_solved_together() -> None:
    for _, gramian in cases(low_rank, FLOAT32, [48]):
        targets = torch.eye(48, dtype=torch.float64)
        assert projection.together(gramian, targets)[1].max() <= 1e-10
        assert projection.one_by_one(gramian, targets)[1].max() <= 1e-10
