"""Functions that the tests' processes run under DeepSpeed; `cases.py` has those without it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_jd import JDTrainingArguments
from tests.distributed import cases
from tests.distributed.cases import MODELS, TRAINERS, Kill, fresh_accelerate, reduced_loss, token_losses, whole
from tests.distributed.counting import counted
from tests.trainer.runs import arguments, collate, examples


@contextmanager
def under_deepspeed(float16_instructions: bool = False) -> Iterator[None]:
    """Make accelerate start DeepSpeed on a CPU, by arguments alone: it doesn't if the environment asks for a CPU.

    Args:
        float16_instructions: Whether DeepSpeed is told that the processor has them. If it is, ZeRO 3 refuses float64,
            in which these tests compute.
    """
    asked = os.environ.pop("ACCELERATE_USE_CPU")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # Importing it is slow, and only these tests need it.

    deepspeed.ops.__compatible_ops__ = {}  # Otherwise DeepSpeed compiles its own all-reduce, if it finds a compiler.
    accelerator = deepspeed.get_accelerator()
    try:
        with fresh_accelerate(), patch.object(accelerator, "is_fp16_supported", lambda: float16_instructions):
            yield
    finally:
        os.environ["ACCELERATE_USE_CPU"] = asked
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def zero(stage: int, offload: bool = False, usual: bool = False) -> dict[str, Any]:
    """Return a DeepSpeed configuration; unless `usual`, even small parameters are sharded, and none are kept."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sizes = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_max_live_parameters")
    settings: dict[str, Any] = {"stage": stage, **({} if usual else dict.fromkeys(sizes, 0))}
    if offload:
        settings |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return {
        "zero_optimization": settings,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(names, "auto"),
    }


def train(
    stage: int,
    model: str = "lora",
    batch: int = 4,
    n: int = 24,
    steps: int = 6,
    unlabelled: tuple[int, ...] = (0, 1, 5),
    spoiled: str | None = None,
    clip: float = 0.0,
    stock: bool = False,
    loaded: str | None = None,
    offload: bool = False,
    usual: bool = False,
    kill: int | None = None,
    float16_instructions: bool = False,
    directory: str | None = None,
    resume: bool = False,
    own_loss: bool | str = False,
    **flags: Any,
) -> dict[str, Any]:
    """Train with DeepSpeed; return the parameters and the logs; see `cases.train`.

    Args:
        stage: ZeRO's stage.
        model: One of `MODELS`.
        batch: The global batch.
        n: The number of examples.
        steps: The number of steps.
        unlabelled: The examples without labels.
        spoiled: A function of this module that makes losses or rows infinite.
        clip: The norm that gradients are clipped to, 0 for none.
        stock: Whether the stock Trainer trains.
        loaded: A folder to load the model from instead, after DeepSpeed was requested.
        offload: Whether parameters and optimizer are offloaded.
        usual: Whether to keep DeepSpeed's default sizes, and to evaluate at each update, between its own passes.
        kill: The collective of the fifth update in which the last process is killed.
        float16_instructions: Whether DeepSpeed is told that the processor has them.
        directory: The checkpoints' directory; None for a temporary one.
        resume: Whether to continue from the newest complete checkpoint.
        own_loss: See `train`.
        flags: Further training arguments.
    """
    processes = torch.distributed.get_world_size()
    with tempfile.TemporaryDirectory() as temporary, counted() as calls, under_deepspeed(float16_instructions):
        args = arguments(
            directory or temporary,
            TrainingArguments if stock else JDTrainingArguments,
            per_device_train_batch_size=batch // processes,
            max_steps=steps,
            max_grad_norm=clip,
            accelerator_config={"even_batches": False},
            eval_strategy="steps" if usual else "no",
            eval_steps=1,
            per_device_eval_batch_size=8 // processes,  # ZeRO 3 would wait for a process without a batch.
            deepspeed=zero(stage, offload, usual),
            **({} if stock else {"jd_backward": "two_pass"}),
            **flags,
        )
        trainer = TRAINERS[stock, own_loss](
            MODELS[model]() if loaded is None else AutoModelForCausalLM.from_pretrained(loaded),
            args,
            train_dataset=examples(n, unlabelled=unlabelled),
            eval_dataset=examples(8, seed=1),
            data_collator=collate,
            compute_loss_func=None if own_loss else reduced_loss if stock else token_losses,
        )
        trainer.spoiled = getattr(cases, spoiled or "", None)
        if kill is not None and torch.distributed.get_rank() == processes - 1:
            trainer.add_callback(Kill(calls, kill))
        trainer.train(resume_from_checkpoint=resume)
        return {"parameters": trained(trainer, stage, usual), "history": trainer.state.log_history, "calls": calls}


def trained(trainer: Trainer, stage: int, usual: bool) -> np.ndarray:
    """Return the trainable parameters, which ZeRO 3 has sharded, as one vector."""
    from deepspeed.runtime.zero import GatheredParameters

    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    empty = [p.numel() == 0 for p in trainable]
    assert usual or (all(empty) if stage == 3 else not any(empty))
    with GatheredParameters(trainable, enabled=stage == 3):
        return whole(trainer.model).double().numpy()
