"""DPO on two groups of pairs that partly disagree.

A prompt is a story's first sentence. Its two completions are the story's own continuation and another story's; one is a
single sentence, the other is longer. *Helpful* prefers the story's own, *brief* the shorter one: if the story's own is
longer, they rank the same completions in opposite orders.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed

from hf_jd.finetune.example import MODEL, example_path

GROUPS = ("helpful", "brief")
HELD_OUT = 48
"""The number of evaluation prompts, which both groups share."""

Pairs = list[dict[str, str]]


def train(flags: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Train one model, and evaluate each group's held-out pairs.

    Args:
        flags: Flags of `JDDPOConfig`, and arguments of `pairs`.
        seed: The seed of the run and of the choice of stories.
        output: Trainer's folder.
    """
    from hf_jd.trainer.trl.trainers import JDDPOConfig, JDDPOTrainer

    flags = dict(flags)
    data, held_out = pairs(seed, flags.pop("opposed"), flags.pop("shares"))
    set_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(example_path(MODEL), dtype="float32")
    trainer = JDDPOTrainer(
        model=model,
        args=JDDPOConfig(**flags, seed=seed, output_dir=str(output)),
        train_dataset=Dataset.from_list(data),
        eval_dataset={group: Dataset.from_list(rows) for group, rows in held_out.items()},
        processing_class=AutoTokenizer.from_pretrained(example_path(MODEL)),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    trainer.evaluate()
    log = trainer.state.log_history
    logged = {group: next(entry for entry in log if f"eval_{group}_loss" in entry) for group in GROUPS}
    measures = {f"loss of {group}": entry[f"eval_{group}_loss"] for group, entry in logged.items()}
    worst = max(measures.values())
    measures |= {f"accuracy of {group}": entry["eval_rewards/accuracies"] for group, entry in logged.items()}
    return {"measures": {"worst loss": worst, **measures}}


def pairs(seed: int, opposed: float, shares: Sequence[int]) -> tuple[Pairs, dict[str, Pairs]]:
    """Build pairs of completions, ranked by their group.

    Args:
        seed: The seed of the choice of stories.
        opposed: The share of prompts whose own continuation is the longer one, so that the groups disagree.
        shares: The number of training pairs per group.

    Returns:
        The training pairs, and each group's held-out pairs, which all have the same prompts.
    """
    stories = [
        re.split(r"(?<=[.!?])\s+", story) for story in json.loads(example_path("stories.json").read_text("utf-8"))
    ]
    stories = [story for story in stories if len(story) > 3]
    random.Random(seed).shuffle(stories)
    ranked = []
    for i, (own, other) in enumerate(zip(stories[::2], stories[1::2], strict=False)):
        longer = int(opposed * (i + 1)) > int(opposed * i)  # Spread evenly, so that each part has its share.
        completions = {True: _continuation(own, longer), False: _continuation(other, not longer)}
        for group, chosen in zip(GROUPS, (True, not longer), strict=True):
            ranked.append(
                {"task": group, "prompt": own[0], "chosen": completions[chosen], "rejected": completions[not chosen]}
            )
    of_group = {group: [row for row in ranked if row["task"] == group] for group in GROUPS}
    held_out = {group: rows[:HELD_OUT] for group, rows in of_group.items()}
    data = [
        row for group, count in zip(GROUPS, shares, strict=True) for row in of_group[group][HELD_OUT : HELD_OUT + count]
    ]
    return data, held_out


def _continuation(story: list[str], whole: bool) -> str:
    """Return the story's second sentence, or everything from there on."""
    return " " + " ".join(story[1:] if whole else story[1:2])
