"""Functions that the tests' processes run; each returns something that `multiprocessing` can send."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_jd import JDTrainer, JDTrainerMixin, JDTrainingArguments
from hf_jd.distributed import columns, rows
from hf_jd.gramian.sharding import fsdp_parameters
from tests.distributed.counting import Call, counted, deadly
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, with_lora
from tests.trainer.own_losses import next_tokens, trainer_of
from tests.trainer.runs import TASKS, arguments, collate, examples
from tests.trainer.survivor import die_writing
from tests.trainer.test_nothing_to_learn import without_some

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
MODELS = {
    "lora": lambda: with_lora(tiny_gpt2(), warm=True),
    "full": tiny_gpt2,
    "full32": lambda: tiny_gpt2().float(),
    "wide": lambda: tiny_gpt2(n_embd=64),
    "wide32": lambda: tiny_gpt2(n_embd=64).float(),
    "lora32": lambda: with_lora(tiny_gpt2(), warm=True).float(),
    "llama": lambda: with_lora(tiny_llama(), warm=True),
    "biases": lambda: only(tiny_gpt2(), "bias"),
    "norms": lambda: only(tiny_llama().double(), "norm"),
    "positions": lambda: only(tiny_gpt2(), "wpe"),
    "dora": lambda: with_lora(tiny_gpt2(), warm=True, use_dora=True),
    "embedding": lambda: with_lora(tiny_gpt2(), warm=True, target_modules=["wte", "c_attn"]),
    "experts": lambda: tiny_mixtral(),
    "checkpointed": lambda: checkpointed(with_lora(tiny_gpt2(), warm=True)),
}


def tiny_mixtral() -> nn.Module:
    """Build a float32 Mixtral: grouped products don't support float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads)).float()


