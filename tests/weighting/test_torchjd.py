"""Comparison with TorchJD for every method that both have; where they differ, the paper's definition decides."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_jd.weighting import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    ConstantWeighting,
    CRMOGMWeighting,
    DualProjWeighting,
    FairGradWeighting,
    Flattening,
    GradVacWeighting,
    IMTLGWeighting,
    KrumWeighting,
    MeanWeighting,
    MGDAWeighting,
    MoDoWeighting,
    PCDWeighting,
    PCGradWeighting,
    SDMGradWeighting,
    SumWeighting,
    UPGradWeighting,
)

pytest.importorskip("qpsolvers", reason="TorchJD's projections need qpsolvers")
from torchjd import aggregation as torchjd
from torchjd.linalg import QuadprogProjector

EXACT = QuadprogProjector(norm_eps=0, reg_eps=1e-14)
PREFERENCE = torch.tensor([0.5, 1.0, 0.2, 2.0], dtype=torch.float64)


def rows_of(m: int = 4, n: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SAME = [
    (UPGradWeighting(), torchjd.UPGradWeighting(projector=EXACT), 1e-8),
    (UPGradWeighting(pref_vector=PREFERENCE), torchjd.UPGradWeighting(PREFERENCE, projector=EXACT), 1e-8),
    (DualProjWeighting(), torchjd.DualProjWeighting(projector=EXACT), 1e-8),
    (DualProjWeighting(pref_vector=PREFERENCE), torchjd.DualProjWeighting(PREFERENCE, projector=EXACT), 1e-8),
    (MGDAWeighting(), torchjd.MGDAWeighting(epsilon=1e-12, max_iters=2000), 2e-2),
    (CAGradWeighting(0.3), torchjd.CAGradWeighting(c=0.3), 1e-3),
    (AlignedMTLWeighting(), torchjd.AlignedMTLWeighting(), 1e-10),
    (AlignedMTLWeighting(scale_mode="median"), torchjd.AlignedMTLWeighting(scale_mode="median"), 1e-10),
    (AlignedMTLWeighting(PREFERENCE, "rmse"), torchjd.AlignedMTLWeighting(PREFERENCE, "rmse"), 1e-10),
    (IMTLGWeighting(), torchjd.IMTLGWeighting(), 1e-8),
    (FairGradWeighting(alpha=1), torchjd.FairGradWeighting(alpha=1), 1e-4),
    (FairGradWeighting(alpha=2), torchjd.FairGradWeighting(alpha=2), 1e-4),
    (FairGradWeighting(alpha=0), torchjd.FairGradWeighting(alpha=0), 1e-12),
    (PCDWeighting(tau=0.3), torchjd.PCDWeighting(tau=0.3, eps=0), 1e-8),
    # These are stateful, and TorchJD's are meant for J_1 J_2^T of two batches; the formula is the same.
    (MoDoWeighting(gamma=0.02, rho=0.3), torchjd.MoDoWeighting(gamma=0.02, rho=0.3), 1e-10),
    (SDMGradWeighting(), torchjd.SDMGradWeighting(), 1e-6),
    (SDMGradWeighting(0.1, 0.2, 3, 0.7, PREFERENCE), torchjd.SDMGradWeighting(0.1, 0.2, 3, 0.7, PREFERENCE), 1e-6),
    (ConstantWeighting(weights=PREFERENCE), torchjd.ConstantWeighting(PREFERENCE), 0),
    (MeanWeighting(), torchjd.MeanWeighting(), 0),
    (SumWeighting(), torchjd.SumWeighting(), 0),
]


@pytest.mark.parametrize("ours, theirs, tolerance", SAME, ids=[str(ours) for ours, _, _ in SAME])
def test_same_weights(ours: Callable, theirs: Callable, tolerance: float) -> None:
    for seed in range(10):
        rows = rows_of(seed=seed)
        gramian = rows @ rows.T
        expected = theirs(gramian)
        assert (ours(gramian) - expected).abs().max() <= tolerance * expected.abs().max()
        if isinstance(theirs, torchjd.PCDWeighting):
            assert isinstance(ours, PCDWeighting)
            theirs.reset(), ours.reset()


@pytest.mark.parametrize("m", [3, 6])
def test_same_update_of_config(m: int) -> None:
    rows = rows_of(m, 5)
    expected = torchjd.ConFIG()(rows)
    torch.testing.assert_close(rows.T @ ConFIGWeighting()(rows @ rows.T), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "ours, theirs",
    [(PCGradWeighting(), torchjd.PCGradWeighting()), (GradVacWeighting(), torchjd.GradVacWeighting(eps=0))],
)
def test_same_weights_of_two_rows_where_no_order_is_drawn(ours: Callable, theirs: Callable) -> None:
    for seed in range(10):
        rows = rows_of(2, 3, seed)
        torch.testing.assert_close(ours(rows @ rows.T), theirs(rows @ rows.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("initial", [None, PREFERENCE])
def test_same_moving_average(initial: Tensor | None) -> None:
    ours = CRMOGMWeighting("imtl_g", 0.6, initial)
    theirs = torchjd.CRMOGMWeighting(torchjd.IMTLGWeighting(), 0.6, initial)
    for seed in range(4):
        rows = rows_of(seed=seed)
        torch.testing.assert_close(ours(rows @ rows.T), theirs(rows @ rows.T), rtol=1e-7, atol=1e-9)


def test_a_torchjd_weighting_is_a_weighting_here() -> None:
    rows = rows_of()
    for wrap in (CRMOGMWeighting, Flattening):
        assert torch.allclose(wrap(torchjd.MGDAWeighting())(rows @ rows.T), torchjd.MGDAWeighting()(rows @ rows.T))


class TestDepartures:
    """Known differences, each listed in docs/weightings.md."""

    @pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting"])
    def test_small_gradients_are_projected_too(self, name: str) -> None:
        """TorchJD treats a Gramian of trace below `norm_eps` as zero, and goes against objectives."""
        rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64) * 1e-4
        theirs = getattr(torchjd, name)()(rows @ rows.T)
        assert theirs.tolist() == pytest.approx([0.5, 0.5])
        assert (rows @ (rows.T @ theirs)).min() < 0
        ours = {"UPGradWeighting": UPGradWeighting, "DualProjWeighting": DualProjWeighting}[name]()(rows @ rows.T)
        assert (rows @ (rows.T @ ours)).min() >= -1e-20

    def test_no_regularisation_moves_the_projection(self) -> None:
        """TorchJD adds 1e-4 of the trace to the diagonal: here its update conflicts with a short row."""
        rows = torch.tensor([[100.0, 0], [-0.1, 0.05], [0, 0.02]], dtype=torch.float64)
        gramian = rows @ rows.T
        cosines = lambda w: (rows @ (rows.T @ w) / rows.norm(dim=1) / (rows.T @ w).norm()).min().item()  # noqa: E731
        assert cosines(torchjd.UPGradWeighting()(gramian)) < -0.5
        assert cosines(UPGradWeighting()(gramian)) > -1e-10

    def test_mgda_is_the_shortest_vector(self) -> None:
        """TorchJD stops after 100 steps of the Frank-Wolfe method."""
        rows = rows_of(20, 40) + 0.2
        gramian = rows @ rows.T
        ours, theirs = ((rows.T @ w(gramian)) for w in (MGDAWeighting(), torchjd.MGDAWeighting()))
        assert ours.norm() < theirs.norm() * (1 - 1e-6)
        assert (rows @ ours).min() >= ours @ ours * (1 - 1e-9)
        assert (rows @ theirs).min() < theirs @ theirs * (1 - 1e-3)

    def test_krum_squares_the_distances(self) -> None:
        """TorchJD's scores sum distances; the paper's sum squared ones."""
        rows = torch.tensor([[4.0], [19.0], [13.0], [0.0], [3.0], [19.0]], dtype=torch.float64)
        gramian = rows @ rows.T
        distances = (rows - rows.T).abs().sort(dim=1).values[:, 1:5]
        assert distances.sum(dim=1).argmin() != distances.square().sum(dim=1).argmin()
        ours, theirs = KrumWeighting(n_byzantine=0)(gramian), torchjd.KrumWeighting(n_byzantine=0)(gramian)
        assert ours.argmax() == distances.square().sum(dim=1).argmin()
        assert theirs.argmax() == distances.sum(dim=1).argmin()

    def test_imtl_g_of_long_rows(self) -> None:
        """TorchJD compares a sum of dimension 1 / length with 1e-12, and gives large gradients the weight 0."""
        rows = rows_of() * 1e13
        assert not torchjd.IMTLGWeighting()(rows @ rows.T).any()
        torch.testing.assert_close(IMTLGWeighting()(rows @ rows.T), IMTLGWeighting()(rows_of() @ rows_of().T))

    def test_cagrad_of_small_gradients(self) -> None:
        """TorchJD treats a Gramian of trace below `norm_eps` as zero, and a short g_w as Pareto stationary."""
        rows = rows_of() * 1e-6
        assert not torchjd.CAGradWeighting(c=0.5)(rows @ rows.T).any()
        torch.testing.assert_close(
            CAGradWeighting(c=0.5)(rows @ rows.T), CAGradWeighting(c=0.5)(rows_of() @ rows_of().T)
        )

    def test_pcd_has_no_epsilon(self) -> None:
        """TorchJD's epsilon outweighs the squared norms of small gradients, so that tau loses its effect."""
        rows = rows_of() * 1e-6
        gramian = rows @ rows.T
        ours, theirs = PCDWeighting(tau=0.5)(gramian), torchjd.PCDWeighting(tau=0.5)(gramian)
        scaled = PCDWeighting(tau=0.5)(gramian * 1e12)
        torch.testing.assert_close(ours, scaled)
        assert not torch.allclose(theirs, torchjd.PCDWeighting(tau=0.5)(gramian * 1e12), rtol=1e-2)

    def test_two_equal_rows_share_their_weight(self) -> None:
        """TorchJD's Krum and basic solutions of quadratic programs prefer the first row; minimum norm doesn't."""
        rows = torch.tensor([[-4.0, 1], [6, 1], [6, 1]], dtype=torch.float64)
        for weighting in (UPGradWeighting(), DualProjWeighting(), MGDAWeighting()):
            weights = weighting(rows @ rows.T)
            assert weights[1].item() == pytest.approx(weights[2].item(), rel=1e-12)
