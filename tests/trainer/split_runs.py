"""Brute force for a loss that is split at the model's outputs: one instance at a time, the others detached."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.trainer import own_losses
from tests.trainer.own_losses import CASES, Case, prepared
from tests.trainer.runs import joined, relative

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
# A gradient penalty comes past the outputs as a whole, as does what a head reads that is called again; and `Only` knows
# no other loss of a model's own than a classifier's.
UNSPLIT = ("gradient-penalty", "second-head", "scaled", "super")
SPLIT = [name for name in CASES if name not in UNSPLIT]
# Losses that are means ignore the number of tokens in the batch.
AVERAGED = {"loss_is_scaled_for_ga": False}

Owner = Callable[[Tensor], Tensor]
"""The instance of each leading row, or token, of an output."""


class Only:
    """A model whose outputs have a graph only for one instance.

    Args:
        model: The model.
        instance: Its index; -1 for none.
        owner: Returns the instance of each row of an output.
    """

    def __init__(self, model: nn.Module, instance: int, owner: Owner):
        self.model, self.instance, self.owner = model, instance, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if isinstance(outputs, own_losses.Heads):
            return own_losses.Heads(self.one(outputs.kinds), self.one(outputs.size))
        outputs = pytree.tree_map(self.one, outputs)
        if "labels" in inputs and isinstance(outputs, dict) and "loss" in outputs:
            outputs["loss"] = F.cross_entropy(outputs["logits"], inputs["labels"])
        return outputs

    def one(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim() or not tensor.requires_grad:
            return tensor
        mine = self.owner(tensor) == self.instance
        return torch.where(mine.view(mine.shape + (1,) * (tensor.dim() - mine.dim())), tensor, tensor.detach())


def by_row(instances: int) -> Owner:
    """Row n belongs to instance n % B."""
    return lambda tensor: torch.arange(len(tensor)) % instances


def brute(
    case: Case, model: nn.Module, batch: dict[str, Tensor], instances: int, owner: Owner | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each instance's part of the gradient [B, P], and the part that bypasses the outputs [P], one by one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for instance in range(-1, instances):
        torch.manual_seed(0)
        only = Only(model, instance, owner or by_row(instances))
        loss = case.loss(SimpleNamespace(), only, dict(batch), None)[0]
        gradients = [None] * len(parameters)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(joined(gradients, parameters))
    return torch.stack(found[1:]) - found[0], found[0]


class OneBatch:
    """A trainer that has run one batch, and weighs its objectives as a test says."""

    trainer: Any
    batch: Any
    weights: Tensor | None = None

    def weigh(self, gramian: Tensor) -> Tensor:
        return torch.zeros(len(gramian)).double() if self.weights is None else self.weights

    @property
    def gramian(self) -> Tensor:
        return self.trainer.jd_state.gramian

    def step(self, weights: Tensor | None) -> Tensor:
        """Return the gradient if the objectives have these weights; a single objective always has weight 1."""
        self.weights = weights
        self.trainer.model.zero_grad()
        torch.manual_seed(0)
        self.trainer.training_step(self.trainer.model, copy(self.batch))
        return joined([p.grad for p in self.trainer.trainable()], self.trainer.trainable())

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return each objective's share of the gradient [M, P], and the part that no weighting sees [P]."""
        rest = self.step(None)
        unit = torch.eye(len(self.gramian)).double()
        return torch.stack([self.step(weights) - rest for weights in unit]) / len(unit), rest


class Recorded(OneBatch):
    """One batch of a loss of one's own.

    Args:
        case: Its loss and model.
        directory: The run's directory.
        n: The number of examples.
        data: Examples to use instead of the case's.
        cls: The trainer class; by default, the mixin to the left of one with the loss.
        flags: Further training arguments.
    """

    def __init__(self, case: Case, directory: Any, n: int = 5, data: Any = None, cls: Any = None, **flags: Any):
        common = {"per_device_train_batch_size": n, "train_sampling_strategy": "sequential"}
        self.trainer: Any = prepared(case, directory, n, cls, data, **{**common, **flags})
        self.trainer.weighting = self.weigh
        self.trainer.follow_flags()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.engine()
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.inputs = {key: value for key, value in self.batch.items() if not key.startswith("jd_")}


def assert_rows(recorded: Recorded, rows: Tensor, rest: Tensor | None = None, tolerance: float = 1e-10) -> None:
    mine, others = recorded.rows()
    assert mine.shape == rows.shape
    assert relative(mine, rows) < tolerance
    assert (others - (0 if rest is None else rest)).norm() < tolerance * rows.norm()
    # The objectives' own gradients are M times their shares.
    assert relative(recorded.gramian, len(rows) ** 2 * rows @ rows.T) < tolerance


def grouped(rows: Tensor, recorded: Recorded) -> Tensor:
    """Sum the instances' rows by group."""
    groups = recorded.batch["jd_group"]
    return torch.stack([rows[groups == k].sum(0) for k in groups.unique()])
