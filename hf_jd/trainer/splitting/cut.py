"""Cut the loss of a micro-batch where its instances are still separate, and find the instance of each row there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from hf_jd.batches import holds_examples, row_count
from hf_jd.collator import EXAMPLES_KEY, GROUP_KEY
from hf_jd.contradictions import listed
from hf_jd.packing import documents_of
from hf_jd.trainer.gradients import accumulate
from hf_jd.trainer.splitting.cotangents import Cotangent, split
from hf_jd.trainer.splitting.shares import Piece, Shares, Values, sums_of
from hf_jd.trainer.splitting.unreduced import LOSS, Unreduced
from hf_jd.trainer.splitting.values import check_values_are_not_needed, known_losses, values_of

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Contents(NamedTuple):
    """The examples, groups and documents that a batch holds.

    Attributes:
        groups: [B] the group ids, if there are groups.
        examples: B, if known.
        documents: [N, T] the document of each token, if rows are packed; see `documents_of`.
        empty: Whether there is no example, so that a stand-in batch is used, which doesn't count.
        rows: The number of examples that the batch's shapes suggest, if it isn't known; None without tensors.
    """

    groups: Tensor | None
    examples: int | None
    documents: Tensor | None
    empty: bool = False
    rows: int | None = None

    @staticmethod
    def of(batch: Any, packed: str, device: torch.device) -> Contents:
        """Read a batch as collated; for `packed`, see `--jd_packed`."""
        if not holds_examples(batch):
            return Contents(None, None, None, empty=True)
        if not isinstance(batch, Mapping):
            return Contents(None, None, None)
        groups, documents = (
            None if ids is None else ids.to(device) for ids in (batch.get(GROUP_KEY), documents_of(batch, packed))
        )
        counted = groups if groups is not None else batch.get(EXAMPLES_KEY)
        if counted is None:  # collated by a DataLoader of the user's own
            return Contents(groups, None, documents, rows=row_count(batch))
        return Contents(groups, len(counted), documents)


def shares_of(trainer: JDTrainerMixin, loss: Tensor, contents: Contents, scale: float) -> tuple[Shares, list[str]]:
    """Cut the loss of a micro-batch that the trainer has just computed.

    Args:
        trainer: Has the outputs and unreduced losses from which it was computed.
        loss: [] with a graph, times the scale.
        contents: What the batch holds.
        scale: GradScaler's scale.

    Returns:
        The shares, and the names of the losses.

    Raises:
        ValueError: The loss reads no tensor of known instances.
    """
    outputs, last = trainer.jd_outputs.take(trainer.jd_retain_graph)
    if any(output.retains_grad for output in outputs):
        logger.warning_once(
            "`retain_grad` was called on an output of the model, whose `.grad` several backward passes now add to: use "
            "torch.autograd.grad(loss, output, retain_graph=True) before accelerator.backward."
        )
    unreduced, trainer.jd_unreduced = trainer.jd_unreduced, None
    _descend_others(trainer, loss)
    if unreduced is not None:
        shares, names = _of_unreduced(trainer, loss, contents, unreduced, scale), list(unreduced.losses)
    else:
        shares, names = _of_outputs(trainer, loss, contents, outputs, last, scale), [LOSS]
    if contents.empty:
        shares.take_out(torch.ones(shares.instances, dtype=torch.bool, device=loss.device))
    return shares, names


def _of_outputs(
    trainer: JDTrainerMixin, loss: Tensor, contents: Contents, outputs: Sequence[Tensor], last: Any, scale: float
) -> Shares:
    read = known_losses(trainer, last, contents.examples, contents.documents)
    cotangents, rest = split(loss, outputs, trainer.jd_retain_graph)
    if not cotangents:
        raise ValueError(_nothing_read(trainer, outputs))
    owners, instances, in_parts = _owners(trainer, cotangents, contents)
    pieces = [Piece(cotangent, owner, 0) for cotangent, owner in zip(cotangents, owners, strict=True)]
    values = None
    if read is not None and len(read[0]) == instances:
        values = values_of(trainer, *read, last, loss.detach() / scale, rest is not None)
    if values is None:
        check_values_are_not_needed(trainer, f"the loss of {type(trainer).__name__} is")
    normalised, factor = True, 1.0
    if values is not None and trainer.jd_args.own_mean:
        # A group's own mean is over all its losses, however Trainer divides those of each micro-batch.
        normalised = False
        factor = values.sums[values.sums.isfinite()].sum() / values.parts[values.parts.isfinite()].sum()
        values = values._replace(parts=values.sums)
    return Shares(pieces, instances, rest=rest, values=values, normalised=normalised, factor=factor, in_parts=in_parts)


def _of_unreduced(
    trainer: JDTrainerMixin, loss: Tensor, contents: Contents, unreduced: Unreduced, scale: float
) -> Shares:
    losses, counted = list(unreduced.losses.values()), list(unreduced.counted.values())
    owners, instances = _owners_of_losses(trainer, unreduced.losses, contents)
    cotangents, rest = split(loss, losses, trainer.jd_retain_graph)
    gradients = {id(cotangent.output): cotangent.gradient for cotangent in cotangents}
    if not unreduced.normalised:  # The number of all losses is not known yet.
        gradients = {id(v): scale * mask.to(v.dtype) for v, mask in zip(losses, counted, strict=True)}
    pieces = [
        Piece(Cotangent(values, gradients[id(values)]), owner, k)
        for k, (values, owner) in enumerate(zip(losses, owners, strict=True))
        if id(values) in gradients and values.requires_grad
    ]
    if not pieces:
        raise ValueError(
            f"The losses {listed(unreduced.losses)} have no graph, so there is nothing to "
            "train: compute them from the model's outputs in training."
        )
    parts = list(zip(losses, counted, owners, range(len(losses)), strict=True))
    sums, counts = sums_of(parts, instances, len(losses))
    # A loss's cotangent is its factor in Trainer's loss.
    each = torch.zeros(len(losses), dtype=torch.float64, device=sums.device)
    for (_, gradient), _, k in pieces:
        each[k] = gradient.detach().abs().max() / scale
    values = Values(sums, counts, sums * each)
    return Shares(pieces, instances, len(losses), rest, values, unreduced.normalised, unreduced=True)


def _owners(
    trainer: JDTrainerMixin, cotangents: Sequence[Cotangent], contents: Contents
) -> tuple[list[Tensor], int, bool]:
    """Find the instance of each leading row [N] of the outputs, or of each token [N, T], -1 for none.

    Returns:
        These; B; and whether the model was called on parts of the batch.

    Raises:
        ValueError: They are unknown.
    """
    in_parts = False
    if contents.documents is not None:
        owners = [owners_of_tokens(contents.documents, c.output) for c in cotangents]
    else:
        sizes = {len(c.output) for c in cotangents}
        fits = contents.rows is not None and not any(n % contents.rows for n in sizes)
        instances = contents.examples or (contents.rows if fits else min(sizes))
        in_parts = any(n % instances for n in sizes)
        owners = (
            _owners_of_parts(trainer, cotangents, instances)
            if in_parts
            else [trainer.jd_instances(c.output, instances).to(c.output.device) for c in cotangents]
        )
    if not in_parts:
        instances = 1 + max(int(owner.max()) for owner in owners)
    if contents.groups is not None and len(contents.groups) != instances:
        raise ValueError(
            f"The loss reads outputs of {instances} examples, but the batch has {len(contents.groups)} groups, so no "
            "row's group is known: override `jd_instances`, or use a collator that pads instead of packing."
        )
    return owners, instances, in_parts


def _owners_of_parts(trainer: JDTrainerMixin, cotangents: Sequence[Cotangent], instances: int) -> list[Tensor]:
    """Find the instance of each leading row [N] of the outputs of several calls, each on a part of the batch."""
    outputs = [c.output for c in cotangents]
    owners = None if trainer.jd_backend.shards else trainer.jd_outputs.parts(outputs, instances)
    if owners is None:
        raise ValueError(
            f"The batch has {instances} examples, but the loss reads outputs of {sorted({len(o) for o in outputs})} "
            "rows, whose inputs aren't rows of the batch that follow one another, so no row's example is known: "
            "override `jd_instances`, use a collator that pads, or one that packs and returns `position_ids` that "
            "restart with each example, or choose --jd_objectives batch."
        )
    return owners


def _owners_of_losses(
    trainer: JDTrainerMixin, losses: Mapping[str, Tensor], contents: Contents
) -> tuple[list[Tensor], int]:
    """Find the instance of each leading row, or token, of unreduced losses; and B, 1 if all are batch losses.

    Raises:
        ValueError: They can't be assigned to the objectives.
    """
    objectives, kind = trainer.jd_args.jd_objectives, trainer.jd_args.kind
    if len(losses) > 1 and not kind.several:
        raise ValueError(
            f"There are several losses ({listed(losses)}), but --jd_objectives {objectives} "
            "takes one: add them up in `compute_losses`, or choose `loss` or `instance_loss`."
        )
    whole = [name for name, values in losses.items() if not values.ndim]
    if whole and kind.of_instances:
        raise ValueError(
            f"{listed(whole)} is one loss for the whole batch, but --jd_objectives {objectives} needs one per "
            "instance [B], or per token [B, T] with a bool tensor of those that count: leave out its last mean or sum, "
            "or choose --jd_objectives loss."
        )
    sizes = {name: len(values) for name, values in losses.items() if values.ndim}
    instances = next(iter(sizes.values()), 1)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The losses have different numbers of instances: {sizes}; give all the same number.")
    if not instances:
        raise ValueError(
            "`compute_losses` returned losses of no instance for a batch that isn't empty: return one loss per "
            "instance [B], or per token [B, T], and count nothing where there is nothing to learn."
        )
    device = next(iter(losses.values())).device
    owner = torch.arange(instances, device=device)
    if contents.documents is not None and sizes:
        owner, instances = contents.documents, int(contents.documents.max()) + 1
    if contents.groups is not None and kind.of_instances and len(contents.groups) != instances:
        raise ValueError(
            f"There are losses of {instances} rows for {len(contents.groups)} examples, so no row's group is known: "
            "use a collator that pads, or one that packs and returns `position_ids` that restart with each example."
        )
    if owner.ndim > 1:
        for name, values in losses.items():
            if values.ndim == 1:
                raise ValueError(
                    f"The loss `{name}` has shape {list(values.shape)}, but rows of the batch hold several documents: "
                    f"give one loss per token, {list(owner.shape)}, or use a collator that pads instead of packing."
                )
    whole = torch.zeros((), dtype=torch.int64, device=device)
    of_tokens = (owners_of_tokens(owner, v) if owner.ndim > 1 and v.ndim else owner for v in losses.values())
    return [owned if v.ndim else whole for v, owned in zip(losses.values(), of_tokens, strict=True)], instances


def owners_of_tokens(documents: Tensor, output: Tensor) -> Tensor:
    """Return the document of each token of an output [B, T, ...], or [B, T - 1, ...] for next tokens.

    Raises:
        ValueError: The output is neither.
    """
    length = output.shape[1] if output.dim() > 1 else 0
    if output.shape[0] != len(documents) or length not in (documents.shape[1], documents.shape[1] - 1):
        raise ValueError(
            f"The batch packs documents in rows of {documents.shape[1]} tokens, but the loss reads an output of shape "
            f"{list(output.shape)}, so no document's part is known: give one loss per token, or use a collator that "
            "pads instead of packing."
        )
    return documents[:, :length]


def _descend_others(trainer: JDTrainerMixin, loss: Tensor) -> None:
    """Add to the `.grad` of parameters that the optimizer trains besides the model's, such as the loss's own."""
    optimizer, trainable = trainer.optimizer, set(trainer.trainable())
    if optimizer is None or not loss.requires_grad or not loss.detach().isfinite():
        return
    every = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for p in every if p.requires_grad and p not in trainable]
    if others:
        gradients = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
        accumulate({p: g for p, g in zip(others, gradients, strict=True) if g is not None})


def _nothing_read(trainer: JDTrainerMixin, outputs: Sequence[Tensor]) -> str:
    shapes = ", ".join(str(list(output.shape)) for output in outputs) or "none"
    return (
        f"The loss of {type(trainer).__name__} does not depend on the model's outputs with a graph (outputs of shapes "
        f"{shapes}), so it can't be split by instance. Usual causes: a loss that runs its own backward pass, or calls "
        "a part of the model past its forward, a model that returns no tensors, or torch.compile, called on a model "
        "whose own loss it then joins with its outputs (use --torch_compile instead). Choose --jd_objectives batch, "
        "which makes each batch one objective, or override `compute_losses`."
    )
