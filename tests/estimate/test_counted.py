"""The cost model compared with the engine: operations and bytes of real steps of small models."""

from __future__ import annotations

import pytest

from hf_jd.estimate.cases import Case
from hf_jd.estimate.memory import row_bytes, storage
from hf_jd.estimate.operations import (
    backward_flops,
    forward_flops,
    gramian_flops,
    plain_flops,
    row_flops,
    step_flops,
    update_flops,
)
from hf_jd.estimate.shapes import build_on_meta, shape_of
from tests.estimate.counted import CONFIGS, FIRST_MAPS, build, count, count_plain, numbers

CASES = {
    "instances": {"batch": 5, "tokens": 24},
    "one instance": {"batch": 1, "tokens": 31},
    "many short instances": {"batch": 67, "tokens": 7},
    "factors": {"batch": 4, "tokens": 9, "materialise": False},
    "two groups": {"batch": 6, "tokens": 20, "groups": 2},
    "more groups": {"batch": 10, "tokens": 8, "groups": 5},
}
# PEFT fuses adapters of experts with what they adapt, so no tap sees them. Nor does a tap see the positions of an
# encoder and its decoder, if they are trained.
UNTAPPED = [("mixtral", 3), ("bart", None), ("t5", None)]
TUNED = [(name, rank) for name in CONFIGS for rank in (3, None) if (name, rank) not in UNTAPPED]


def unneeded(name: str, rank: int | None, case: Case) -> float:
    """Count the first layer's input gradients, which the cost model includes, but autograd skips under LoRA."""
    return 0 if rank is None else sum(2 * case.all_tokens * d * (p + rank) for p, d in FIRST_MAPS[name])


@pytest.mark.parametrize("name, rank", TUNED)
def test_operations_and_bytes_match_a_real_step(name, rank):
    shape, model = shape_of(build_on_meta(CONFIGS[name], rank)), build(CONFIGS[name], rank)
    for settings in CASES.values():
        case = Case(**numbers(**settings))
        counted, left_out = count(model, case), unneeded(name, rank, case)
        assert plain_flops(shape, case) - left_out == counted.plain
        passes = forward_flops(shape, case) + backward_flops(shape, case) + row_flops(shape, case) - left_out
        # Experts get different numbers of tokens, so there are more pairs of tokens than in the cost model.
        close = 0.02 if name == "mixtral" else 1e-3
        assert passes + gramian_flops(shape, case) == pytest.approx(counted.jacobian_and_gramian, rel=close)
        assert update_flops(shape, case) == pytest.approx(counted.update, rel=1e-3)
        step = counted.jacobian_and_gramian + counted.update
        assert step_flops(shape, case) - left_out == pytest.approx(step, rel=close)
        assert row_bytes(shape, case) == pytest.approx(counted.row_bytes, rel=1e-3)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_plain_step_of_an_encoder_decoder_matches(name):
    shape, model, case = shape_of(build_on_meta(CONFIGS[name], None)), build(CONFIGS[name], None), Case(5, 24)
    assert plain_flops(shape, case) == count_plain(model, case)
    assert shape.layers == 5


def test_the_cases_cover_every_way_to_store_rows():
    shape = shape_of(build_on_meta(CONFIGS["mixtral"], None))
    stored = {name: {storage(m, Case(**numbers(**case))) for m in shape.trained} for name, case in CASES.items()}
    assert stored["factors"] == {"dense", "factors", "routed"}
    assert stored["more groups"] == {"dense", "routed"}
    assert stored["two groups"] == {"dense"}


@pytest.mark.parametrize("name, rank", TUNED)
def test_the_shape_has_all_parameters(name, rank):
    shape, model = shape_of(build_on_meta(CONFIGS[name], rank)), build(CONFIGS[name], rank)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = sum(t.entries * t.width for t in shape.tables if t.head is None)
    assert shape.trainable == shape.vectors + tables + sum(m.elements for m in shape.trained)