def only(model: nn.Module, name: str) -> nn.Module:
    """Return the model with only the parameters trainable whose names contain `name`."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad = name in path
    return model


def checkpointed(model: Any) -> Any:
    """Return the model with activation checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def token_losses(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Compute unreduced losses [B, T] in the model's own dtype; Trainer's own loss would compute them in float32."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), shifted, reduction="none", ignore_index=-100)
    return losses, shifted != -100


def reduced_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Compute the same as one number, for the stock Trainer."""
    return token_losses(outputs, labels)[0].sum() / num_items_in_batch


class Stream(IterableDataset):
    """A stream of examples of one length."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        for row in self.rows:
            yield {**row, **{key: (row[key] + [value] * 10)[:10] for key, value in padding.items()}}


class InOrder(Trainer):
    """A Trainer that visits the examples in order, so that global batches don't depend on the number of processes."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Ours(JDTrainer, InOrder):
    """JDTrainer with examples in order; some have losses, or only gradients, that aren't finite."""

    spoiled: Callable[[Tensor, Tensor], Tensor] | None = None

    def compute_losses(self, model, inputs):
        losses, counted = super().compute_losses(model, inputs)
        if self.spoiled is not None:
            losses = self.spoiled(losses, inputs["input_ids"])
        return losses, counted


def scaled_penalised(trainer: Any, model: nn.Module, inputs: dict[str, Tensor], number: Any) -> tuple[Tensor, Any]:
    """Compute a loss over the number of tokens of all processes, like Trainer's own, and a penalty on parameters."""
    loss, outputs = next_tokens(trainer, model, inputs, number)
    penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    share = len(outputs.logits) / trainer.examples
    return (loss + 0.01 * share * penalty) * trainer.accelerator.num_processes, outputs


def scaled(trainer: Any, model: nn.Module, inputs: dict[str, Tensor], number: Any) -> tuple[Tensor, Any]:
    """Compute the same without the penalty: under ZeRO 3, parameters are empty outside the model."""
    loss, outputs = next_tokens(trainer, model, inputs, number)
    return loss * trainer.accelerator.num_processes, outputs


class TheirOwnLoss(trainer_of(scaled_penalised, InOrder)):
    """A Trainer with its own loss."""

    def get_batch_samples(self, *args):
        batches, number = super().get_batch_samples(*args)
        examples = torch.tensor(sum(len(batch["labels"]) for batch in batches))
        self.examples = int(self.accelerator.gather(examples).sum())
        return batches, number


class OurOwnLoss(JDTrainerMixin, TheirOwnLoss):
    """The same, split at the model's outputs."""


class OurScaledLoss(JDTrainerMixin, trainer_of(scaled, InOrder)):
    """The same without the penalty."""


def spoil_loss(losses: Tensor, ids: Tensor) -> Tensor:
    """Make losses NaN for the instances whose first token is even and below 16."""
    return losses.masked_fill(_spoiled(ids), torch.nan)


def spoil_row(losses: Tensor, ids: Tensor) -> Tensor:
    """Leave the losses unchanged, with infinite gradients for these instances."""
    spoiled = _spoiled(ids)
    return losses + torch.where(spoiled, losses - losses.detach(), 1).sqrt() - (~spoiled).to(losses)


def _spoiled(ids: Tensor) -> Tensor:
    return ((ids[:, :1] % 2 == 0) & (ids[:, :1] < 16)).expand(-1, ids.shape[1])


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Reset accelerate's state between runs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]


def shard(args: TrainingArguments) -> None:
    """Make accelerate prepare models as on GPUs: on a CPU, it would silently turn FSDP2 into DDP."""
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(model: nn.Module) -> Tensor:
    """Return the trainable parameters as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in parameters])


def with_tasks(data: list[dict[str, Any]], tasks: str) -> list[dict[str, Any]]:
    """Return the examples; the first ones have the tasks with these numbers."""
    numbered = [{**example, "task": TASKS[int(digit)]} for example, digit in zip(data, tasks, strict=False)]
    return [*numbered, *data[len(tasks) :]]


TRAINERS = {
    (True, False): InOrder,
    (False, False): Ours,
    (True, True): TheirOwnLoss,
    (False, True): OurOwnLoss,
    (False, "scaled"): OurScaledLoss,
}
"""By whether they are the stock ones, and whether `compute_loss` is their own."""


def train(
    model: str = "lora",
    batch: int = 4,
    n: int = 23,
    stock: bool = False,
    even: bool = False,
    steps: int = 6,
    bucket: int | None = None,
    summed_here: bool = True,
    unlabelled: tuple[int, ...] = (5,),
    tasks: str = "",
    dropped: tuple[int, ...] = (),
    dispatched: bool | None = None,
    spoiled: str | None = None,
    sharded: bool = False,
    checkpointing: bool = False,
    clip: float = 0.5,
    own_loss: bool | str = False,
    **flags: Any,
) -> dict[str, Any]:
    """Train for some steps; return the parameters, the logs, and the collectives that were called.

    Args:
        model: One of `MODELS`.
        batch: The global batch.
        n: The number of examples.
        stock: Whether the stock Trainer trains.
        even: Whether the last batch is filled by repeating examples.
        steps: The number of steps.
        bucket: The bytes of a bucket.
        summed_here: Whether hf_jd adds up groups' rows, as on CPUs, instead of a reduce-scatter, as on GPUs.
        unlabelled: The examples without labels.
        tasks: The group of each example, by number, if not the default.
        dropped: The examples that the collator leaves out.
        dispatched: Whether one process reads a stream for all, or each reads all of it; None for a list.
        spoiled: A function of this module that makes losses or rows infinite.
        sharded: Whether FSDP2 shards the model.
        checkpointing: Whether FSDP2 checkpoints activations.
        clip: The norm that gradients are clipped to, 0 for none.
        own_loss: Whether the trainer overrides `compute_loss`; `scaled` for a loss without a penalty.
        flags: Further training arguments.
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    data = with_tasks(examples(n, unlabelled=unlabelled), tasks)
    columns.BUCKET_BYTES, rows.SUMMED_HERE = bucket or 2**25, ("cpu",) if summed_here else ()
    fsdp = {"fsdp_version": 2, "activation_checkpointing": checkpointing}
    flags |= {"fsdp": True, "fsdp_config": fsdp} if sharded else {}
    with tempfile.TemporaryDirectory() as directory, counted() as calls, fresh_accelerate():
        args = arguments(
            directory,
            TrainingArguments if stock else JDTrainingArguments,
            per_device_train_batch_size=batch // processes,
            max_steps=steps,
            max_grad_norm=clip,
            accelerator_config={"even_batches": even, "dispatch_batches": dispatched},
            **flags,
        )
        if sharded:
            shard(args)
        trainer = TRAINERS[stock, own_loss](
            MODELS[model](),
            args,
            train_dataset=data if dispatched is None else Stream(data),
            data_collator=without_some(*(data[i]["input_ids"] for i in dropped)) if dropped else collate,
            compute_loss_func=None if own_loss else reduced_loss if stock else token_losses,
        )
        trainer.spoiled = globals().get(spoiled)
        trainer.train()
        assert isinstance(trainer.model, FSDPModule) == sharded
        assert not (sharded and hidden_gradients(trainer.model))
        return {"parameters": whole(trainer.model).numpy(), "history": shared_history(trainer), "calls": calls}


def shared_history(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the logs, without what each process measures about itself."""
    own = ("jd/seconds/", "jd/megabytes/")
    return [{k: v for k, v in e.items() if not k.startswith(own)} for e in trainer.state.log_history[:-1]]


def hidden_gradients(model: nn.Module) -> int:
    """Count the gradients that FSDP2 keeps besides `.grad`, which it would add to the next step's."""
    parameters = fsdp_parameters([model])
    kept = [p.unsharded_accumulated_grad is not None or p.unsharded_param.grad is not None for p in parameters]
    assert kept
    return sum(kept)


def shard_replicas() -> None:
    """Train a model of which two groups of processes each hold a sharded replica."""
    with tempfile.TemporaryDirectory() as directory, fresh_accelerate():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        model = fully_shard(MODELS["lora"](), mesh=mesh)
        Ours(model, arguments(directory), train_dataset=examples(), data_collator=collate).train()


def shard_columns() -> None:
    """Train a model whose matrices are sharded along their columns."""
    with tempfile.TemporaryDirectory() as directory, fresh_accelerate():
        args = arguments(directory, fsdp=True, fsdp_config={"fsdp_version": 2})
        shard(args)
        model = fully_shard(
            MODELS["full"](),
            mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)),
            shard_placement_fn=lambda p: Shard(p.ndim - 1),
        )
        Ours(model, args, train_dataset=examples(), data_collator=collate).train()


