"""DeepSpeed itself, on CPUs: W processes give the result of one without it, and with `mean`, DeepSpeed's own step."""

from __future__ import annotations

import re
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.parallelism_config import ParallelismConfig

from hf_jd import JDTrainer
from hf_jd.estimate.cases import Case
from hf_jd.estimate.shapes import shape_of
from hf_jd.estimate.traffic import plain_bytes, step_bytes
from hf_jd.trainer.backends import backend_of
from tests.distributed.cases import GROUP, MODELS
from tests.distributed.pool import SECONDS, Pool
from tests.distributed.test_exact import INSTANCE, relative
from tests.marks import slow
from tests.trainer.runs import arguments, examples, lora

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")
TRAIN = "under_deepspeed.train"
OBJECTIVES = {"instance": INSTANCE, "group": GROUP}
# DeepSpeed keeps float32 copies of the parameters, and its optimizer steps there.
ROUNDING = 1e-6
# The first of two processes has no labels in its first micro-batch, but still has to run all passes.
LABELS = {"n": 24, "unlabelled": (0, 1, 5)}


@pytest.fixture(params=OBJECTIVES)
def objectives(request):
    return OBJECTIVES[request.param]


@pytest.mark.parametrize(
    ("stage", "processes", "model", "accumulated", "objectives"),
    [
        slow(1, 2, "lora", 3, "instance"),
        slow(2, 2, "lora", 1, "group"),
        (2, 2, "full", 3, "instance"),
        slow(3, 2, "lora", 1, "group"),
        (3, 2, "lora", 3, "instance"),
        slow(3, 2, "full", 1, "instance"),
        (3, 2, "full", 3, "group"),
        slow(3, 1, "lora", 3, "instance"),
        slow(3, 4, "full", 1, "group"),
    ],
)
def test_many_processes_equal_one(stage, processes, model, accumulated, objectives, own_pools, alone):
    configuration = {
        **OBJECTIVES[objectives],
        **LABELS,
        "model": model,
        "clip": 0.0,
        "gradient_accumulation_steps": accumulated,
    }
    actual = own_pools(processes).run(TRAIN, stage=stage, **configuration)
    one = alone(**configuration)
    assert relative(actual[-1], one) < ROUNDING
    for ours, theirs in zip(actual[0]["history"][:-1], one["history"], strict=True):
        for key in ("loss", "jd/conflicts", "jd/min_gw", "jd/non_finite", "jd/weight_sum"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("stage", "kind", "loss"), [(2, "group", True), (3, "instance", "scaled")])
def test_a_custom_loss_equals_one_process(stage, kind, loss, own_pools, alone):
    # Both are split at the outputs; one has a penalty on parameters.
    configuration = {
        **OBJECTIVES[kind],
        **LABELS,
        "model": "lora",
        "clip": 0.0,
        "own_loss": loss,
        "gradient_accumulation_steps": 3,
    }
    actual = own_pools(2).run(TRAIN, stage=stage, **configuration)[0]
    assert relative(actual, alone(**configuration)) < ROUNDING


@pytest.mark.slow
def test_deepspeed_without_zero_equals_one_process(own_pools, alone):
    configuration = {**INSTANCE, **LABELS, "model": "lora32", "clip": 0.0}
    assert relative(own_pools(2).run(TRAIN, stage=0, **configuration)[0], alone(**configuration)) < 1e-5


@pytest.mark.slow
def test_a_model_sharded_while_loading_equals_one_process(tmp_path, own_pools, alone):
    MODELS["full32"]().save_pretrained(tmp_path)
    configuration = {**GROUP, **LABELS, "clip": 0.0, "optim": "sgd", "learning_rate": 0.1}
    actual = own_pools(2).run(TRAIN, stage=3, loaded=str(tmp_path), **configuration)[0]
    assert relative(actual, alone(model="full32", **configuration)) < ROUNDING


@pytest.mark.slow
def test_offloading_equals_one_process(own_pools, alone):
    configuration = {**GROUP, **LABELS, "model": "full", "clip": 0.0}
    actual = own_pools(2).run(TRAIN, stage=3, offload=True, **configuration)[0]
    assert relative(actual, alone(**configuration)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("model", "objectives"), [("lora32", INSTANCE), ("full32", GROUP)], ids=["lora", "full"])
