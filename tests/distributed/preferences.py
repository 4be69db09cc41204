"""TRL's trainers on one process or more; see `cases`."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from transformers import set_seed

from hf_jd import JDDPOConfig, JDDPOTrainer, JDGRPOConfig, JDGRPOTrainer
from tests.distributed.cases import fresh_accelerate, shared_history, whole
from tests.invariant.test_trl_trainers import PAIRS, PROMPTS, TOKENIZER, lora
from tests.trainer.runs import DESCENT, arguments


def by_length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) + i % 4 for i, text in enumerate(completions)]


def by_position(completions: list[str], **columns: Any) -> list[float]:
    """Reward a completion by its position in its prompt, the same on any process: batches hold whole prompts."""
    return [100.0 * ((i % 4) ** 2) for i in range(len(completions))]


class Written(JDGRPOTrainer):
    """A trainer whose completions depend only on the prompt, since random numbers depend on the process."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        results = []
        for i, ids in enumerate(prompt_ids):
            generator = torch.Generator().manual_seed(4 * sum(ids) + i % 4)
            results.append(torch.randint(10, 200, (3 + i % 4 % 3,), generator=generator).tolist())
        return results, None


def train(name: str, **flags: Any) -> dict[str, Any]:
    """Train for some steps on the same global batches of 8; return the parameters and the logs."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    of_batches = {"per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 1, "max_steps": 3}
    common = {**DESCENT, **of_batches}
    settings: dict[str, Any] = {"train_dataset": PAIRS.select(range(8))}
    cls, config = JDDPOTrainer, JDDPOConfig
    if name == "grpo":
        common |= {"num_generations": 4, "max_completion_length": 5, "loss_type": "grpo", "beta": 0.1}
        settings = {"train_dataset": PROMPTS, "reward_funcs": [by_length, by_position]}
        cls, config = Written, JDGRPOConfig
    with tempfile.TemporaryDirectory() as directory, fresh_accelerate():
        set_seed(0)
        args = arguments(directory, config, **{**common, **flags})
        trainer: Any = cls(model=lora(), args=args, processing_class=TOKENIZER, **settings)
        trainer.train()
        return {"parameters": whole(trainer.model).numpy(), "history": shared_history(trainer)}
