"""The loss of a micro-batch, cut where its instances are still apart: where is that, and whose is each row there?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_jd.batches import holds_examples
from hf_jd.collator import EXAMPLES_KEY, GROUP_KEY
from hf_jd.packing import documents_of
from hf_jd.trainer.cotangents import Cotangent, split
from hf_jd.trainer.gradients import accumulate
from hf_jd.trainer.shares import Piece, Shares, Values, sums_of
from hf_jd.trainer.unreduced import LOSS, Unreduced
from hf_jd.trainer.values import known_losses, needs_values, values_of

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


class Whose(NamedTuple):
    """What the batch tells of its instances.

    Attributes:
        groups: [B] the groups' ids, if there are groups.
        examples: B, if it is known.
        documents: [N, T] the document of each token, if rows are packed; see `documents_of`.
        empty: Whether there is no example at all, and another batch stands in, which counts nothing.
    """

    groups: Tensor | None
    examples: int | None
    documents: Tensor | None
    empty: bool = False

    @staticmethod
    def of(batch: Any, packed: str, device: torch.device) -> Whose:
        """Reads a batch as collated; for `packed` see `--jd_packed`."""
        if not holds_examples(batch):
            return Whose(None, None, None, empty=True)
        if not isinstance(batch, Mapping):
            return Whose(None, None, None)
        groups, documents = (
            None if ids is None else ids.to(device) for ids in (batch.get(GROUP_KEY), documents_of(batch, packed))
        )
        counted = groups if groups is not None else batch.get(EXAMPLES_KEY)
        return Whose(groups, None if counted is None else len(counted), documents)


def shares_of(trainer: JDTrainerMixin, loss: Tensor, whose: Whose, scale: float) -> tuple[Shares, list[str]]:
    """Cuts the loss of a micro-batch, which the trainer has just computed.

    Args:
        trainer: Whose outputs and unreduced losses it was computed from.
        loss: [] with a graph, multiplied by the scale.
        whose: What the batch tells.
        scale: That of GradScaler.

    Returns:
        The shares, and the names of the losses.

    Raises:
        ValueError: The loss reads nothing whose instances are known.
    """
    outputs, last = trainer.jd_outputs.take()
    unreduced, trainer.jd_unreduced = trainer.jd_unreduced, None
    _descend_others(trainer, loss)
    if unreduced is not None:
        shares, names = _of_unreduced(trainer, loss, whose, unreduced, scale), list(unreduced.losses)
    else:
        shares, names = _of_outputs(trainer, loss, whose, outputs, last, scale), [LOSS]
    if whose.empty:
        shares.take_out(torch.ones(shares.instances, dtype=torch.bool, device=loss.device))
    return shares, names


def _of_outputs(
    trainer: JDTrainerMixin, loss: Tensor, whose: Whose, outputs: Sequence[Tensor], last: Any, scale: float
) -> Shares:
    known = known_losses(trainer, last, whose.examples, whose.documents)
    cotangents, rest = split(loss, outputs)
    if not cotangents:
        raise ValueError(_nothing_read(trainer, outputs))
    owners, instances = _owners(trainer, cotangents, whose)
    pieces = [Piece(cotangent, owner, 0) for cotangent, owner in zip(cotangents, owners, strict=True)]
    values = None
    if known is not None and len(known[0]) == instances:
        values = values_of(trainer, *known, last, loss.detach() / scale, rest is not None)
    flag = needs_values(trainer) if values is None else None
    if flag is not None:
        raise ValueError(
            f"{flag} needs the value of each objective, and the loss of {type(trainer).__name__} is one for the whole "
            "batch: leave it out, or override `compute_losses` and return unreduced losses."
        )
    if values is None or not trainer.jd_args.own_mean:
        return Shares(pieces, instances, rest=rest, values=values)
    # A group's own mean is of all its losses, however Trainer divides those of each micro-batch.
    factor = values.sums[values.sums.isfinite()].sum() / values.parts[values.parts.isfinite()].sum()
    values = values._replace(parts=values.sums)
    return Shares(pieces, instances, rest=rest, values=values, normalised=False, factor=factor)


def _of_unreduced(trainer: JDTrainerMixin, loss: Tensor, whose: Whose, unreduced: Unreduced, scale: float) -> Shares:
    losses, counted = list(unreduced.losses.values()), list(unreduced.counted.values())
    owners, instances = _owners_of_losses(trainer, unreduced.losses, whose)
    cotangents, rest = split(loss, losses)
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
            f"The losses {', '.join(f'`{name}`' for name in unreduced.losses)} have no graph, so there is nothing to "
            "train: compute them from what the model returns in training."
        )
    sums, counts = sums_of(losses, counted, owners, instances)
    # Each loss counts by its cotangent.
    each = torch.zeros(len(losses), dtype=torch.float64, device=sums.device)
    for (_, gradient), _, k in pieces:
        each[k] = gradient.detach().abs().max() / scale
    values = Values(sums, counts, sums * each)
    return Shares(pieces, instances, len(losses), rest, values, unreduced.normalised, unreduced=True)


def _owners(trainer: JDTrainerMixin, cotangents: Sequence[Cotangent], whose: Whose) -> tuple[list[Tensor], int]:
    """The instance of each leading row [N] of the outputs, or of each token [N, T], -1 for none; and B.

    Raises:
        ValueError: They aren't known.
    """
    if whose.documents is not None:
        owners = [owners_of_tokens(whose.documents, c.output) for c in cotangents]
    else:
        sizes = {len(c.output) for c in cotangents}
        instances = whose.examples or min(sizes)
        if any(n % instances for n in sizes):
            raise ValueError(
                f"The batch has {instances} examples, and the loss reads outputs of {sorted(sizes)} rows, so no row's "
                "example is known: override `jd_instances`, use a collator that pads, or one that packs and returns "
                "`position_ids` that restart with each example, or choose --jd_objectives batch."
            )
        owners = [trainer.jd_instances(c.output, instances).to(c.output.device) for c in cotangents]
    instances = 1 + max(int(owner.max()) for owner in owners)
    if whose.groups is not None and len(whose.groups) != instances:
        raise ValueError(
            f"The loss reads outputs of {instances} examples, and the batch has {len(whose.groups)} groups, so no "
            "row's group is known: override `jd_instances`, or use a collator that pads instead of packing."
        )
    return owners, instances


def _owners_of_losses(trainer: JDTrainerMixin, losses: Mapping[str, Tensor], whose: Whose) -> tuple[list[Tensor], int]:
    """The instance of each leading row, or token, of unreduced losses; and B, 1 where all are of the whole batch.

    Raises:
        ValueError: They can't be divided among the objectives asked for.
    """
    asked, kind = trainer.jd_args.jd_objectives, trainer.jd_args.kind
    if len(losses) > 1 and not kind.several:
        raise ValueError(
            f"There are several losses ({', '.join(f'`{name}`' for name in losses)}), and --jd_objectives {asked} "
            "takes one: add them up in `compute_losses`, or choose `loss` or `instance_loss`."
        )
    whole = [f"`{name}`" for name, values in losses.items() if not values.ndim]
    if whole and kind.of_instances:
        raise ValueError(
            f"{', '.join(whole)} is one loss for the whole batch, and --jd_objectives {asked} needs one for each "
            "instance [B], or for each token [B, T] with a bool tensor of those that count: leave out its last "
            "mean or sum, or choose --jd_objectives loss."
        )
    sizes = {name: len(values) for name, values in losses.items() if values.ndim}
    instances = next(iter(sizes.values()), 1)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The losses are those of different numbers of instances: {sizes}; give each one the same.")
    if not instances:
        raise ValueError(
            "`compute_losses` returned losses of no instance for a batch that isn't empty: return one loss for "
            "each instance [B], or for each token [B, T], with nothing counted where there is nothing to learn."
        )
    device = next(iter(losses.values())).device
    owner = torch.arange(instances, device=device)
    if whose.documents is not None and sizes:
        owner, instances = whose.documents, int(whose.documents.max()) + 1
    if whose.groups is not None and kind.of_instances and len(whose.groups) != instances:
        raise ValueError(
            f"There are losses of {instances} rows for {len(whose.groups)} examples, so no row's group is known: use a "
            "collator that pads, or one that packs and returns `position_ids` that restart with each example."
        )
    if owner.ndim > 1:
        for name, values in losses.items():
            if values.ndim == 1:
                raise ValueError(
                    f"The loss `{name}` has shape {list(values.shape)}, and the batch has rows of several documents: "
                    f"give one loss per token, {list(owner.shape)}, or use a collator that pads instead of packing."
                )
    whole = torch.zeros((), dtype=torch.int64, device=device)
    of_tokens = (owners_of_tokens(owner, v) if owner.ndim > 1 and v.ndim else owner for v in losses.values())
    return [mine if v.ndim else whole for v, mine in zip(losses.values(), of_tokens, strict=True)], instances


def owners_of_tokens(documents: Tensor, output: Tensor) -> Tensor:
    """The document of each token of an output [B, T, ...] or [B, T - 1, ...], which predicts the next tokens.

    Raises:
        ValueError: The output is neither.
    """
    length = output.shape[1] if output.dim() > 1 else 0
    if output.shape[0] != len(documents) or length not in (documents.shape[1], documents.shape[1] - 1):
        raise ValueError(
            f"The batch packs documents in rows of {documents.shape[1]} tokens, and the loss reads an output of shape "
            f"{list(output.shape)}, so no document's part is known: give one loss per token, or use a collator that "
            "pads instead of packing."
        )
    return documents[:, :length]


def _descend_others(trainer: JDTrainerMixin, loss: Tensor) -> None:
    """Adds to `.grad` of what the optimizer trains beside the model: a loss may have parameters of its own."""
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
        f"The loss of {type(trainer).__name__} does not depend on what the model returned with a graph "
        f"(outputs of shapes {shapes}), so it can't be split by instance. Usual causes: a loss that runs its own "
        "backward pass, that calls a part of the model past its forward, or a model that returns no tensors. "
        "Choose --jd_objectives batch, which takes each batch as one objective, or override `compute_losses`."
    )
