"""DeepSpeed: against a stand-in for its engine, which is not installed, behind accelerate's own wrapper."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.parallelism_config import ParallelismConfig

from hf_jd import JDTrainer
from hf_jd.trainer.engines import check_engine
from tests.distributed.cases import GROUP
from tests.distributed.test_exact import INSTANCE, relative
from tests.trainer.runs import arguments, examples, lora


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("own", [INSTANCE, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_engine_is_given_the_weighed_losses_once(processes, own, accumulated, pools, alone):
    # The first process of two has no labels in its first micro-batch, and calls the engine all the same.
    found = pools(processes).run("deepspeed", accumulated=accumulated, **own)
    configuration = {"n": 24, "unlabelled": (0, 1, 5), "clip": 0, "gradient_accumulation_steps": accumulated}
    assert relative(found[-1], alone(**configuration, **own)) < 1e-10
    for result in found:
        assert result["steps"] == 10
        assert result["backwards"] == 10 * accumulated


@pytest.mark.parametrize(
    ("stage", "backward", "says"),
    [
        (3, "two_pass", "ZeRO 3, which leaves parameters empty between passes.*use FSDP2"),
        (2, "one_pass", "add --jd_backward two_pass"),
    ],
)
def test_what_is_refused(stage, backward, says, tmp_path, monkeypatch):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path, jd_backward=backward), train_dataset=examples())
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", state)
    with pytest.raises(ValueError, match=says):
        check_engine(trainer)


def test_a_model_on_several_devices_is_refused(tmp_path):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    trainer.model.hf_device_map = {"transformer": "cuda:0", "lm_head": "cuda:1"}
    with pytest.raises(ValueError, match="spread over the devices cuda:0, cuda:1: load it without device_map"):
        check_engine(trainer)


def test_fsdp1_replicas_and_tensor_parallelism_are_refused(tmp_path, monkeypatch):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples())
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    with pytest.raises(ValueError, match="tensor, context or sequence parallelism: load the model without a tp_plan"):
        check_engine(trainer)
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 1)
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(dp_replicate_size=2))
    with pytest.raises(ValueError, match="HSDP.*dp_replicate_size 1"):
        check_engine(trainer)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="FSDP1.*`fsdp_version: 2`"):
        check_engine(trainer)
