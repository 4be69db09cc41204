"""Small training runs, shared by the tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer, JDTrainingArguments
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, with_lora
from tests.releases import has

TASKS = ("code", "docs", "chat")
DESCENT = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "bf16": False,
}
"""Flags for a few updates by plain gradient descent, for the trainers of other libraries."""
MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def examples(n: int = 14, seed: int = 0, unlabelled: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Return sequences of 4 to 9 tokens with labels of different lengths, the tasks in turn; some have no labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        length = int(torch.randint(4, 10, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length if i in unlabelled else int(torch.randint(0, length - 2, (1,), generator=generator))
        labels = [-100] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "task": TASKS[i % len(TASKS)]})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch to its longest sequence."""
    length = max(len(example["input_ids"]) for example in batch)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([example[key] + [value] * (length - len(example[key])) for example in batch])
        for key, value in padding.items()
        if key in batch[0]
    }


def arguments(directory: Any, cls: type = JDTrainingArguments, **flags: Any) -> Any:
    """Return arguments for a short, quiet run on the CPU."""
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    order = None if has("transformers", "5.2") else flags.pop("train_sampling_strategy", None)
    if order == "group_by_length":
        flags["group_by_length"] = True
    args = cls(output_dir=str(directory), **{**settings, **flags})
    args.tests_are_in_order = order == "sequential"
    return args


def run(model: nn.Module, args: Any, data: Any = None, cls: type | None = None, **settings: Any) -> Trainer:
    """Train the model with JDTrainer or, for plain arguments, with Trainer."""
    cls = cls or (JDTrainer if isinstance(args, JDTrainingArguments) else Trainer)
    data = examples() if data is None else data
    trainer = in_order(cls(model, args, train_dataset=data, **{"data_collator": collate, **settings}))
    trainer.train()
    return trainer


def in_order(trainer: Trainer) -> Trainer:
    """Return the trainer; with releases that lack the flag for it, take the examples in their order if asked."""
    if getattr(trainer.args, "tests_are_in_order", False):
        trainer._get_train_sampler = lambda dataset=None: SequentialSampler(dataset or trainer.train_dataset)
    return trainer


def stock(model: nn.Module, directory: Any, data: Any = None, **flags: Any) -> Trainer:
    """Train the model with Trainer itself."""
    return run(model, arguments(directory, TrainingArguments, **flags), data)


def joined(gradients: Sequence[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    """Return gradients as one vector, with zeros for missing ones."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def flat(model: nn.Module) -> Tensor:
    """Return the trainable parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def relative(a: Tensor, b: Tensor) -> float:
    """Compute |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def logged(trainer: Trainer, key: str) -> Tensor:
    """Return the values logged under a key, one per log."""
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def lora(name: str, **settings: Any) -> nn.Module:
    """Build a tiny model with adapters, by the name of its architecture."""
    dropout = settings.pop("dropout", 0.0)
    model = tiny_gpt2(dropout=dropout) if name == "gpt2" else MODELS[name]()
    return with_lora(model, dropout=dropout, **settings)
