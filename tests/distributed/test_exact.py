"""W processes give the result of one on the same global batches, and with `mean`, the stock Trainer's step."""

from __future__ import annotations

import numpy as np
import pytest

from hf_jd._compat import REDUCE_SCATTER
from tests.distributed.cases import GROUP
from tests.marks import slow

INSTANCE = {"jd_objectives": "instance"}
KINDS = {
    "instance-lora": ({**INSTANCE, "model": "lora"}, 1e-10),
    "group-lora": ({**GROUP, "model": "lora"}, 1e-10),
    "group-full": ({**GROUP, "model": "full"}, 1e-10),
    "instance-float32": ({**INSTANCE, "model": "lora32"}, 1e-6),
    "instance-blocks": ({**INSTANCE, "model": "lora", "jd_blocks": "module"}, 1e-10),
    "group-blocks": ({**GROUP, "model": "full", "jd_blocks": "parameter"}, 1e-10),
    "group-float32-norms": ({**GROUP, "model": "llama"}, 1e-6),
}


def relative(ours, theirs):
    return np.linalg.norm(ours["parameters"] - theirs["parameters"]) / np.linalg.norm(theirs["parameters"])


def assert_logged_alike(ours, theirs):
    assert len(ours["history"]) == len(theirs["history"]) == 6
    for our, their in zip(ours["history"], theirs["history"], strict=True):
        assert our == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in their.items()}


@pytest.mark.parametrize("accumulated", [slow(1), 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, slow(4)])
def test_many_processes_equal_one(processes, kind, accumulated, pools, alone):
    configuration, tolerance = KINDS[kind]
    # 23 examples are batches of 4, ..., 4 and 3: over two processes the last is of 2 and 1. Four get one example each.
    n = 23 if processes == 2 else 24
    configuration = {**configuration, "n": n, "gradient_accumulation_steps": accumulated}
    many = pools(processes).run("train", **configuration, bucket=5000)
    one = alone(**configuration)
    for result in many:
        assert (result["parameters"] == many[0]["parameters"]).all()
        assert [c.name for c in result["calls"]] == [c.name for c in many[0]["calls"]]
    assert relative(many[0], one) < tolerance
    assert_logged_alike(many[0], one)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("blocks", ["none", "layer"])
def test_the_collectives_for_gpus_equal_one_process(blocks, sharded, pools, alone):
    configuration = {**GROUP, "jd_blocks": blocks, "model": "full", "n": 24, "tasks": "00112101221000001111"}
    many = pools(4).run("train", **configuration, bucket=5000, summed_here=False, sharded=sharded)
    assert REDUCE_SCATTER in {call.name for call in many[0]["calls"]}
    assert relative(many[0], alone(**configuration)) < 1e-10


def test_four_processes_with_uneven_batches_equal_one(pools, alone):
    # Batches of 8, 8 and 7: two instances on each process, except one on the last.
    configuration = {"batch": 8, "n": 23, **GROUP}
    many = pools(4).run("train", **configuration)
    assert relative(many[3], alone(**configuration)) < 1e-10


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("accumulated", [slow(1), 3])
@pytest.mark.parametrize("even", [False, True], ids=["uneven", "filled"])
def test_mean_equals_stock_ddp(even, accumulated, objectives, pools):
    # The last batch is filled by repeating the first examples, which then count once more, as they do in Trainer.
    common = {"even": even, "n": 23 if not even else 21, "gradient_accumulation_steps": accumulated}
    stock = pools(2).run("train", stock=True, **common)[0]
    ours = pools(2).run("train", jd_weighting="mean", **common, **objectives)[0]
    assert relative(ours, stock) < 1e-10
    for our, their in zip(ours["history"], stock["history"], strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_groups_may_be_on_some_processes_only(processes, pools, alone):
    # With batches of 4, the first two examples are on the first process of two: "chat" is on one process only, and the
    # second batch has no group that all processes share.
    configuration = {**GROUP, "n": 24, "tasks": "00112101221000001111", "unlabelled": (2, 3, 5)}
    many = pools(processes).run("train", **configuration)
    one = alone(**configuration)
    assert relative(many[-1], one) < 1e-10
    assert_logged_alike(many[0], one)


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("accumulated", [slow(1), 3])
def test_a_stream_with_groups_equals_one_process(accumulated, dispatched, pools, alone):
    names = ["code", "docs", "chat"]
    configuration = {**GROUP, "n": 24, "gradient_accumulation_steps": accumulated, "jd_groups": names}
    many = pools(2).run("train", **configuration, dispatched=dispatched)
    one = alone(**configuration)
    assert relative(many[0], one) < 1e-10
    # A stream's number of updates per epoch is unknown.
    without = [{"history": [{**entry, "epoch": 0.0} for entry in ran["history"]]} for ran in (many[1], one)]
    assert_logged_alike(*without)


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("sharded", [False, slow(True)], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("flags", [{}, {"jd_backward": "two_pass"}, {"gradient_accumulation_steps": 2}], ids=repr)
def test_a_process_may_have_an_empty_batch(flags, sharded, objectives, pools, alone):
    # They make up the first process's first batch, and the second process's third batch.
    dropped = (0, 1, 10, 11)
    labels = {"n": 24, "unlabelled": (5, *dropped)}  # No process reads the examples that are left out.
    many = pools(2).run("train", **objectives, **flags, **labels, dropped=dropped, sharded=sharded)
    one = alone(**objectives, **flags, **labels)
    assert relative(many[0], one) < 1e-10
    assert_logged_alike(many[1], one)


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize(
    ("spoiled", "backward"), [("spoil_loss", "one_pass"), ("spoil_loss", "two_pass"), ("spoil_row", "one_pass")]
)
def test_what_is_nonfinite_on_one_process_is_left_out_by_all(backward, spoiled, objectives, pools, alone):
    configuration = {
        **objectives,
        "spoiled": spoiled,
        "jd_backward": backward,
        "gradient_accumulation_steps": 2,
        "steps": 6,
    }
    many = pools(2).run("train", **configuration)
    one = alone(**configuration)
    assert [c.name for c in many[0]["calls"]] == [c.name for c in many[1]["calls"]]
    assert np.isfinite(one["parameters"]).all()
    assert relative(many[0], one) < 1e-10
    left_out = [entry["jd/non_finite"] for entry in one["history"]]
    assert sum(left_out) > 0
    assert [entry["jd/non_finite"] for entry in many[1]["history"]] == left_out


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
def test_two_processes_equal_one_for_a_custom_loss(objectives, pools, alone):
    # 23 examples are batches of 4, ..., 4 and 3: over two processes the last is of 2 and 1. One has no label at all.
    configuration = {"own_loss": True, "n": 23, "gradient_accumulation_steps": 3}
    many = pools(2).run("train", **configuration, **objectives, bucket=5000)
    one = alone(**configuration, **objectives)
    assert (many[0]["parameters"] == many[1]["parameters"]).all()
    assert [call.name for call in many[0]["calls"]] == [call.name for call in many[1]["calls"]]
    assert relative(many[0], one) < 1e-10
    assert_logged_alike(many[0], one)
    stock = pools(2).run("train", stock=True, **configuration)[0]
    mean = pools(2).run("train", jd_weighting="mean", **configuration, **objectives)[0]
    assert relative(mean, stock) < 1e-10
    assert relative(many[0], stock) > 1e-6
    for our, their in zip(mean["history"], stock["history"], strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-6)
