"""TRL's trainers that generate completions, with groups and rewards attached to the completions.

Their batches are lists of prompts. Groups and rewards are added once TRL has scored the completions, so that they pass
through TRL's own shuffling and splitting, over accumulation, `steps_per_generation` and `num_iterations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_jd.arguments import JDArguments
from hf_jd.collator import GROUP_KEY, GroupCollator
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.step.backward import Recorder
from hf_jd.trainer.step.named_gradients import NamedRecorder
from hf_jd.trainer.trl.rewards import ADVANTAGES_KEY, PolicyLoss, RewardLosses

logger = logging.get_logger(__name__)

Host = Trainer if TYPE_CHECKING else object


@dataclass
class JDGenerationArguments(JDArguments):
    """The flags of Jacobian descent for trainers that generate."""

    jd_kl: str = field(
        default="mean",
        metadata={
            "help": "With `--jd_objectives reward`, how to treat the divergence from the reference model: as part of "
            "the `mean`, which no weighting sees, or as an `objective` named `kl`."
        },
    )

    def validate(self) -> None:
        """Validate the flags as they are now; see JDArguments."""
        super().validate()
        if self.jd_kl not in ("mean", "objective"):
            raise ValueError(f"--jd_kl is `{self.jd_kl}`; choose one of `mean`, `objective`.")


class GeneratingMixin(JDTrainerMixin):
    """Jacobian descent for TRL's GRPOTrainer and RLOOTrainer: `JDTrainerMixin`, with groups and rewards."""

    num_generations: int
    reward_func_names: list[str]
    reward_weights: Tensor
    beta: float

    def objective_names(self) -> list[str] | None:
        """Return the names of all objectives, if known before training."""
        if not self.jd_args.kind.of_rewards:
            return super().objective_names()
        return [*self.reward_func_names, *(["kl"] if self.kl_is_objective else [])]

    @property
    def kl_is_objective(self) -> bool:
        """Whether the divergence from the reference model is an objective."""
        return getattr(self.args, "jd_kl", "mean") == "objective"

    def follow_flags(self) -> None:
        """Apply the flags; see JDTrainerMixin."""
        super().follow_flags()
        if isinstance(self.data_collator, GroupCollator):
            self.data_collator = self.data_collator.collator  # The batches are lists, which hold no tensors.
        column = self.jd_args.jd_group_column
        self._jd_grouper = None if column is None else GroupCollator(lambda rows: {}, column, self.jd_group_names)
        self._jd_policy: PolicyLoss | None = None
        self.jd_proved = False
        if self.jd_args.jd_sampler != "trainer":
            raise ValueError(
                f"--jd_sampler {self.jd_args.jd_sampler} orders single examples, and {type(self).__name__} repeats "
                "each prompt for its generations: leave it at trainer."
            )
        if self.jd_args.kind.of_rewards:
            _check_rewards(self)

    def advantages_by_reward(self, rewards: Tensor, total: Tensor) -> Tensor:
        """Compute each reward's own advantages, with a last column for the divergence if TRL makes that a reward.

        Args:
            rewards: [N, K] of all processes' completions, NaN where a function returned None.
            total: [N] TRL's advantages.
        """
        raise NotImplementedError

    @property
    def recorder_class(self) -> type[Recorder]:
        """See JDTrainerMixin."""
        return NamedRecorder if self.jd_args.kind.of_rewards else Recorder

    def named_losses(self, loss: Tensor) -> RewardLosses:
        """Split the loss of the last batch by reward."""
        return RewardLosses(self, loss)

    def groups_before(self, batch: Any) -> Tensor | None:
        """Return all groups' ids: a batch's groups are unknown until TRL has shuffled its completions."""
        if self.jd_group_names is None:
            raise ValueError("A stream's groups of prompts can't be known in advance: list them with --jd_groups.")
        return torch.arange(len(self.jd_group_names))

    def _get_train_sampler(  # ty: ignore[lost-keyword-for-regular-parameter]  # TRL's name of the argument
        self, dataset: Any = None
    ) -> Any:
        return super()._get_train_sampler(dataset)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._jd_rewards = super()._calculate_rewards(*args, **kwargs)  # ty: ignore[missing-attribute]  # TRL's
        return self._jd_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)  # ty: ignore[missing-attribute]  # TRL's
        assert self.model is not None
        if not self.model.training:
            return output
        device = output["advantages"].device
        if self._jd_grouper is not None:
            output[GROUP_KEY] = self._group_ids(inputs).to(device)
        if self.jd_args.kind.of_rewards:
            total = self.accelerator.gather(output["advantages"])
            first = self.accelerator.process_index * len(inputs)
            output[ADVANTAGES_KEY] = self.advantages_by_reward(self._jd_rewards, total)[first : first + len(inputs)]
        return output

    def _group_ids(self, prompts: list[dict[str, Any]]) -> Tensor:
        assert self._jd_grouper is not None
        ids = self._jd_grouper(prompts).get(GROUP_KEY)
        if ids is None or (ids < 0).any():
            raise ValueError(
                f"A prompt has no group in the column `{self._jd_grouper.column}`: fill it in, or leave the prompt out."
            )
        return ids

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's own loss; in training, store what is needed to split it."""
        training = model.training and isinstance(inputs, Mapping)
        self.jd_groups_of_batch = inputs.get(GROUP_KEY) if training else None
        if not training or ADVANTAGES_KEY not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        policy, self._jd_logps = PolicyLoss(self, model, inputs), None
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        policy.keep(self._jd_logps or (), loss)
        self._jd_policy = policy
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        logps = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # ty: ignore[missing-attribute]  # TRL's
        if torch.is_grad_enabled():
            self._jd_logps = logps
        return logps

    def take_policy(self) -> PolicyLoss:
        """Return the loss of the last batch, once.

        Raises:
            ValueError: The trainer computes its loss without TRL's method.
        """
        policy, self._jd_policy = self._jd_policy, None
        if policy is None or not policy.outputs:
            raise ValueError(
                f"{type(self).__name__} computed its loss without the log-probabilities of TRL's "
                "`_get_per_token_logps_and_entropies`, so no reward's part of it is known: call that, or choose "
                "--jd_objectives instance, group or batch."
            )
        return policy


def _check_rewards(trainer: GeneratingMixin) -> None:
    """Raise a ValueError for rewards that can't be objectives; warn if there is only one."""
    names = trainer.reward_func_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several reward functions are named `{twice[0]}`, but --jd_objectives reward weighs them by name: give "
            "them different names."
        )
    if trainer.jd_args.jd_group_column is not None:
        raise ValueError(
            "--jd_objectives reward weighs the rewards of whole batches, which have no groups: leave out "
            "--jd_group_column, or choose --jd_objectives group."
        )
    by_itself = "kl" in names or not trainer.kl_is_objective or not trainer.beta
    if trainer.kl_is_objective and by_itself:
        raise ValueError(
            "--jd_kl objective needs a --beta above 0, and no reward function named `kl`: set --beta or rename that "
            "function, or leave --jd_kl at mean."
        )
    if len(names) == 1 and by_itself:
        logger.warning_once(
            f"There is only one reward function, `{names[0]}`: --jd_objectives reward has nothing to weigh, and trains "
            "like TRL."
        )
