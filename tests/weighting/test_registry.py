"""The list of weightings, and building its entries by name."""

import pytest

from hf_jd.weighting import WEIGHTINGS, CRMOGMWeighting, MGDAWeighting, UPGradWeighting, build_weighting


def test_a_weighting_is_built_by_name_with_its_arguments() -> None:
    assert build_weighting("upgrad", pref_vector=[1, 2]) == UPGradWeighting(pref_vector=(1.0, 2.0))


def test_an_unknown_name_lists_the_known_ones_nearest_first() -> None:
    with pytest.raises(ValueError, match=r"Unknown weighting 'upgard'\. Choose one of upgrad, ") as error:
        build_weighting("upgard")
    assert all(name in str(error.value) for name in WEIGHTINGS)


def test_an_unknown_argument_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown argument 'pref_vec': the weighting 'upgrad' takes pref_vector\."):
        build_weighting("upgrad", pref_vec=[1, 2])
    with pytest.raises(ValueError, match="the weighting 'mean' takes no arguments"):
        build_weighting("mean", c=1)


def test_a_weighting_that_wraps_another_takes_its_name() -> None:
    assert build_weighting("cr_mogm", weighting="mgda") == CRMOGMWeighting(weighting=MGDAWeighting())