def test_float16_instructions_change_nothing(model, objectives, own_pools):
    # ZeRO 3 chooses a dtype by whether the processor has float16 instructions.
    common = {"stage": 3, "model": model, **objectives, **LABELS, "steps": 3}
    without, with_them = (own_pools(2).run(TRAIN, float16_instructions=has, **common)[0] for has in (False, True))
    assert (without["parameters"] == with_them["parameters"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "objectives"), [("lora", INSTANCE), ("full", GROUP)], ids=["lora", "full"])
def test_deepspeeds_default_sizes_and_evaluation_change_nothing(model, objectives, own_pools, alone):
    # Small parameters stay gathered, and the next ones are prefetched.
    configuration = {**objectives, **LABELS, "model": model, "clip": 0.0, "gradient_accumulation_steps": 3}
    actual = own_pools(2).run(TRAIN, stage=3, usual=True, **configuration)[0]
    assert relative(actual, alone(**configuration)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_weighed_separately_make_one_step(stage, own_pools):
    # There are too many rows, so each micro-batch is weighed separately from the first update on.
    common = {"model": "full", **LABELS, **INSTANCE, "gradient_accumulation_steps": 3, "steps": 4}
    apart = own_pools(1).run(TRAIN, stage=stage, jd_keep_rows="1KB", jd_when_full="micro_batch", **common)[0]
    always = own_pools(1).run(TRAIN, stage=stage, jd_scope="micro_batch", **common)[0]
    assert relative(apart, always) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_clipping_uses_the_global_norm(stage, own_pools, alone):
    configuration = {**GROUP, **LABELS, "model": "full", "clip": 0.5}
    actual = own_pools(2).run(TRAIN, stage=stage, **configuration)[0]
    assert relative(actual, alone(**configuration)) < ROUNDING
    assert max(entry["grad_norm"] for entry in actual["history"][:-1]) > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*bring no rows in the backward of the batch:UserWarning")  # positions
@pytest.mark.parametrize(
    ("model", "objectives"),
    [
        ("biases", INSTANCE),
        ("norms", GROUP),
        ("positions", INSTANCE),
        ("dora", INSTANCE),
        ("embedding", GROUP),
        ("experts", INSTANCE),
        ("checkpointed", GROUP),
    ],
)
def test_each_kind_of_fine_tuning_works_under_zero_3(model, objectives, own_pools, alone):
    # For some, other tiers and more passes are needed than without DeepSpeed.
    configuration = {**objectives, **LABELS, "model": model, "clip": 0.0}
    assert relative(own_pools(2).run(TRAIN, stage=3, **configuration)[1], alone(**configuration)) < ROUNDING


@pytest.mark.parametrize(
    ("model", "objectives", "tolerance"),
    [slow("full", INSTANCE, ROUNDING), ("full", GROUP, ROUNDING), slow("full32", GROUP, 2e-3)],
    ids=["instance", "group", "bfloat16"],
)
@pytest.mark.parametrize("stage", [slow(2), 3])
def test_mean_equals_stock_deepspeed(stage, model, objectives, tolerance, own_pools):
    common = {"stage": stage, **LABELS, "model": model, "gradient_accumulation_steps": 3, "steps": 4}
    common["bf16"] = model == "full32"
    stock = own_pools(2).run(TRAIN, stock=True, **common)[0]
    ours = own_pools(2).run(TRAIN, jd_weighting="mean", **common, **objectives)[0]
    assert relative(ours, stock) < tolerance


@pytest.mark.parametrize(("stage", "spoiled"), [slow(2, "spoil_row"), slow(3, "spoil_loss"), (3, "spoil_row")])
def test_nonfinite_instances_are_left_out(spoiled, stage, objectives, own_pools, alone):
    configuration = {**objectives, "spoiled": spoiled, "gradient_accumulation_steps": 2, "clip": 0.0}
    many = own_pools(2).run(TRAIN, stage=stage, **LABELS, **configuration)
    one = alone(**LABELS, **configuration)
    assert np.isfinite(one["parameters"]).all()
    assert relative(many[0], one) < ROUNDING
    assert sum(entry["jd/non_finite"] for entry in many[1]["history"][:-1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_resumes_from_its_newest_complete_checkpoint(stage, tmp_path, own_pools):
    common = {"stage": stage, **GROUP, **LABELS, "model": "full", "jd_weighting": "gradvac"}
    whole = own_pools(2).run(TRAIN, **common)[0]
    saving = {**common, "directory": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    own_pools(2).run(TRAIN, **saving)
    # Truncates the second process's last file, as if the process had been killed.
    (last,) = tmp_path.glob("checkpoint-6/global_step6/*zero_pp_rank_1_mp_rank_00_optim_states.pt")
    last.write_bytes(last.read_bytes()[:-100])
    resumed = own_pools(2).run(TRAIN, resume=True, **saving)[0]
    assert len(resumed["history"]) == len(whole["history"])
    assert relative(resumed, whole) < ROUNDING


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_resumes_from_its_checkpoint(tmp_path, own_pools):
    common = {"stage": 3, **GROUP, **LABELS}
    unharmed = own_pools(2).run(TRAIN, **common)[0]
    saving = {**common, "directory": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    pool = Pool(2)
    pool.ask(TRAIN, kill=9, **saving)
    answered = pool.answer(SECONDS)
    pool.end()
    assert answered is not None
    rank, (failed, answer) = answered
    assert (rank, failed) == (0, True)
    assert "The last complete checkpoint is" in answer
    resumed = own_pools(2).run(TRAIN, resume=True, **saving)[0]
    assert relative(resumed, unharmed) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["instance", "group", "stock"])
@pytest.mark.parametrize("stage", [2, 3])
def test_bytes_sent_match_the_cost_model(stage, kind, own_pools):
    flags = {**OBJECTIVES, "stock": {"stock": True}}[kind]
    settings = {"stage": stage, "model": "wide32", "batch": 8, "n": 24, "unlabelled": (), **flags}
    shorter, longer = (own_pools(2).run(TRAIN, steps=steps, **settings) for steps in (2, 3))
    k = 3 if kind == "group" else None
    case = Case(4, 12, 1, 2, k, f"zero{stage}", number_bytes=4, trained_bytes=4, two_pass=True)
    expected = (plain_bytes if kind == "stock" else step_bytes)(shape_of(MODELS["wide32"]()), case)
    for less, more in zip(shorter, longer, strict=True):
        sent = sum(call.sent for call in more["calls"]) - sum(call.sent for call in less["calls"])
        assert sent == pytest.approx(expected, rel=0.02)  # ZeRO 3 gathers a tied table for each of its uses.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"jd_backward": "one_pass"}, "add --jd_backward two_pass"),
        ({"fp16": True}, "DeepSpeed scales losses in fp16.*use --bf16, or DDP"),
    ],
)
def test_unsupported_flags_are_refused(flags, says, tmp_path, monkeypatch):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path, jd_backward="two_pass"), train_dataset=examples())
    config = {"fp16": {"enabled": flags.get("fp16", False)}}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2, deepspeed_config=config))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", state)
    for name, value in flags.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=says):
        backend_of(trainer).check()


