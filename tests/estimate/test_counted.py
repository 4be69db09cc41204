"""The cost model against what the engine does: operations and bytes of real steps of small models."""

from __future__ import annotations

import pytest
from tests.estimate.counted import CONFIGS, EXPERTS, build, count, numbers

from hf_jd.estimate.cases import Case
from hf_jd.estimate.held import as_factors, row_bytes
from hf_jd.estimate.operations import gramian_flops, plain_flops, step_flops, update_flops
from hf_jd.estimate.shapes import build_on_meta, shape_of

CASES = {
    "instances": {"batch": 5, "tokens": 24},
    "one instance": {"batch": 1, "tokens": 31},
    "many short instances": {"batch": 26, "tokens": 7},
    "factors": {"batch": 4, "tokens": 9, "materialise": False},
    "two groups": {"batch": 6, "tokens": 20, "groups": 2},
    "more groups": {"batch": 10, "tokens": 8, "groups": 5},
}
LORA = {"lora": 3, "full": None}


@pytest.mark.parametrize("tuning", LORA)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_operations_and_bytes_are_those_of_a_real_step(name, tuning, settings):
    shape = shape_of(build_on_meta(CONFIGS[name], LORA[tuning]))
    case = Case(**numbers(**settings))
    counted = count(build(CONFIGS[name], LORA[tuning]), case)
    assert plain_flops(shape, case) == counted.plain
    expected = plain_flops(shape, case) + gramian_flops(shape, case)
    assert expected == pytest.approx(counted.gramian_and_rows, rel=1e-3)
    assert update_flops(shape, case) == pytest.approx(counted.update, rel=1e-3)
    assert step_flops(shape, case) == pytest.approx(counted.gramian_and_rows + counted.update, rel=1e-3)
    assert row_bytes(shape, case) == pytest.approx(counted.row_bytes, rel=1e-3)


def test_factors_are_met_in_these_cases():
    shape = shape_of(build_on_meta(CONFIGS["llama"], None))
    kept = {name: [as_factors(m, Case(**numbers(**s))) for m in shape.trained] for name, s in CASES.items()}
    assert any(kept["factors"])
    assert not any(kept["two groups"])


def test_experts():
    shape = shape_of(build_on_meta(EXPERTS, None))
    case = Case(**numbers(batch=4, tokens=16))
    counted = count(build(EXPERTS, None), case)
    assert row_bytes(shape, case) == pytest.approx(counted.row_bytes, rel=1e-3)
    assert plain_flops(shape, case) == pytest.approx(counted.plain, rel=1e-3)
