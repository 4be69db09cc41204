"""Rewards as objectives: rows, weights and passes, compared with one backward pass per reward."""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from torch import Tensor

from tests.trainer.runs import relative

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from trl import GRPOTrainer

from hf_jd.trainer.trl.trainers import JDGRPOTrainer, JDRLOOConfig
from tests.trainer.generating import GENERATIONS, Exact, ExactGRPO, ExactRLOO, Policy, rewards

EXACT = 1e-8
LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
# For these, a completion's cotangents are multiples of each other for every policy.
ONE_DIRECTION = ("cispo",)


def alone(policy: Policy, functions: list, scale: str = "group", weights: tuple[float, ...] | None = None) -> Tensor:
    """Compute each reward's advantages [B, K], by loops."""
    n = len(policy.batch)
    permutation = policy.inputs["order"].tolist()
    columns = []
    for k, function in enumerate(functions):
        scores = function(completions=[""] * n)
        scored = [r for r in scores if r is not None]
        advantages = []
        for i, reward in enumerate(scores):
            group = scores[i // GENERATIONS * GENERATIONS :][:GENERATIONS]
            group = torch.tensor([r for r in group if r is not None])
            if reward is None or len(group) < 2:
                advantages.append(0.0)
                continue
            spread = {"group": group.std() + 1e-4, "batch": torch.tensor(scored).std() + 1e-4, "none": 1.0}[scale]
            advantages.append(float((reward - group.mean()) / spread) * (1 if weights is None else weights[k]))
        columns.append([advantages[i] for i in permutation])
    return torch.tensor(columns).T


def assert_brute(policy: Policy, advantages: Tensor) -> None:
    rows, rest = policy.brute(advantages)
    mine, others = policy.rows()
    assert relative(mine, rows) < EXACT
    assert (others - rest).norm() < EXACT * rows.norm()
    assert relative(policy.gramian, len(rows) ** 2 * rows @ rows.T) < EXACT


def passes(policy: Policy) -> float:
    return policy.trainer.jd_metrics.take()["jd/reward_passes"]


def clipped(policy: Policy) -> float:
    return sum(policy.trainer._metrics["train"]["clip_ratio/region_mean"])


CASES = [(loss, 3, moved) for loss in LOSSES for moved in (0.0, 0.5)] + [
    *(("grpo", count, moved) for count in (1, 8) for moved in (0.0, 0.5)),
    ("dapo", 8, 0.5),
]


@pytest.mark.parametrize(("loss", "count", "moved"), CASES)
def test_rows_equal_one_backward_per_reward(loss, count, moved, tmp_path):
    functions = rewards(count)
    policy = Policy(tmp_path, functions, moved=moved, loss_type=loss, beta=0.1)
    advantages = policy.inputs["jd_advantages"]
    assert_brute(policy, advantages)
    assert torch.allclose(advantages, alone(policy, functions), atol=1e-5)
    if loss in ("grpo", "dapo", "bnpo", "dr_grpo", "luspo"):
        assert (clipped(policy) > 0) == bool(moved)
    expected = 1 if not moved or loss in ONE_DIRECTION else 2
    assert passes(policy) == min(expected, count)


SETTINGS = {
    "sequence": {"importance_sampling_level": "sequence"},
    "two-sided": {"delta": 1.5},
    "off-policy-mask": {"off_policy_mask_threshold": 0.01},
    "entropy-bonus": {"entropy_coef": 0.1},
    "entropy-mask": {"top_entropy_quantile": 0.5},
    "kl-corrected": {"use_bias_correction_kl": True},
    "accumulated": {"loss_type": "dapo", "gradient_accumulation_steps": 2, "steps_per_generation": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_with_other_settings_of_trl(name, tmp_path):
    policy = Policy(tmp_path, rewards(3), moved=0.5, beta=0.1, **SETTINGS[name])
    assert_brute(policy, policy.inputs["jd_advantages"])
    assert passes(policy) == 2


class WatchedGRPO(ExactGRPO):
    """`ExactGRPO` that counts the backward passes through its entropies."""

    passed = 0

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, none = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if entropies.requires_grad:
            entropies.register_hook(lambda gradient: vars(self).update(passed=self.passed + 1))
        return logps, entropies, none


@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_only_an_entropy_bonus_costs_a_pass_through_the_entropies(bonus, tmp_path):
    policy = Policy(tmp_path, rewards(3), WatchedGRPO, entropy_coef=bonus)
    policy.step(None)
    assert (policy.trainer.passed > 0) == bool(bonus)


@pytest.mark.parametrize("moved", [0.0, 0.5], ids=["on-policy", "moved"])
def test_rows_of_a_fully_trained_model(moved, tmp_path):
    policy = Policy(tmp_path, rewards(3), full=True, moved=moved)
    assert_brute(policy, policy.inputs["jd_advantages"])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_computed_per_reward(scale, tmp_path):
    functions = rewards(3, missing=[(0, 1), (1, 2), (1, 0), (1, 1), (0, 5), (1, 5), (2, 5)])
    weights = (1.0, -0.5, 2.0)
    policy = Policy(tmp_path, functions, scale_rewards=scale, reward_weights=list(weights))
    expected = alone(policy, functions, scale, weights)
    assert (expected == 0).sum() > 5
    assert torch.allclose(policy.inputs["jd_advantages"], expected, rtol=1e-5, atol=1e-5)
    assert_brute(policy, policy.inputs["jd_advantages"])


def test_the_divergence_may_be_an_objective(tmp_path):
    policy = Policy(tmp_path, rewards(2), moved=0.5, beta=0.1, entropy_coef=0.1, jd_kl="objective")
    rows, base = policy.brute(policy.inputs["jd_advantages"])
    policy.trainer.beta = 0.0
    rest = policy.gradient(torch.zeros(8))
    policy.trainer.beta = 0.1
    rows = torch.cat([rows, (base - rest)[None]])
    mine, others = policy.rows()
    assert relative(mine, rows) < EXACT
    assert relative(others, rest) < EXACT
    assert policy.trainer.jd_state.names == ["r0", "r1", "kl"]


@pytest.mark.parametrize("kl", ["mean", "objective"])
def test_rloo_rows_equal_one_backward_per_reward(kl, tmp_path):
    missing = [(0, 1), (0, 5), (1, 5), (2, 5)]
    functions = rewards(3, missing)
    policy = Policy(tmp_path, functions, ExactRLOO, JDRLOOConfig, moved=0.5, beta=0.1, jd_kl=kl)
    advantages = policy.inputs["jd_advantages"]
    rows, rest = policy.brute(advantages)
    # Where no reward is missing, TRL's advantages are the sum over the rewards.
    whole = advantages.sum(1)[policy.inputs["order"] >= GENERATIONS + 2]
    total = policy.inputs["advantages"][policy.inputs["order"] >= GENERATIONS + 2]
    assert torch.allclose(alone_of_rloo(policy, functions).double(), advantages[:, :3], rtol=1e-4, atol=1e-4)
    assert torch.allclose(whole, total, rtol=1e-4, atol=1e-3)
    if kl == "mean":
        rows, rest = rows[:3], rest + rows[3]
    mine, others = policy.rows()
    assert relative(mine, rows) < EXACT
    assert (others - rest).norm() < EXACT * rows.norm()
    assert passes(policy) == 2


def alone_of_rloo(policy: Policy, functions: list) -> Tensor:
    """Compute each reward minus the mean over the prompt's other completions [B, K], by loops."""
    columns = []
    for function in functions:
        scores = function(completions=[""] * len(policy.batch))
        advantages = []
        for i, reward in enumerate(scores):
            first = i // GENERATIONS * GENERATIONS
            others = [scores[j] for j in range(first, first + GENERATIONS) if j != i and scores[j] is not None]
            advantages.append(0.0 if reward is None else reward - sum(others) / len(others))
        columns.append([advantages[i] for i in policy.inputs["order"].tolist()])
    return torch.tensor(columns).T


class Cubed:
    """A mixin whose loss isn't proportional to the advantage."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].shape[1]
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]
        advantages = inputs["advantages"]
        return (logps.sum(1) * advantages + logps[:, 0] * advantages**3).mean()


class CubedGRPO(JDGRPOTrainer, Cubed, Exact, GRPOTrainer):
    """`JDGRPOTrainer` with that loss."""


def test_a_nonlinear_loss_takes_one_pass_per_reward(tmp_path):
    policy = Policy(tmp_path, rewards(3), CubedGRPO)
    assert_brute(policy, policy.inputs["jd_advantages"])
    assert passes(policy) == 3


class PastGRPO(JDGRPOTrainer, Exact, GRPOTrainer):
    """`JDGRPOTrainer` with a penalty on the parameters."""

    def _compute_loss(self, model, inputs):
        penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return super()._compute_loss(model, inputs) + penalty


class NoisyGRPO(JDGRPOTrainer, Exact, GRPOTrainer):
    """`JDGRPOTrainer` with a loss that draws random numbers."""

    def _compute_loss(self, model, inputs):
        noise = torch.rand_like(inputs["advantages"])
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"] * noise})


@pytest.mark.parametrize("cls", [PastGRPO, NoisyGRPO])
def test_a_loss_that_changes_when_repeated_is_refused(cls, tmp_path):
    with pytest.raises(ValueError, match="is different: it draws random numbers or reads the model outside that"):
        Policy(tmp_path, rewards(3), cls).step(None)


class OwnGRPO(JDGRPOTrainer, Exact, GRPOTrainer):
    """`JDGRPOTrainer` with a loss that doesn't use TRL's log-probabilities."""

    def _compute_loss(self, model, inputs):
        logits = model(input_ids=inputs["completion_ids"]).logits
        return (logits.mean((1, 2)) * inputs["advantages"]).mean()


def test_a_custom_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="computed its loss without the log-probabilities of TRL's"):
        Policy(tmp_path, rewards(3), OwnGRPO).step(None)


def test_nonfinite_completions_are_left_out(tmp_path):
    policy = Policy(tmp_path, rewards(3), moved=0.5, beta=0.1)
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        policy.inputs[key][2] = torch.nan
    mine, rest = policy.rows()
    # The other completions remain, and the mean is still over all.
    policy.inputs["completion_mask"][2] = 0
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        policy.inputs[key][2] = 0
    rows, base = policy.brute(policy.inputs["jd_advantages"])
    assert relative(mine, rows) < EXACT
    assert relative(rest, base) < EXACT


@pytest.mark.parametrize(
    ("functions", "flags", "match"),
    [
        (rewards(2)[:1] * 2, {}, "Several reward functions are named `r0`"),
        (rewards(2), {"jd_kl": "objective"}, "needs a --beta above 0"),
        (rewards(2), {"jd_kl": "both"}, "--jd_kl is `both`; choose one of `mean`, `objective`"),
        (rewards(2), {"jd_group_column": "task"}, "leave out --jd_group_column, or choose --jd_objectives group"),
    ],
)
def test_unsupported_rewards_and_flags_are_refused(functions, flags, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        Policy(tmp_path, functions, **flags).trainer.train()


def test_sums_that_hide_the_divergence_are_refused(tmp_path):
    with pytest.raises(ValueError, match="can't separate the divergence from the rewards"):
        Policy(tmp_path, rewards(2), ExactRLOO, JDRLOOConfig, beta=0.1, normalize_advantages=True)


def flat_reward(completions, **columns):
    """Reward all completions equally, so there is no advantage."""
    return [1.0] * len(completions)


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_a_reward_without_advantages_is_no_objective(scope, tmp_path):
    policy = Policy(tmp_path, [*rewards(2), flat_reward], moved=0.5, beta=0.1, jd_scope=scope)
    rows, rest = policy.brute(policy.inputs["jd_advantages"])
    assert not rows[2].any()
    mine, others = policy.rows()
    assert policy.trainer.jd_state.names == ["r0", "r1"]
    assert relative(mine, rows[:2]) < EXACT
    assert relative(others, rest) < EXACT


def test_without_advantages_only_the_rest_is_descended(tmp_path):
    named = [flat_reward, rewards(1, missing=[(0, i) for i in range(8)])[0]]
    policy = Policy(tmp_path, named, moved=0.5, beta=0.1)
    rest = policy.gradient(torch.zeros(8))
    assert relative(policy.step(None), rest) < EXACT


def test_rewards_are_weighed_by_block(tmp_path):
    policy = Policy(tmp_path, rewards(2), moved=0.5, beta=0.1, jd_blocks="module")
    plain = Policy(tmp_path, rewards(2), moved=0.5, beta=0.1)
    weights = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert relative(policy.step(weights), plain.step(weights)) < EXACT
    assert relative(policy.gramian, plain.gramian) < EXACT
    assert len(policy.trainer.jd_state.blocks) > 1