@pytest.mark.parametrize(
    ("stage", "flags", "says"),
    [
        (2, {"jd_every": 2, **GROUP}, "--jd_every.*do not work with DeepSpeed yet"),
        (2, {"jd_objectives": "batch"}, "--jd_objectives batch.*which DeepSpeed keeps for itself"),
    ],
)
def test_unsupported_flags_are_refused_in_training(stage, flags, says, own_pools):
    for failed, answer in own_pools(1).answers_of(TRAIN, stage=stage, **flags):
        assert failed
        assert re.search(says, answer)


def test_a_model_on_several_devices_is_refused(tmp_path):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    trainer.model.hf_device_map = {"transformer": "cuda:0", "lm_head": "cuda:1"}
    with pytest.raises(ValueError, match="spread over the devices cuda:0, cuda:1: load it without device_map"):
        backend_of(trainer).check()


def test_fsdp1_replicas_and_tensor_parallelism_are_refused(tmp_path, monkeypatch):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with pytest.raises(ValueError, match="tensor, context or sequence parallelism: load the model without a tp_plan"):
        backend_of(trainer).check()
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 1)
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(dp_replicate_size=2))
    with pytest.raises(ValueError, match="HSDP.*dp_replicate_size 1"):
        backend_of(trainer).check()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="FSDP1.*`fsdp_version: 2`"):
        backend_of(trainer).check()
