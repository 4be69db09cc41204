"""TRL's generating trainers, on a tiny float64 model: one batch of completions, and brute force by reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, set_seed
from trl import GRPOTrainer, RLOOTrainer

from hf_jd.trainer.trl.trainers import JDGRPOConfig, JDGRPOTrainer, JDRLOOTrainer
from tests.models import tiny_gpt2, with_lora
from tests.trainer.runs import arguments, joined
from tests.trainer.split_runs import OneBatch

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "stories15m")
PROMPTS = ["the cat was", "one day when", "mom said hello", "a big red"]
GENERATIONS = 4


def model(full: bool = False) -> nn.Module:
    """Build a float64 GPT-2, with adapters or fully trainable."""
    base = tiny_gpt2(vocab_size=len(TOKENIZER), n_positions=64, pad_token_id=TOKENIZER.pad_token_id)
    return base if full else with_lora(base, warm=True)


def rewards(count: int, missing: Sequence[tuple[int, int]] = ()) -> list[Callable[..., list[float | None]]]:
    """Build reward functions of different scales, deterministic per completion; None for the `missing` (k, i)."""

    def make(k: int) -> Callable[..., list[float | None]]:
        def reward(completions: list[str], **columns: Any) -> list[float | None]:
            draws = torch.randn(len(completions), generator=torch.Generator().manual_seed(k))
            return [None if (k, i) in missing else 10.0**k % 999 * float(r) for i, r in enumerate(draws)]

        reward.__name__ = f"r{k}"
        return reward

    return [make(k) for k in range(count)]


class Exact:
    """A mixin that makes TRL read log-probabilities from float64 logits: its fused head computes in float32."""

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, ids: Tensor, mask: Tensor, keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        every = logits.log_softmax(-1)
        logps = every.gather(-1, ids[:, -keep:, None])[..., 0]
        return logps, -(every.exp() * every).sum(-1), None


class ExactGRPO(JDGRPOTrainer, Exact, GRPOTrainer):
    """`JDGRPOTrainer` in float64."""


class HalfExact:
    """Like `Exact`, but with float32 entropies, which RLOO stacks with float32 numbers."""

    def _get_per_token_logps_and_entropies(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        logps, entropies, none = Exact._get_per_token_logps_and_entropies(self, *args, **kwargs)
        return logps, entropies.float(), none


class ExactRLOO(JDRLOOTrainer, HalfExact, RLOOTrainer):
    """`JDRLOOTrainer` in float64."""


class Policy(OneBatch):
    """A trainer that has generated one batch.

    Args:
        directory: The run's directory.
        functions: The rewards.
        cls: The trainer.
        config: The class of its arguments.
        full: Whether all parameters are trained.
        moved: How far the log-probabilities have moved since then, at random.
        flags: Further training arguments.
    """

    def __init__(
        self,
        directory: Any,
        functions: list[Any],
        cls: Any = ExactGRPO,
        config: Any = JDGRPOConfig,
        full: bool = False,
        moved: float = 0.0,
        **flags: Any,
    ):
        set_seed(0)
        common = {
            "bf16": False,
            "per_device_train_batch_size": 8,
            "num_generations": GENERATIONS,
            "num_iterations": 100,
            "max_completion_length": 5,
            "gradient_checkpointing": False,
            "jd_objectives": "reward",
        }
        data = Dataset.from_list([{"prompt": prompt, "task": "ab"[i % 2]} for i, prompt in enumerate(PROMPTS)])
        self.trainer = cls(
            model=model(full),
            args=arguments(directory, config, **{**common, **flags}),
            train_dataset=data,
            processing_class=TOKENIZER,
            reward_funcs=functions,
            weighting=self.weigh,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.engine()
        with torch.no_grad():  # The reference is TRL's copy of the original adapters.
            for p in self.trainer.trainable():
                p += 0.02 * torch.randn_like(p)
        self.trainer.model.train()
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        scored = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = lambda rows: {**scored(rows), "order": torch.arange(len(rows))}
        self.inputs = self.trainer._prepare_inputs(self.batch)
        self.trainer._step = 1  # Later batches are not generated.
        self.move(moved)

    def move(self, by: float) -> None:
        """Move the policy away from the one that generated, so that clipping and the KL divergence matter."""
        if not by:
            return
        mask = self.inputs["completion_mask"]
        for key in ("old_per_token_logps", "ref_per_token_logps"):
            if key in self.inputs or key.startswith("old"):
                logps = self.logps()
                self.inputs[key] = logps + by * torch.randn(logps.shape, dtype=logps.dtype) * mask
        if "old_logps" in self.inputs:
            self.inputs["old_logps"] = (self.inputs["old_per_token_logps"] * mask).sum(1)

    @torch.no_grad()
    def logps(self) -> Tensor:
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
        mask = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
        keep = self.inputs["completion_ids"].shape[1]
        return self.trainer._get_per_token_logps_and_entropies(self.trainer.model, ids, mask, keep)[0]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return each objective's share of the gradient [M, P], and the part that no weighting sees [P]."""
        rows, rest = super().rows()
        if len(rows) > 1:
            return rows, rest
        rest = self.gradient(torch.zeros(len(self.batch)))
        return self.step(None)[None] - rest, rest

    def gradient(self, advantages: Tensor) -> Tensor:
        """Compute the gradient of TRL's own loss with these advantages [B], by plain autograd."""
        loss = self.trainer._compute_loss(self.trainer.model, {**self.inputs, "advantages": advantages})
        gradients = torch.autograd.grad(loss, self.trainer.trainable(), allow_unused=True)
        return joined(gradients, self.trainer.trainable())

    def brute(self, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Compute each reward's share of the gradient [K, P] for advantages [B, K], and the remaining part [P]."""
        rest = self.gradient(torch.zeros_like(advantages[:, 0]))
        return torch.stack([self.gradient(column) for column in advantages.T]) - rest, rest
