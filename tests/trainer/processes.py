"""Trains several configurations and saves the results; the tests start it with one and with two processes.

accelerate launch --multi_gpu --num_processes 2 tests/trainer/processes.py OUTPUT_DIR PER_DEVICE_BATCH_SIZE
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler

from hf_jd import JDTrainer
from hf_jd.losses import causal_lm
from tests.trainer.runs import arguments, collate, examples, flat, lora

# 23 examples make batches of 4, 4, 4, 4, 4 and 3; two processes split the last one into 2 and 1.
DATA = examples(23, unlabelled=(5,))
GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
CONFIGURATIONS = {
    "instance-groups-logged": {"jd_group_column": "task"},
    "instance-two-pass": {"jd_backward": "two_pass", "gradient_accumulation_steps": 2},
    "micro-batch-mean": {"jd_scope": "micro_batch", "jd_weighting": "mean", "gradient_accumulation_steps": 2},
    "group-means": {**GROUP, "jd_group_reduction": "mean", "gradient_accumulation_steps": 2},
    "group-every-third": {**GROUP, "jd_every": 3, "gradient_accumulation_steps": 2},
    "instance-watched": {"jd_weighting": "mean", "jd_monitor_every": 4, "jd_group_column": "task"},
    "group-evaluated": {**GROUP, "eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2},
    "group-two-pass": {**GROUP, "jd_backward": "two_pass", "gradient_accumulation_steps": 2},
    "loss": {"jd_objectives": "loss", "gradient_accumulation_steps": 2},
    "instance-loss": {"jd_objectives": "instance_loss", "gradient_accumulation_steps": 2},
}


RARE = [{**example, "task": "rare" if i in (2, 9) else "often"} for i, example in enumerate(DATA)]
KEYS = {tuple(example["input_ids"][:4]): i for i, example in enumerate(RARE)}


class Recorded(JDTrainer):
    """A JDTrainer that stores the examples of each update, identified by their first four tokens."""

    def get_batch_samples(self, *args):
        found = super().get_batch_samples(*args)
        rows = [KEYS[tuple(row[:4].tolist())] for batch in found[0] for row in batch["input_ids"]]
        self.updates = [*getattr(self, "updates", []), rows]
        return found


def stratified(directory: Path, resume: str | bool = False, **flags) -> Recorded:
    """Train with the stratified sampler."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 11, "jd_group_column": "task", "jd_objectives": "group"}
    args = arguments(directory, jd_sampler="stratified", **{**settings, **flags})
    trainer = Recorded(lora("gpt2", dropout=0.1), args, train_dataset=RARE, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Sequential(JDTrainer):
    """A JDTrainer that visits the examples in order, so that global batches don't depend on the number of processes."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Several(Sequential):
    """A trainer with a second loss, one per instance."""

    def compute_losses(self, model, inputs):
        outputs = model(**inputs)
        mask = inputs["attention_mask"].to(outputs.logits.dtype)
        size = (outputs.logits.square().mean(2) * mask).sum(1) / mask.sum(1)
        return {"nll": causal_lm(outputs, inputs, model, 0.0), "size": size}


def train(directory: Path, batch_size: int, **flags) -> dict:
    """Train one configuration for ten steps; return its parameters, losses, norms and metrics."""
    args = arguments(
        directory,
        per_device_train_batch_size=batch_size,
        max_steps=10,
        max_grad_norm=0.5,
        accelerator_config={"even_batches": False},
        **flags,
    )
    cls = Several if "loss" in args.jd_objectives else Sequential
    trainer = cls(lora("gpt2"), args, train_dataset=DATA, eval_dataset=DATA[:20], data_collator=collate)
    trainer.train()
    # These depend on the process or the machine; Trainer's own evaluation averages the batches of all processes.
    own = ("runtime", "per_second", "jd/seconds", "jd/megabytes", "eval_loss")
    logs = trainer.state.log_history[:-1]
    history = [{k: v for k, v in entry.items() if not any(word in k for word in own)} for entry in logs]
    return {"parameters": flat(trainer.model), "history": history}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "is_gradient_checkpointing")
    output, size = Path(sys.argv[1]), int(sys.argv[2])
    for name, flags in CONFIGURATIONS.items():
        result = train(output, size, **flags)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.save(result, output / f"{name}-{rank}.pt")
    runs = output / "stratified"
    whole = stratified(runs, save_strategy="steps", save_steps=1)
    resumed = {step: stratified(runs, str(runs / f"checkpoint-{step}")) for step in (3, 4)}
    found = {"updates": whole.updates, "resumed": {step: trainer.updates for step, trainer in resumed.items()}}
    torch.save(found, output / f"stratified-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
