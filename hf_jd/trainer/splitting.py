"""One micro-batch of any Trainer: its own step runs, and the scalar that it would descend becomes rows.

Trainer's step ends in `accelerator.backward(loss)`. That call is taken over: the loss is split by instance at the
model's outputs (`cotangents.py`), so that any `compute_loss` works as it stands, with its own metrics and scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_jd.collator import EXAMPLES_KEY, GROUP_KEY
from hf_jd.distributed.processes import process_count
from hf_jd.gramian import Jacobian
from hf_jd.gramian.rows import DenseRows
from hf_jd.objectives import Part
from hf_jd.packing import documents_of
from hf_jd.trainer.cotangents import Cotangent, Split, split, surrogates
from hf_jd.trainer.gradients import accumulate, set_aside
from hf_jd.trainer.recording import Extra, Recorded

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


class Whose(NamedTuple):
    """What the batch tells of its instances.

    Attributes:
        groups: [B] the groups' ids, if there are groups.
        examples: B, if it is known.
        documents: [N, T] the document of each token, if rows are packed; see `documents_of`.
    """

    groups: Tensor | None
    examples: int | None
    documents: Tensor | None


class SplitRecorder:
    """Records the micro-batches of one update.

    Args:
        trainer: Whose step runs.
        model: The model as Trainer has wrapped it.
        present: [K] the sorted ids of the groups that are weighed together; None without a group column.
        materialise: Whether rows are formed, or kept as the layers' inputs and gradients where those are smaller.

    Attributes:
        scale: What rows are multiplied by: the scale of GradScaler.
        has_rest: Whether a loss had a part that doesn't come through the model's outputs.
    """

    def __init__(self, trainer: JDTrainerMixin, model: nn.Module, present: Tensor | None, materialise: bool):
        self.trainer, self.model = trainer, model
        self.present, self.materialise = present, materialise
        self.kind = trainer.jd_args.kind
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()
        self.has_rest = False

    def record(self, batch: Any, step: Callable[[Any], Tensor]) -> tuple[Tensor, Recorded]:
        """Runs Trainer's own step on a micro-batch.

        Args:
            batch: As collated.
            step: The step, of a batch without the groups' ids.

        Returns:
            What the step returned, for Trainer's log; and the rows.

        Raises:
            ValueError: The step didn't call `accelerator.backward` once, or its loss can't be split.
        """
        if self.kind.of_batches:
            return self._whole(batch, step)
        whose = self._whose(batch)
        recorded: list[Recorded] = []
        with set_aside(self.trainer.trainable()) as past:
            value = self._run(batch, step, lambda loss: recorded.append(self._rows(loss, whose)))
        if any(bool(gradient.any()) for gradient in past.values()):
            raise ValueError(
                f"{type(self.trainer).__name__} ran a backward pass of its own, past accelerator.backward, which left "
                "gradients that can't be split by instance: take these from torch.autograd.grad, add the losses up, or "
                "choose --jd_objectives batch, which takes each batch as one objective."
            )
        return value, recorded[0]

    def descend(
        self, batch: Any, step: Callable[[Any], Tensor], multipliers: Tensor | None
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Runs Trainer's own step on a micro-batch whose weights are known, without rows.

        Args:
            batch: See `record`.
            step: See `record`.
            multipliers: [K] what the part of each group is multiplied by; None: the loss stays as it is.

        Returns:
            What the step returned, for Trainer's log; and the gradient.
        """
        whose = self._whose(batch)
        with self.trainer.engine().paused(), set_aside(self.trainer.trainable()) as gradients:
            value = self._run(batch, step, lambda loss: self._multiplied(loss, whose, multipliers).backward())
        return value, gradients

    def _run(self, batch: Any, step: Callable[[Any], Tensor], backward: Callable[[Tensor], None]) -> Tensor:
        """Runs the step with another backward in the place of accelerate's."""
        trainer, losses = self.trainer, []
        divide_by = trainer.accelerator.gradient_accumulation_steps * process_count()

        def take(loss: Tensor) -> None:
            losses.append(loss.detach())
            if len(losses) == 1:
                backward(loss * self.scale / divide_by)

        trainer.jd_outputs.begin(batch)
        trainer.jd_backward = take
        try:
            with trainer.accelerator.no_sync(self.model):
                value = step(_without(batch, GROUP_KEY, EXAMPLES_KEY))
        finally:
            trainer.jd_backward = None
        if len(losses) != 1:
            raise ValueError(
                f"The training step of {type(trainer).__name__} called accelerator.backward {len(losses)} times for "
                "one batch: call it, or super().training_step, once, with the sum of the losses."
            )
        return value

    def _whose(self, batch: Any) -> Whose:
        if not isinstance(batch, Mapping):
            return Whose(None, None, None)
        device = self.trainer.args.device
        groups, documents = (
            None if ids is None else ids.to(device)
            for ids in (batch.get(GROUP_KEY), documents_of(batch, self.trainer.jd_args.jd_packed))
        )
        counted = groups if groups is not None else batch.get(EXAMPLES_KEY)
        return Whose(groups, None if counted is None else len(counted), documents)

    def _multiplied(self, loss: Tensor, whose: Whose, multipliers: Tensor | None) -> Tensor:
        if multipliers is None:
            return loss
        cotangents, rest = self._split(loss, self.trainer.jd_outputs.take())
        owners = self._owners(cotangents, whose)
        ids = self._part(cotangents, owners, whose.groups).segments
        parts = [surrogates(c, _at(ids, o), len(multipliers)) for c, o in zip(cotangents, owners, strict=True)]
        total = (torch.stack(parts).sum(0) * multipliers).sum()
        return total if rest is None else total + rest

    def _whole(self, batch: Any, step: Callable[[Any], Tensor]) -> tuple[Tensor, Recorded]:
        """The batch as one objective, whose row is its gradient, of whichever backward passes the step runs."""
        losses: list[Tensor] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss.detach())
            loss.backward()

        with self.trainer.engine().paused(), set_aside(self.trainer.trainable()) as gradients:
            value = self._run(batch, step, backward)
        rows = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in gradients.items()}
        finite = losses[0].isfinite()[None]
        counts = finite.long()
        part = _part_without_values(counts - 1, torch.full_like(counts, -1), counts, finite)
        jacobian = Jacobian({p: rows.get(p) for p in self.trainer.trainable()}, 1)
        return value, Recorded({}, None, [part], jacobian, (~finite).sum(), None)

    def _split(self, loss: Tensor, outputs: Sequence[Tensor]) -> Split:
        found = split(loss, outputs)
        if not found.cotangents:
            raise ValueError(self._nothing_read(outputs))
        return found

    def _rows(self, loss: Tensor, whose: Whose) -> Recorded:
        engine, documents = self.trainer.engine(), whose.documents
        self._descend_others(loss)
        cotangents, rest = self._split(loss, self.trainer.jd_outputs.take())
        extra = None
        if rest is not None and loss.detach().isfinite():
            self.has_rest = True
            extra = Extra(loss.detach() * 0, engine.gradients(rest))
        owners = self._owners(cotangents, whose)
        part = self._part(cotangents, owners, whose.groups)
        if not part.finite.all():
            # In a backward NaN times 0 is NaN.
            cotangents = [_finite(c, part.finite[o.clamp(min=0)]) for c, o in zip(cotangents, owners, strict=True)]
        objectives = len(part.counts)
        if not part.counts.any():
            engine.keep_up(loss)
            jacobian = Jacobian(dict.fromkeys(self.trainer.trainable()), objectives) if objectives else None
            return Recorded({}, None, [part], jacobian, (~part.finite).sum(), extra)
        parts = [surrogates(c, _at(part.segments, o), objectives) for c, o in zip(cotangents, owners, strict=True)]
        del cotangents
        segments = part.segments if documents is None else _at(part.segments, documents)
        jacobian = engine.compute_jacobian(torch.stack(parts).sum(0), segments, self.materialise, False)
        return Recorded({}, None, [part], jacobian, (~part.finite).sum(), extra)

    def _descend_others(self, loss: Tensor) -> None:
        """Adds to `.grad` of what the optimizer trains beside the model: a loss may have parameters of its own."""
        optimizer, trainable = self.trainer.optimizer, set(self.trainer.trainable())
        if optimizer is None or not loss.requires_grad or not loss.detach().isfinite():
            return
        every = [p for group in optimizer.param_groups for p in group["params"]]
        others = [p for p in every if p.requires_grad and p not in trainable]
        if others:
            gradients = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
            accumulate({p: g for p, g in zip(others, gradients, strict=True) if g is not None})

    def _nothing_read(self, outputs: Sequence[Tensor]) -> str:
        shapes = ", ".join(str(list(output.shape)) for output in outputs) or "none"
        return (
            f"The loss of {type(self.trainer).__name__} does not depend on what the model returned with a graph "
            f"(outputs of shapes {shapes}), so it can't be split by instance. Usual causes: a loss that runs its own "
            "backward pass, that calls a part of the model past its forward, or a model that returns no tensors. "
            "Choose --jd_objectives batch, which takes each batch as one objective, or override `compute_losses`."
        )

    def _owners(self, cotangents: list[Cotangent], whose: Whose) -> list[Tensor]:
        """The instance of each leading row [N] of the outputs, or of each token [N, T]; -1 for none."""
        if whose.documents is not None:
            return [_tokens(whose.documents, c.output) for c in cotangents]
        sizes = {len(c.output) for c in cotangents}
        instances = whose.examples or min(sizes)
        if any(n % instances for n in sizes):
            raise ValueError(
                f"The batch has {instances} examples, and the loss reads outputs of {sorted(sizes)} rows, so no row's "
                "example is known: override `jd_instances`, or choose --jd_objectives batch."
            )
        return [self.trainer.jd_instances(c.output, instances).to(c.output.device) for c in cotangents]

    def _part(self, cotangents: list[Cotangent], owners: list[Tensor], groups: Tensor | None) -> Part:
        """The objectives of the micro-batch; instances whose cotangent is zero, or isn't finite, are in none."""
        instances = 1 + max(int(owner.max()) for owner in owners)
        if groups is not None and len(groups) != instances:
            raise ValueError(
                f"The loss reads outputs of {instances} examples, and the batch has {len(groups)} groups, so no row's "
                "group is known: override `jd_instances`, or use a collator that pads instead of packing."
            )
        sizes, counts = _by_instance(cotangents, owners, instances)
        finite = sizes.isfinite()
        counts = counts * finite
        some = counts > 0
        if self.kind.shared:
            assert self.present is not None
            assert groups is not None
            ids, of_groups = torch.where(some, torch.searchsorted(self.present, groups), -1), self.present
            totals = counts.new_zeros(len(of_groups)).index_add(0, ids[some], counts[some])
        else:
            ids, totals = torch.where(some, some.cumsum(0) - 1, -1), counts[some]
            of_groups = totals.new_full(totals.shape, -1) if groups is None else groups[some]
        return _part_without_values(ids, of_groups, totals, finite)