def differ(what: str) -> None:
    """Train with one setting that differs between processes."""
    rank = torch.distributed.get_rank()
    data = examples(16, seed=rank if what == "examples" else 0)
    if what == "order" and rank == 1:
        data = data[::-1]
    flags = {"seed": 7 + rank} if what == "seed" else {"jd_backward": ["one_pass", "two_pass"][rank]}
    with tempfile.TemporaryDirectory() as directory, fresh_accelerate():
        args = arguments(directory, jd_check_processes=2, **(flags if what in ("seed", "flags") else {}))
        trainer = Ours(MODELS["lora"](), args, train_dataset=data, data_collator=collate)
        if what == "weights" and rank == 1:
            trainer.add_callback(Touch())
        trainer.train(resume_from_checkpoint=directory if what == "checkpoint" else None)


class Touch(TrainerCallback):
    """A callback that changes a weight slightly in the second update."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0].mul_(1 + 1e-15)


class Kill(TrainerCallback):
    """A callback that kills this process in a collective of the fifth update."""

    def __init__(self, calls: list[Call], call: int):
        self.calls, self.call = calls, call

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            deadly["call"] = len(self.calls) + self.call


def survive(
    directory: str, sharded: bool = False, kill: int | None = None, kill_in_write: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Train, and save at every third update; continue from the newest complete checkpoint, if there is one.

    Args:
        directory: The checkpoints' directory.
        sharded: Whether FSDP2 shards the model.
        kill: The collective of the fifth update in which the last process is killed.
        kill_in_write: The process that is killed in the third checkpoint, and the file during whose writing it is
            killed.

    Returns:
        The parameters, and the messages about checkpoints.
    """
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_jd.trainer.run.resuming").addHandler(handler)
    if kill_in_write is not None and torch.distributed.get_rank() == kill_in_write[0]:
        die_writing(kill_in_write[1])

    fsdp = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}} if sharded else {}
    flags = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3, "jd_weighting": "gradvac", **GROUP, **fsdp}
    with fresh_accelerate(), counted() as calls:
        args = arguments(directory, **flags)
        if sharded:
            shard(args)
        trainer = Ours(MODELS["lora"](), args, train_dataset=examples(24), data_collator=collate)
        if kill is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            trainer.add_callback(Kill(calls, kill))
        trainer.train(resume_from_checkpoint=any(Path(directory).glob("checkpoint-*")))
        return {"parameters": whole(trainer.model).tolist(), "said": said}
