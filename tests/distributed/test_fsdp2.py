"""FSDP2 as set up by accelerate: W processes give the result of one, and with `mean`, the stock Trainer's step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.cases import GROUP
from tests.distributed.test_exact import INSTANCE, KINDS, assert_logged_alike, relative
from tests.marks import slow


@pytest.mark.parametrize(("processes", "accumulated"), [slow(1, 3), slow(2, 1), (2, 3), slow(4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_equal_one(processes, kind, accumulated, pools, alone):
    configuration, tolerance = KINDS[kind]
    n = 24 if processes == 4 else 23
    configuration = {**configuration, "n": n, "gradient_accumulation_steps": accumulated}
    many = pools(processes).run("train", sharded=True, **configuration, bucket=5000)
    one = alone(**configuration)
    assert relative(many[-1], one) < tolerance
    assert_logged_alike(many[0], one)
    for result in many:
        assert [c.name for c in result["calls"]] == [c.name for c in many[0]["calls"]]


def test_replicas_of_shards_are_refused(pools):
    for failed, answer in pools(4).answers_of("shard_replicas"):
        assert failed
        assert "does not work with replicas of shards (HSDP)" in answer


def test_shards_of_columns_are_refused(pools):
    for failed, answer in pools(2).answers_of("shard_columns"):
        assert failed
        assert "on 2 of 2 processes; use FSDP2 over all processes, along the first dimension" in answer


@pytest.mark.parametrize("model", [slow("lora"), "full"])
@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
def test_mean_equals_stock_fsdp2(objectives, model, pools):
    common = {"n": 23, "model": model, "sharded": True, "gradient_accumulation_steps": 3}
    stock = pools(2).run("train", stock=True, **common)[0]
    ours = pools(2).run("train", jd_weighting="mean", **common, **objectives)[0]
    assert relative(ours, stock) < 1e-10
    for our, their in zip(ours["history"], stock["history"], strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-6)


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
def test_two_passes_equal_one_process(objectives, pools, alone):
    configuration = {**objectives, "jd_backward": "two_pass", "gradient_accumulation_steps": 2}
    many = pools(2).run("train", sharded=True, **configuration)
    assert relative(many[0], alone(**configuration)) < 1e-10


@pytest.mark.parametrize("accumulated", [slow(1), 3])
@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
def test_a_custom_loss_equals_one_process(objectives, accumulated, pools, alone):
    configuration = {**objectives, "own_loss": "scaled", "gradient_accumulation_steps": accumulated}
    many = pools(2).run("train", sharded=True, **configuration)
    assert relative(many[0], alone(**configuration)) < 1e-10


@pytest.mark.parametrize(
    "flags", [{"jd_every": 3}, {"jd_warmup_steps": 3}, {"jd_group_reduction": "mean", "jd_every": 2}]
)
def test_unmeasured_updates_equal_one_process(flags, pools, alone):
    configuration = {**GROUP, **flags, "gradient_accumulation_steps": 2, "unlabelled": (5,)}
    many = pools(2).run("train", sharded=True, **configuration)
    assert relative(many[0], alone(**configuration)) < 1e-10


@pytest.mark.parametrize("model", ["lora", slow("full")])
def test_activation_checkpointing_equals_one_process(model, pools, alone):
    many = pools(2).run("train", sharded=True, checkpointing=True, model=model, **GROUP)
    assert relative(many[0], alone(model=model, **GROUP)) < 1e-10


@pytest.mark.parametrize("objectives", [INSTANCE, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("spoiled", ["spoil_loss", "spoil_row"])
def test_what_is_nonfinite_on_one_process_is_left_out_by_all(spoiled, objectives, pools, alone):
    configuration = {**objectives, "spoiled": spoiled, "gradient_accumulation_steps": 2, "steps": 6}
    many = pools(2).run("train", sharded=True, **configuration)
    one = alone(**configuration)
    assert np.isfinite(one["parameters"]).all()
    assert relative(many[0], one) < 1e-10


def test_a_process_may_have_no_losses(pools, alone):
    # The first two examples make up one process's first batch, and have no labels.
    configuration = {"unlabelled": (0, 1, 6), "n": 24, **GROUP}
    many = pools(2).run("train", sharded=True, **configuration)
    assert relative(many[0], alone(**configuration)) < 1e-10
