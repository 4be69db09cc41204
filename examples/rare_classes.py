"""What: the embedded model learns to tell an error's kind (value, type, state) from its message. One in ten is `state`.

Why:  a classifier that follows the mean over examples neglects the rare class. With each class as an objective, and
      `--jd_group_reduction mean`, all classes count the same, and no step goes against any of them.
Run:  python examples/rare_classes.py
      python examples/rare_classes.py --jd_weighting mean --jd_objectives instance      (a control: it is Trainer)
See:  the recall of each class on 200 messages that were held out, and the mean of the three.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, HfArgumentParser

from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.finetune.example import MODEL, example_path, example_texts

CLASSES = ("value", "type", "state")
DEFAULTS = {
    "output_dir": "runs/rare-classes",
    "jd_objectives": "group",
    "jd_group_column": "kind",
    "jd_group_reduction": "mean",
    "jd_sampler": "stratified",  # Each class has its share of every batch: the rare one is never absent.
    "learning_rate": 3e-4,
    "max_steps": 150,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,
    "logging_steps": 25,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def main(argv: Sequence[str]) -> dict[str, float]:
    """Train and evaluate; any flag of `JDTrainingArguments` overrides `DEFAULTS`.

    Returns:
        The metrics on the messages that were held out.
    """
    parser = HfArgumentParser(JDTrainingArguments, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    (arguments,) = parser.parse_args_into_dataclasses(list(argv))
    tokenizer = AutoTokenizer.from_pretrained(example_path(MODEL))
    model = AutoModelForSequenceClassification.from_pretrained(
        example_path(MODEL), num_labels=len(CLASSES), pad_token_id=tokenizer.pad_token_id, dtype="float32"
    )
    messages = load_messages(tokenizer).train_test_split(test_size=200, seed=0)
    trainer = JDTrainer(
        model=model,
        args=arguments,
        train_dataset=messages["train"],
        eval_dataset=messages["test"],
        processing_class=tokenizer,
        compute_metrics=recalls,
    )
    trainer.train()
    return trainer.evaluate()


def load_messages(tokenizer) -> Dataset:
    """Return the messages of the errors in Python's standard library, with their kinds."""
    texts = [(prompt.removesuffix(" ="), kind.strip()) for prompt, kind in example_texts()["error"]]
    rows = [tokenizer(text) | {"labels": CLASSES.index(kind), "kind": kind} for text, kind in texts]
    return Dataset.from_list(rows)


def recalls(prediction: EvalPrediction) -> dict[str, float]:
    """Compute each class's recall, and their mean."""
    right = np.asarray(prediction.predictions).argmax(-1) == prediction.label_ids
    by_class = {name: float(right[prediction.label_ids == i].mean()) for i, name in enumerate(CLASSES)}
    mean = sum(by_class.values()) / len(by_class)
    return {f"recall_{name}": recall for name, recall in by_class.items()} | {"recall": mean}


if __name__ == "__main__":
    for name, value in main(sys.argv[1:]).items():
        if "recall" in name:
            print(f"{name.removeprefix('eval_'):14}{value:.2f}")