def _part_without_values(segments: Tensor, groups: Tensor, counts: Tensor, finite: Tensor) -> Part:
    """Objectives whose rows are shares of a loss; their values are not known."""
    unknown = torch.full_like(counts, torch.nan, dtype=torch.float64)
    return Part(unknown, segments, groups, torch.zeros_like(counts), counts, torch.ones_like(unknown), finite)


def _by_instance(cotangents: list[Cotangent], owners: list[Tensor], instances: int) -> tuple[Tensor, Tensor]:
    """How large each instance's cotangents are [B], and at how many places the loss depends on it [B]."""
    sizes = torch.zeros(instances, dtype=torch.float64, device=owners[0].device)
    counts = torch.zeros_like(sizes, dtype=torch.int64)
    for cotangent, owner in zip(cotangents, owners, strict=True):
        places = _sizes(cotangent.gradient, owner)
        where = owner.view(owner.shape + (1,) * (places.dim() - owner.dim())).expand_as(places)
        mine = where >= 0
        sizes.index_add_(0, where[mine], places[mine].double())
        counts.index_add_(0, where[mine], (places[mine] != 0).long())
    return sizes, counts


def _sizes(gradient: Tensor, owner: Tensor) -> Tensor:
    """How large the cotangent is at each place: of the dimensions of `owner`, and one more where that holds tokens."""
    dims = tuple(range(max(owner.dim(), min(gradient.dim() - 1, 2)), gradient.dim()))
    if not dims:
        return gradient.abs()
    return torch.linalg.vector_norm(gradient, dim=dims, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _finite(cotangent: Cotangent, finite: Tensor) -> Cotangent:
    """The cotangent with zeros where its instance isn't finite."""
    gradient = cotangent.gradient
    return cotangent._replace(
        gradient=torch.where(finite.view(finite.shape + (1,) * (gradient.dim() - finite.dim())), gradient, 0)
    )


def _at(ids: Tensor, owner: Tensor) -> Tensor:
    """The objective of each leading row or token, from that of each instance; -1 for none."""
    return torch.where(owner >= 0, ids[owner.clamp(min=0)], -1)


def _tokens(documents: Tensor, output: Tensor) -> Tensor:
    """The document of each token of an output [B, T, ...] or [B, T - 1, ...], which predicts the next tokens.

    Raises:
        ValueError: The output is neither.
    """
    length = output.shape[1] if output.dim() > 1 else 0
    if output.shape[0] != len(documents) or length not in (documents.shape[1], documents.shape[1] - 1):
        raise ValueError(
            f"The batch packs documents in rows of {documents.shape[1]} tokens, and the loss reads an output of shape "
            f"{list(output.shape)}, so no document's part is known: use a collator that pads instead of packing."
        )
    return documents[:, :length]


def _without(batch: Any, *keys: str) -> Any:
    if not isinstance(batch, Mapping) or not any(key in batch for key in keys):
        return batch
    return {key: value for key, value in batch.items() if key not in keys}
