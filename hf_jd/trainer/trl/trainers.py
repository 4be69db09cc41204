"""TRL's trainers with Jacobian descent; needs `hf-jd[trl]`.

Each keeps TRL's data, losses, metrics and model cards. Only the backward pass is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_jd.arguments import JDArguments
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.trl.generations import GeneratingMixin, JDGenerationArguments
from hf_jd.trainer.trl.loss_types import LossTypesMixin

try:
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RewardConfig,
        RewardTrainer,
        RLOOConfig,
        RLOOTrainer,
    )
    from trl.trainer.utils import nanstd
except ImportError as error:
    raise ImportError(f"The trainers of TRL need TRL ({error}): pip install 'hf-jd[trl]'.") from error

EPSILON = 1e-4
"""The number that TRL adds to a standard deviation before dividing by it."""


@dataclass
class JDDPOConfig(JDArguments, DPOConfig):
    """`DPOConfig` with the flags of Jacobian descent."""


class JDDPOTrainer(LossTypesMixin, DPOTrainer):
    """`DPOTrainer` with Jacobian descent; a pair is an instance.

    With `--jd_objectives loss`, each of several `--loss_type`s is an objective, as in MPO (arXiv 2411.10442).
    """


@dataclass
class JDRewardConfig(JDArguments, RewardConfig):
    """`RewardConfig` with the flags of Jacobian descent."""


class JDRewardTrainer(JDTrainerMixin, RewardTrainer):
    """`RewardTrainer` with Jacobian descent; a pair is an instance."""


@dataclass
class JDKTOConfig(JDArguments, KTOConfig):
    """`KTOConfig` with the flags of Jacobian descent."""


class JDKTOTrainer(JDTrainerMixin, KTOTrainer):
    """`KTOTrainer` with Jacobian descent; `--jd_group_column label` makes desirable and undesirable two groups."""


@dataclass
class JDGRPOConfig(JDGenerationArguments, GRPOConfig):
    """`GRPOConfig` with the flags of Jacobian descent."""


class JDGRPOTrainer(GeneratingMixin, GRPOTrainer):
    """`GRPOTrainer` with Jacobian descent; with `--jd_objectives reward`, each reward function is an objective."""

    def advantages_by_reward(self, rewards: Tensor, total: Tensor) -> Tensor:
        """[N, K] the advantages that TRL computes for each reward alone, times its weight; see GeneratingMixin."""
        if rewards.shape[1] == 1:
            return total[:, None]
        groups = rewards.view(-1, self.num_generations, rewards.shape[1])
        advantages = groups - groups.nanmean(dim=1, keepdim=True)
        if self.scale_rewards == "group":
            advantages = advantages / (nanstd(groups, dim=1, keepdim=True) + EPSILON)
        elif self.scale_rewards == "batch":
            advantages = advantages / (nanstd(rewards, dim=0, keepdim=True) + EPSILON)
        return _scored(advantages.view_as(rewards) * self.reward_weights.to(rewards))


@dataclass
class JDRLOOConfig(JDGenerationArguments, RLOOConfig):
    """`RLOOConfig` with the flags of Jacobian descent."""


class JDRLOOTrainer(GeneratingMixin, RLOOTrainer):
    """`RLOOTrainer` with Jacobian descent; with `--jd_objectives reward`, each reward function is an objective.

    TRL subtracts the divergence from the reference model from the rewards. Here it is one more reward, the last.
    """

    def follow_flags(self) -> None:
        """Apply the flags; see JDTrainerMixin."""
        super().follow_flags()
        separate = self.beta and self.jd_args.kind.of_rewards and len(self.reward_func_names) > 1
        if separate and (self.normalize_advantages or self.reward_clip_range):
            raise ValueError(
                "--jd_objectives reward can't separate the divergence from the rewards if --normalize_advantages or "
                "--reward_clip_range changes their sum: leave these out, or set --beta 0."
            )

    def advantages_by_reward(self, rewards: Tensor, total: Tensor) -> Tensor:
        """[N, K] the advantages that TRL computes for each reward alone, times its weight; see GeneratingMixin."""
        if rewards.shape[1] == 1 and not self.kl_is_objective:
            return total[:, None]
        weighted = rewards * self.reward_weights.to(rewards)
        if self.reward_clip_range:
            weighted = weighted.clamp(*self.reward_clip_range)
        advantages = self._leave_one_out(weighted)
        if self.normalize_advantages:
            advantages = (advantages - advantages.nanmean(dim=0)) / (nanstd(advantages, dim=0) + EPSILON)
        if not self.beta:
            return _scored(advantages)
        summed = weighted.nansum(dim=1, keepdim=True)
        summed[rewards.isnan().all(dim=1)] = torch.nan
        divergence = total[:, None] - _scored(self._leave_one_out(summed))
        return torch.cat([_scored(advantages), divergence], dim=1)

    def _leave_one_out(self, rewards: Tensor) -> Tensor:
        """Return rewards [N, K] minus the mean of the others for the same prompt."""
        groups = rewards.view(-1, self.num_generations, rewards.shape[1])
        others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
        return (groups - (groups.nansum(dim=1, keepdim=True) - groups) / others).view_as(rewards)


def _scored(advantages: Tensor) -> Tensor:
    """Return advantages with 0 where there is no reward, or none to compare it with."""
    return advantages.nan_to_num(nan=0.0)
