"""Bad input: the error names what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_jd.weighting import (
    WEIGHTINGS,
    AlignedMTLWeighting,
    CAGradWeighting,
    ConstantWeighting,
    COSMOSWeighting,
    CRMOGMWeighting,
    DualProjWeighting,
    DWAWeighting,
    FairGradWeighting,
    FAMOWeighting,
    Flattening,
    GAPOWeighting,
    GeometricMeanWeighting,
    GradVacWeighting,
    GroupDROWeighting,
    IMTLLWeighting,
    KrumWeighting,
    LossWeighting,
    MeanWeighting,
    MGDAWeighting,
    MoDoWeighting,
    NashMTLWeighting,
    PBIWeighting,
    PCDWeighting,
    RandomWeighting,
    SDMGradWeighting,
    STCHWeighting,
    UncertaintyWeighting,
    UPGradWeighting,
    build_weighting,
)

EYE = torch.eye(3)


@pytest.mark.parametrize("name", [name for name, cls in WEIGHTINGS.items() if not issubclass(cls, LossWeighting)])
@pytest.mark.parametrize(
    "gramian, message",
    [
        (torch.ones(3), r"square matrix \[m, m\]; this one has the shape \[3\]"),
        (torch.ones(3, 2), r"square matrix \[m, m\]; this one has the shape \[3, 2\]"),
        (torch.ones(2, 2, 2, 2), "Wrap the weighting in Flattening"),
        (torch.ones(0, 0), "no objectives to weigh"),
        (torch.ones(2, 2, dtype=torch.long), "floating dtype; this one has torch.int64"),
        (torch.tensor([[1, torch.nan], [torch.nan, 1]]), r"not finite: rows \[0, 1\]"),
        (torch.tensor([[1.0, 0], [0, torch.inf]]), r"not finite: rows \[1\]"),
        (torch.tensor([[1.0, 0], [0, -1e-3]]), r"entry \[1, 1\] is -0.001"),
        (torch.tensor([[1.0, 0.5], [0.4, 1]]), r"entry \[0, 1\] is 0.5 and entry \[1, 0\] is 0.4"),
        (torch.tensor([[1e-20, 5e-21], [4e-21, 1e-20]]), "A Gramian is symmetric"),
    ],
)
def test_a_matrix_that_is_no_gramian_is_refused(name: str, gramian: torch.Tensor, message: str) -> None:
    weighting = build_weighting(name, **({"weights": [1, 1]} if name == "constant" else {}))
    with pytest.raises(ValueError, match=message):
        weighting(gramian)


def test_low_precision_rounding_is_no_asymmetry() -> None:
    gramian = torch.tensor([[1.0, 0.5], [0.5 + 1e-7, 1.0]])
    assert MeanWeighting()(gramian).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "losses, message",
    [
        (torch.ones(2, 2), r"shape \[m\], m >= 1; these have the shape \[2, 2\]"),
        (torch.ones(0), r"these have the shape \[0\]"),
        (torch.ones(2, dtype=torch.long), "floating dtype; these have torch.int64"),
        (torch.tensor([1.0, torch.nan]), r"not finite: \[1.0, nan\]"),
    ],
)
@pytest.mark.parametrize("name", [name for name, cls in WEIGHTINGS.items() if issubclass(cls, LossWeighting)])
def test_invalid_losses_are_refused(name: str, losses: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_weighting(name)(losses)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: UPGradWeighting(pref_vector=[1, -1]), r"pref_vector has to hold finite non-negative numbers"),
        (lambda: DualProjWeighting(pref_vector=[0, 0]), r"not all zero; it is \[0.0, 0.0\]"),
        (lambda: UPGradWeighting(pref_vector=torch.eye(2)), r"pref_vector has one dimension"),
        (lambda: MGDAWeighting(pref_vector=[1, 0]), r"pref_vector has to hold positive numbers"),
        (
            lambda: UPGradWeighting(pref_vector=[1, 2])(EYE),
            r"pref_vector has 2 entries, but this step has 3 objectives",
        ),
        (lambda: ConstantWeighting(weights=[1, 2])(EYE), r"weights has 2 entries, but this step has 3 objectives"),
        (lambda: AlignedMTLWeighting(scale_mode="max"), r"scale_mode is .max.; choose one of min, median, rmse"),
        (lambda: CAGradWeighting(c=-1), "c is -1; give 0 or more"),
        (lambda: FairGradWeighting(alpha=-1), "alpha is -1; give a finite number of 0 or more"),
        (lambda: NashMTLWeighting(max_norm=-1), "max_norm >= 0"),
        (lambda: NashMTLWeighting(update_weights_every=0), "update_weights_every >= 1"),
        (lambda: GradVacWeighting(beta=2), r"beta is 2; give a number in \[0, 1\]"),
        (lambda: PCDWeighting(tau=2), r"PCD needs tau in \[0, 1\]"),
        (lambda: CRMOGMWeighting(alpha=2), r"alpha is 2; give a number in \[0, 1\]"),
        (lambda: CRMOGMWeighting(initial_weights=[1, -1]), "initial_weights has to hold finite non-negative numbers"),
        (
            lambda: CRMOGMWeighting(initial_weights=[1, 2])(EYE),
            "initial_weights has 2 entries, but the first step has 3",
        ),
        (
            lambda: build_weighting("cr_mogm", weighting="nash"),
            r"Unknown weighting 'nash'\. Choose one of nash_mtl, ",
        ),
        (lambda: KrumWeighting(n_byzantine=-1), "n_byzantine >= 0 and n_selected >= 1; they are -1 and 1"),
        (lambda: KrumWeighting(n_byzantine=1)(EYE), r"needs at least 4 objectives .*; this step has 3"),
        (lambda: KrumWeighting(n_byzantine=0, n_selected=5)(EYE), "needs at least 5 objectives"),
        (lambda: UncertaintyWeighting()(torch.tensor([-1.0])), "needs losses of 0 or more"),
        (lambda: UncertaintyWeighting(lr=0), "lr is 0; give a positive number"),
        (lambda: DWAWeighting(temperature=0), "temperature > 0"),
        (lambda: STCHWeighting(mu=0), "mu is 0; give a positive number"),
        (lambda: STCHWeighting(reference=[1])(torch.ones(2)), "reference has 1 entries, but this step has 2"),
        (lambda: FAMOWeighting(lr=0), "lr > 0 and decay >= 0; they are 0 and 0.001"),
        (lambda: FAMOWeighting()(torch.tensor([-1.0])), "FAMO needs losses of 0 or more"),
        (lambda: GeometricMeanWeighting()(torch.tensor([-1.0])), "The geometric mean needs losses of 0 or more"),
        (lambda: IMTLLWeighting(lr=0), "lr is 0; give a positive number"),
        (lambda: IMTLLWeighting()(torch.tensor([-1.0])), "IMTL-L needs losses of 0 or more"),
        (lambda: COSMOSWeighting(lambda_=-1), "lambda_ is -1; give 0 or more"),
        (lambda: COSMOSWeighting(weights=[1])(torch.ones(2)), "weights has 1 entries, but this step has 2"),
        (lambda: PBIWeighting(theta=-1), "theta is -1; give 0 or more"),
        (lambda: PBIWeighting(reference=[1])(torch.ones(2)), "reference has 1 entries, but this step has 2"),
        (lambda: GAPOWeighting(p=-1), "p is -1; give 0 or more"),
        (lambda: MoDoWeighting(gamma=0), "gamma > 0 and rho >= 0; they are 0 and 0.0"),
        (lambda: SDMGradWeighting(momentum=1), r"momentum in \[0, 1\)"),
        (lambda: SDMGradWeighting(pref_vector=[1])(EYE), "pref_vector has 1 entries, but this step has 3"),
        (lambda: GroupDROWeighting(step_size=-1), "step_size is -1; give a positive number"),
        (lambda: RandomWeighting().load_state_dict({"names": []}), r"lacks \['generator', 'steps', 'values'\]"),
        (lambda: RandomWeighting()(EYE, names=["a", "b"]), "3 different names, one per objective"),
        (lambda: RandomWeighting()(EYE, names=["a", "b", "a"]), "3 different names, one per objective"),
        (lambda: build_weighting("constant"), "The weighting 'constant' needs the argument 'weights'"),
        (lambda: Flattening(MeanWeighting())(torch.ones(2, 3, 2, 3)), r"this one has \[2, 3, 2, 3\]"),
        (lambda: Flattening(MeanWeighting())(torch.ones(2, 3, 2)), r"this one has \[2, 3, 2\]"),
    ],
)
def test_bad_parameters_and_steps_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_flattening_weighs_every_loss_as_an_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    flat = rows.reshape(24, 7)
    generalized = torch.einsum("abcn,defn->abcfed", rows, rows)
    weights = Flattening(UPGradWeighting())(generalized)
    assert weights.shape == (2, 3, 4)
    torch.testing.assert_close(weights.reshape(24), UPGradWeighting()(flat @ flat.T))
