"""Rewards as objectives: rows, weights and passes against one backward pass per reward."""

from __future__ import annotations

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from torch import Tensor

from tests.marks import slow
from tests.trainer.runs import relative

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
from hf_jd.trainer.trl import JDRLOOConfig, JDRLOOTrainer
from tests.trainer.generating import GENERATIONS, Policy, rewards

EXACT = 1e-8
LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
# Of these a completion's cotangents are multiples of one another wherever the policy is.
ONE_DIRECTION = ("cispo",)


def alone(policy: Policy, functions: list, scale: str = "group", weights: tuple[float, ...] | None = None) -> Tensor:
    """[B, K] each reward's advantages, by loops."""
    n = len(policy.batch)
    permutation = policy.inputs["order"].tolist()
    columns = []
    for k, function in enumerate(functions):
        found = function(completions=[""] * n)
        scored = [r for r in found if r is not None]
        advantages = []
        for i, reward in enumerate(found):
            group = found[i // GENERATIONS * GENERATIONS :][:GENERATIONS]
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


@pytest.mark.parametrize("moved", [0.0, 0.5], ids=["on-policy", "moved"])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_are_those_of_one_backward_per_reward(loss, count, moved, tmp_path):
    functions = rewards(count)
    policy = Policy(tmp_path, functions, moved=moved, loss_type=loss, beta=0.1)
    advantages = policy.inputs["jd_advantages"]
    assert_brute(policy, advantages)
    if count > 1:
        assert torch.allclose(advantages, alone(policy, functions), atol=1e-5)
    expected = 1 if not moved or loss in ONE_DIRECTION else 2
    assert passes(policy) == min(expected, count)
