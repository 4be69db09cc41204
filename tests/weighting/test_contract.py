"""Properties of every weighting in `WEIGHTINGS`, for any Gramian."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_jd.weighting import WEIGHTINGS, LossWeighting, Stateful, Weighting, build_weighting

GRAMIAN = [name for name, cls in WEIGHTINGS.items() if not issubclass(cls, LossWeighting)]
CHANCE = {"random", "rlw", "pcgrad", "gradvac"}
NOT_SYMMETRIC = {*CHANCE, "pcd"}  # the first row is PCD's primary one
DEGREE = {"nash_mtl": -1, "fairgrad": -1, "gapo": -1}  # w(c^2 G) = c^degree w(G); 0 for the others
IN_UNITS = {"modo"}  # the paper's step size has the unit of a squared length
NON_CONFLICTING = ["upgrad", "dualproj", "mgda", "gapo"]
MEAN_WITHOUT_CONFLICT = ["upgrad", "dualproj"]


def build(name: str, m: int, **arguments: Any) -> Weighting:
    if name == "constant":
        arguments["weights"] = list(range(1, m + 1))
    return build_weighting(name, **arguments)


def smallest_size(name: str) -> int:
    # Among four rows, two are each other's nearest, so Krum's scores tie.
    return 5 if name == "krum" else 1


@dataclass
class Case:
    jacobian: Tensor

    @property
    def gramian(self) -> Tensor:
        return self.jacobian @ self.jacobian.T


@st.composite
def cases(draw: st.DrawFn, largest: int = 16, spread: float = 6.0, decades: float = 3.0) -> Case:
    """Draw rows of any rank, whose singular values and lengths span many decades."""
    m = draw(st.integers(1, largest))
    rank = draw(st.integers(1, m + 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns = 10 ** (-draw(st.floats(0, decades)) * torch.rand(rank, generator=generator, dtype=torch.float64))
    rows = 10 ** (draw(st.floats(0, spread)) * (torch.rand(m, generator=generator, dtype=torch.float64) - 0.5))
    shift = draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
    jacobian = torch.randn(m, rank, generator=generator, dtype=torch.float64) + shift
    return Case(rows[:, None] * jacobian * columns * 10 ** draw(st.floats(-8, 8)))


def statistic(weighting: Weighting, case: Case) -> Tensor:
    return case.gramian if weighting.reads == "gramian" else case.gramian.diagonal().sqrt()


@pytest.mark.parametrize("name", WEIGHTINGS)
@given(case=cases(largest=64, decades=12.0), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_weights_are_finite_and_like_the_input(name: str, case: Case, dtype: torch.dtype) -> None:
    m = len(case.jacobian)
    if m < smallest_size(name):
        return
    weighting = build(name, m)
    given_statistic = statistic(weighting, case).to(dtype)
    before = given_statistic.clone()
    weights = weighting(given_statistic)
    assert weights.shape == (m,)
    assert weights.dtype == dtype
    assert weights.device == given_statistic.device
    assert not weights.requires_grad
    # Weights of very short rows may be too large for float32 and bfloat16.
    assert weights.double().isfinite().all() or dtype != torch.float64
    assert torch.equal(given_statistic, before)


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name not in NOT_SYMMETRIC and name != "constant"])
@given(case=cases(spread=2.0), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_permutation_equivariance(name: str, case: Case, seed: int) -> None:
    m = len(case.jacobian)
    if m < smallest_size(name):
        return
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    weighting, other = build(name, m), build(name, m)
    whole = statistic(weighting, case)
    permuted = whole[order][:, order] if whole.ndim == 2 else whole[order]
    expected, actual = weighting(whole)[order], other(permuted)
    if weighting.reads == "gramian":
        assert update_difference(case.jacobian[order], actual, expected) < 1e-6
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name in GRAMIAN if name not in IN_UNITS])
@given(case=cases(spread=2.0), exponent=st.integers(-40, 40))
@settings(max_examples=30, deadline=None)
def test_weights_follow_the_scale_of_all_losses(name: str, case: Case, exponent: int) -> None:
    m = len(case.jacobian)
    if m < smallest_size(name):
        return
    factor = 2.0**exponent
    weights = build(name, m)(case.gramian)
    scaled = build(name, m)(case.gramian * factor**2)
    assert update_difference(case.jacobian, scaled, weights * factor ** DEGREE.get(name, 0)) < 1e-6


@pytest.mark.parametrize("name", NON_CONFLICTING)
@given(case=cases(largest=64, decades=12.0))
@settings(max_examples=60, deadline=None)
def test_no_row_conflicts_with_the_update(name: str, case: Case) -> None:
    weights = build(name, len(case.jacobian))(case.gramian)
    update = case.jacobian.T @ weights
    lengths = case.jacobian.norm(dim=1)
    # Weights that cancel leave rounding errors of their own size, which add up.
    noise = 1e-10 * update.norm() + 1e-12 * (weights.abs() * lengths).sum()
    assert ((case.jacobian @ update) >= -lengths * noise).all()


@pytest.mark.parametrize("name", MEAN_WITHOUT_CONFLICT)
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_the_mean_is_exact_without_conflict(name: str, case: Case) -> None:
    m = len(case.jacobian)
    weights = build(name, m)(Case(case.jacobian.abs()).gramian)
    assert torch.equal(weights, torch.full((m,), 1 / m, dtype=torch.float64))


@given(case=cases(spread=2.0), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_upgrad_is_linear_under_scaling(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, len(case.jacobian), generator=generator, dtype=torch.float64) + 0.1

    def update(scale: Tensor) -> Tensor:
        rows = scale[:, None] * case.jacobian
        return rows.T @ build("upgrad", len(rows))(rows @ rows.T)

    together = update(first + second)
    assert (together - update(first) - update(second)).norm() <= 1e-6 * case.jacobian.norm()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_objective_gets_its_known_weight(name: str) -> None:
    if name == "krum":
        return
    weighting = build(name, 1)
    weights = weighting(torch.tensor([[4.0]]) if weighting.reads == "gramian" else torch.tensor([4.0]))
    expected = {"cagrad": 1.5, "raco": 1.5, "gapo": 0.5, "nash_mtl": 0.5, "fairgrad": 0.5, "uncertainty": 0.5}.get(
        name, 1.0
    )
    assert weights.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize(
    "rows",
    [
        [[0.0, 0.0]] * 5,
        [[1.0, 2.0]] * 5,
        [[1, 0], [-1, 0], [0, 1], [0, -1.0], [0, 0]],
        [[1, 0], [-1, 1e-9], [1, 0], [-1, 1e-9], [0, 0]],
    ],
    ids=["zero", "equal", "opposite", "nearly_opposite"],
)
def test_degenerate_rows_give_finite_weights(name: str, rows: list[list[float]]) -> None:
    weighting = build(name, 5)
    case = Case(torch.tensor(rows, dtype=torch.float64))
    weights = weighting(statistic(weighting, case))
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Any) -> None:
    """Groups come and go between steps; the state is saved to a file and loaded."""
    generator = torch.Generator().manual_seed(0)
    steps = [["a", "b", "c", "d"], ["d", "a", "c", "b"], ["e", "b", "a", "c", "d"], ["a", "c", "e", "b", "d"]] * 2
    rows = [Case(torch.randn(len(names), 6, generator=generator, dtype=torch.float64)) for names in steps]
    arguments = {"primary": "a"} if name == "pcd" else {"window": 2} if name == "dwa" else {}
    if name == "constant":
        steps, rows = [s[:4] for s in steps], [Case(r.jacobian[:4]) for r in rows]

    def run(weighting: Weighting, span: slice) -> list[Tensor]:
        return [weighting(statistic(weighting, r), names=n) for r, n in zip(rows[span], steps[span], strict=True)]

    torch.manual_seed(0)
    uninterrupted = build(name, 4, **arguments)
    expected = run(uninterrupted, slice(0, 8))
    assert torch.initial_seed() == 0
    first, resumed = build(name, 4, **arguments), build(name, 4, **arguments)
    run(first, slice(0, 3))
    if isinstance(first, Stateful):
        torch.save(first.state_dict(), tmp_path / "state.pt")
        assert isinstance(resumed, Stateful)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        run(first, slice(3, 5))  # later steps of the original must not change the saved state
    for actual, wanted in zip(run(resumed, slice(3, 8)), expected[3:], strict=True):
        assert torch.equal(actual, wanted)
    if isinstance(uninterrupted, Stateful):
        uninterrupted.reset()
    for actual, wanted in zip(run(uninterrupted, slice(0, 8)), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", sorted(CHANCE))
def test_random_weightings_leave_the_global_generator_alone(name: str) -> None:
    weighting = build(name, 4)
    case = Case(torch.randn(4, 3, dtype=torch.float64))
    state = torch.get_rng_state()
    first = weighting(statistic(weighting, case))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    if name in ("random", "rlw"):
        assert not torch.equal(weighting(statistic(weighting, case)), first)
        assert not torch.equal(build(name, 4, seed=1)(statistic(weighting, case)), first)
    assert torch.equal(build(name, 4)(statistic(weighting, case)), first)


@pytest.mark.parametrize("name", [n for n in WEIGHTINGS if n not in {*CHANCE, "pcd", "constant", "krum"}])
def test_memory_follows_names_not_positions(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    names = ["a", "b", "c", "d"]
    steps = [Case(torch.randn(4, 6, generator=generator, dtype=torch.float64)) for _ in range(3)]
    plain, shuffled = build(name, 4), build(name, 4)
    for i, case in enumerate(steps):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(i))
        expected = plain(statistic(plain, case), names=names)[order]
        actual = shuffled(statistic(plain, Case(case.jacobian[order])), names=[names[j] for j in order])
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def update_difference(jacobian: Tensor, first: Tensor, second: Tensor) -> float:
    """Compute |J^T (a - b)|, relative to the largest term in the sums J^T a and J^T b."""
    sizes = torch.maximum(first.abs(), second.abs()) * jacobian.norm(dim=1)
    largest = sizes.max().item()
    if not math.isfinite(largest) or not largest:
        return 0.0 if torch.equal(first, second) else math.inf
    return (jacobian.T @ (first - second)).norm().item() / largest
