"""`JDGRPOTrainer` and `JDRLOOTrainer` by reward and by group: when `mean` equals TRL's trainer, and when not."""

from __future__ import annotations

import pytest
import torch

from tests.invariant.test_trl_trainers import (
    GENERATED,
    OFF_POLICY,
    PROMPTS,
    SIZES,
    TOKENIZER,
    adapted,
    by_length,
    by_position,
    lora,
    measured,
)
from tests.trainer.runs import DESCENT, arguments, flat, relative

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from transformers import MixtralConfig, MixtralForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_jd.trainer.trl.trainers import JDGRPOConfig, JDGRPOTrainer, JDRLOOConfig, JDRLOOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
# An entropy controller, which changes with each loss that TRL computes.
ADAPTIVE = {**OFF_POLICY, "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 100.0}
GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
REWARD = {"jd_objectives": "reward"}


def trained(cls, config, directory, rewards, build=lora, **flags):
    """Train for 2 updates or more, with plain gradient descent."""
    set_seed(0)
    args = arguments(directory, config, **{**DESCENT, **GENERATED, **flags})
    trainer = cls(model=build(), args=args, train_dataset=PROMPTS, processing_class=TOKENIZER, reward_funcs=rewards)
    trainer.train()
    return trainer


def assert_same(ours, theirs):
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(lora())) > 1e-4
    for our, their in zip(measured(ours), measured(theirs), strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-4, abs=1e-6)


CASES = {
    "GRPO": (JDGRPOTrainer, JDGRPOConfig, GRPOTrainer, GRPOConfig, {}),
    "GRPO-off-policy": (JDGRPOTrainer, JDGRPOConfig, GRPOTrainer, GRPOConfig, ADAPTIVE),
    "RLOO": (JDRLOOTrainer, JDRLOOConfig, RLOOTrainer, RLOOConfig, {}),
    "RLOO-off-policy": (JDRLOOTrainer, JDRLOOConfig, RLOOTrainer, RLOOConfig, OFF_POLICY),
}


@pytest.mark.parametrize("name", CASES)
def test_one_reward_equals_trls_trainer(name, tmp_path):
    cls, config, stock, stock_config, flags = CASES[name]
    theirs = trained(stock, stock_config, tmp_path, [by_position], **flags)
    ours = trained(cls, config, tmp_path, [by_position], **flags, **REWARD)
    assert_same(ours, theirs)
    assert ours.jd_state.names == ["by_position"]


@pytest.mark.parametrize("name", ["GRPO-off-policy", "RLOO"])
def test_the_mean_of_prompt_groups_equals_trls_trainer(name, tmp_path):
    cls, config, stock, stock_config, flags = CASES[name]
    theirs = trained(stock, stock_config, tmp_path, [by_length, by_position], **flags)
    ours = trained(cls, config, tmp_path, [by_length, by_position], **flags, **GROUP, jd_weighting="mean")
    assert_same(ours, theirs)
    assert ours.jd_state.names == ["a", "b"]


def mixtral():
    """Build a mixture of experts with adapters, of the attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3}
    return adapted(MixtralForCausalLM(MixtralConfig(**SIZES, **sizes, **experts)), targets=["q_proj", "v_proj"])


class Summed(GRPOTrainer):
    """Normalises each reward within its group, and sums: TRL's `normalize_then_sum` without the last normalisation."""

    def _calculate_rewards(self, *args):
        self.scored = super()._calculate_rewards(*args)
        return self.scored

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        groups = self.scored.view(-1, self.num_generations, 2)
        normalised = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        whole = normalised.view(-1, 2) @ self.reward_weights
        # TRL also normalises this over the batch.
        expected = (whole - whole.mean()) / (whole.std() + 1e-4)
        assert torch.allclose(output["advantages"], expected, atol=1e-5)
        output["advantages"] = whole
        return output


@pytest.mark.parametrize("every", [1, 2])
def test_the_mean_of_rewards_equals_their_normalised_sum(every, tmp_path):
    flags = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5], "beta": 0.1}
    rewards = [by_length, by_position]
    theirs = trained(Summed, GRPOConfig, tmp_path, rewards, **flags)
    watching = {} if every == 1 else {"jd_monitor_every": 2}  # In between, a plain step.
    ours = trained(JDGRPOTrainer, JDGRPOConfig, tmp_path, rewards, **flags, **REWARD, jd_weighting="mean", **watching)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(lora())) > 1e-4
    logged = [entry for entry in ours.state.log_history if "jd/reward_passes" in entry]
    assert [entry["jd/reward_passes"] for entry in logged] == [1.0] * (2 if every == 1 else 1)
    assert {"jd/weight/by_length", "jd/grad_norm/by_position", "jd/cosine/by_length/by_position"} <= logged[0].keys()


def test_a_routers_loss_remains_in_the_mean(tmp_path):
    build, flags = mixtral, {"router_aux_loss_coef": 0.1, "beta": 0.1}
    theirs = trained(GRPOTrainer, GRPOConfig, tmp_path, [by_position], build, **flags)
    unrouted = trained(GRPOTrainer, GRPOConfig, tmp_path, [by_position], build, beta=0.1)
    ours = trained(JDGRPOTrainer, JDGRPOConfig, tmp_path, [by_position], build, **flags, **REWARD)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(unrouted.model)) > 1e-5
    several = [by_length, by_position]
    ours = trained(JDGRPOTrainer, JDGRPOConfig, tmp_path, several, build, **flags, **REWARD, jd_weighting="upgrad")
    assert ours.jd_state.names == ["by_length", "by_position"]


def test_unmeasured_updates_use_the_last_weights(tmp_path):
    flags = {**OFF_POLICY, **REWARD, "jd_weighting": "mgda", "jd_every": 2}
    trainer = trained(JDGRPOTrainer, JDGRPOConfig, tmp_path, [by_length, by_position], **flags)
    assert set(trainer.jd_control.last) == {"by_length", "by_position"}
    assert sum("jd/min_gw" in entry for entry in trainer.state.log_history) == 3
    assert flat(trainer.model).isfinite().all()


def test_rewards_are_the_same_over_micro_batches(tmp_path):
    flags = {**REWARD, "jd_weighting": "upgrad", "loss_type": "dr_grpo", "gradient_checkpointing": False}
    rewards = [by_length, by_position]
    whole, parts = (
        trained(
            JDGRPOTrainer,
            JDGRPOConfig,
            tmp_path,
            rewards,
            **flags,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            steps_per_generation=8 // size,
        )
        for size in (8, 2)
    )
    assert relative(flat(parts.model), flat(whole.model)) < 1e-5


def test_a_trainer_without_rewards_is_refused(tmp_path):
    from tests.invariant.test_trl_trainers import CASES as TRLS
    from tests.invariant.test_trl_trainers import trained as trained_by_mixin

    with pytest.raises(ValueError, match="weighs the reward functions of JDGRPOTrainer and JDRLOOTrainer, but JDDPO"):
        trained_by_mixin(TRLS["DPO"], tmp_path, ours=True, **REWARD)
