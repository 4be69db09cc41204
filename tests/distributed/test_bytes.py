"""The collectives send the bytes that the documents state, to 1 %."""

from __future__ import annotations

import pytest

from hf_jd.estimate.cases import Case
from hf_jd.estimate.shapes import shape_of
from hf_jd.estimate.traffic import step_bytes
from tests.distributed.cases import GROUP, MODELS
from tests.marks import slow

STEPS = 3


@pytest.mark.parametrize("processes", [slow(1), 2, slow(4)])
@pytest.mark.parametrize("kind", ["instance", "group", "stock"])
def test_bytes_sent_match_the_cost_model(kind, processes, pools):
    flags = {"instance": {}, "group": GROUP, "stock": {"stock": True}}[kind]
    settings = {"model": "wide", "batch": 8, "n": 24, "steps": STEPS, "unlabelled": (), **flags}
    results = pools(processes).run("train", **settings)
    n, share = results[0]["parameters"].size, (processes - 1) / processes
    m, k, itemsize = 8, 3, 8
    expected = {
        "instance": share * itemsize * n * (m / processes + 2) + 2 * share * 8 * m**2,
        "group": share * itemsize * n * (k + 1) + 2 * share * 8 * k**2,
        "stock": 0.0,
    }[kind]
    for result in results:
        sent = sum(call.sent for call in result["calls"]) / STEPS
        assert sent == pytest.approx(expected, rel=0.01, abs=2000 if kind == "stock" else 0)
        if kind != "stock":  # `hf-jd estimate` gives the same.
            case = Case(m // processes, 12, 1, processes, k if kind == "group" else None, trained_bytes=itemsize)
            assert sent == pytest.approx(step_bytes(shape_of(MODELS["wide"]()), case), rel=0.01)


@pytest.mark.parametrize("processes", [2, slow(4)])
@pytest.mark.parametrize("kind", ["instance", "group"])
def test_bytes_sent_with_sharded_weights_match_the_cost_model(kind, processes, pools):
    flags = {"instance": {}, "group": GROUP}[kind]
    settings = {"model": "wide", "batch": 8, "n": 24, "unlabelled": (), "sharded": True, **flags}
    k = 3 if kind == "group" else None
    case = Case(8 // processes, 12, 1, processes, k, "fsdp2", number_bytes=8, trained_bytes=8)
    expected = step_bytes(shape_of(MODELS["wide"]()), case)
    # Weights are also gathered before the first and after the last step, so the bytes of a step are what one more step
    # adds.
    shorter, longer = (pools(processes).run("train", steps=steps, **settings) for steps in (2, 3))
    for less, more in zip(shorter, longer, strict=True):
        sent = sum(call.sent for call in more["calls"]) - sum(call.sent for call in less["calls"])
        assert sent == pytest.approx(expected, rel=0.015)
