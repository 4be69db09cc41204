"""A classifier with a rare class, trained with and without knowledge of that class.

The embedded model learns to tell an error's kind (value, type, state) from its message; one message in ten is `state`.
Each seed has its own held-out messages and initial values.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    set_seed,
)

from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.finetune.example import MODEL, example_path, example_texts

CLASSES = ("value", "type", "state")
HELD_OUT = 400
TOKENS = 24
"""The number of tokens to which messages are truncated."""


class WeightedTrainer(JDTrainer):
    """JDTrainer with focal loss and class weights.

    Attributes:
        gamma: Focal loss multiplies each example's loss by (1 - p)^gamma; 0 is cross-entropy.
        weights: [3] the class weights.
    """

    gamma: float = 0.0
    weights: Tensor = torch.ones(len(CLASSES))

    def compute_losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute each example's loss, [B]."""
        labels = inputs["labels"]
        losses = cross_entropy(model(**inputs).logits, labels, reduction="none")
        return self.weights[labels] * (1 - (-losses).exp()) ** self.gamma * losses


def train(flags: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Train and evaluate one classifier.

    Args:
        flags: Flags of `JDTrainingArguments`, and: `gamma` (focal loss), `class_power` (each class's weight is its
            inverse frequency to this power).
        seed: The seed of the run and of the choice of held-out messages.
        output: Trainer's folder.
    """
    flags = dict(flags)
    gamma, power = flags.pop("gamma", 0.0), flags.pop("class_power", 0.0)
    tokenizer: Any = AutoTokenizer.from_pretrained(example_path(MODEL))
    messages = load_messages(tokenizer).train_test_split(test_size=HELD_OUT, seed=seed)
    counts = np.bincount(messages["train"]["labels"])
    (arguments,) = HfArgumentParser(JDTrainingArguments).parse_dict(  # ty: ignore[invalid-argument-type]
        {**flags, "seed": seed, "output_dir": str(output)}
    )
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        example_path(MODEL), num_labels=len(CLASSES), pad_token_id=tokenizer.pad_token_id, dtype="float32"
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = WeightedTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=messages["train"],
        eval_dataset=messages["test"].remove_columns("kind"),
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    trainer.gamma = gamma
    trainer.weights = torch.tensor((counts.sum() / counts / len(counts)) ** power, dtype=torch.float32)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "measures": {name.removeprefix("eval_"): metrics[name] for name in metrics if "F1" in name or "acc" in name}
    }


def load_messages(tokenizer: Any) -> Dataset:
    """Return the messages of the errors in Python's standard library, with their kinds."""
    rows = []
    for prompt, answer in _errors():
        kind = answer.strip()
        ids = tokenizer(prompt.removesuffix(" ="), truncation=True, max_length=TOKENS)
        rows.append({**ids, "labels": CLASSES.index(kind), "kind": kind})
    return Dataset.from_list(rows)


@cache
def _errors() -> list[tuple[str, str]]:
    return example_texts()["error"]


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Compute each class's F1, their mean, and the accuracy."""
    answers, labels = np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
    each = {}
    for i, name in enumerate(CLASSES):
        right = ((answers == i) & (labels == i)).sum()
        each[f"F1 of {name}"] = float(2 * right / max(1, (answers == i).sum() + (labels == i).sum()))
    accuracy = float((answers == labels).mean())
    return {"macro F1": sum(each.values()) / len(each), **each, "accuracy": accuracy}
