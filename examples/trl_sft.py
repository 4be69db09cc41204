"""What: TRL's SFTTrainer on the four tasks of the embedded example, with one objective per task.

Why:  you have a script for TRL already. Two names change, SFTTrainer and SFTConfig; how TRL prepares data, its losses
      and its metrics stay.
Run:  pip install -e ".[trl]", then python examples/trl_sft.py; flags of SFTConfig and --jd_* override DEFAULTS
See:  TRL's own logs with `jd/weight/<task>`, `jd/against/<task>` and the other metrics of hf_jd among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from transformers import HfArgumentParser

from hf_jd import JDSFTConfig, JDSFTTrainer
from hf_jd.finetune.example import MODEL, example_data, example_path

DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/trl-sft",
    "jd_objectives": "group",
    "jd_group_column": "task",
    "jd_group_reduction": "mean",
    "jd_sampler": "stratified",
    "learning_rate": 3e-3,
    "max_steps": 80,
    "per_device_train_batch_size": 24,
    "max_length": 32,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_strategy": "no",
    "bf16": False,  # TRL's default, which asks for a GPU
    "gradient_checkpointing": False,  # TRL turns it on, which costs a forward and saves memory
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def main(argv: Sequence[str]) -> JDSFTTrainer:
    """Train, and return the trainer."""
    parser = HfArgumentParser(JDSFTConfig, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    (arguments,) = parser.parse_args_into_dataclasses(list(argv))
    trainer = JDSFTTrainer(
        model=str(example_path(MODEL)),
        args=arguments,
        train_dataset=example_data("tasks")["train"],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
