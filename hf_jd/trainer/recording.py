"""One micro-batch: forward -> losses -> objectives -> backward -> rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.batches import group_ids, holds_examples, selected, stand_in
from hf_jd.distributed.processes import anywhere, process_count
from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState, random_state
from hf_jd.objectives import Loss, Part, by_loss
from hf_jd.packing import by_document, by_token, documents_of

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Extra(NamedTuple):
    """The part of a micro-batch's loss that no token or instance owns, and no weighting sees.

    Attributes:
        value: [].
        gradients: Its gradient.
    """

    value: Tensor
    gradients: dict[nn.Parameter, Tensor]


class Recorded(NamedTuple):
    """A micro-batch after its first pass.

    Attributes:
        batch: The micro-batch.
        random_state: Where the random streams stood before the pass, for a second one; None where there can be none.
        parts: Its objectives.
        jacobian: Their rows, multiplied by the scale of GradScaler; None where there are none.
        broken: [] how many instances and losses of the whole batch were left out because they aren't finite.
        extra: What no weighting sees.
    """

    batch: Mapping[str, Any]
    random_state: RandomState | None
    parts: list[Part]
    jacobian: Jacobian | None
    broken: Tensor
    extra: Extra | None

    @property
    def losses(self) -> Tensor:
        """[m]."""
        return torch.cat([part.losses for part in self.parts])

    def table(self) -> Tensor:
        """[m, 5]; see `Part.table`."""
        return torch.cat([part.table() for part in self.parts])


class Recorder:
    """Records the micro-batches of one update.

    Args:
        trainer: Whose arguments, losses and engine these are.
        model: The model to measure on; see `measured_model`.
        num_items: How many tokens Trainer counted in the update, if it did.
        micro_batches: How many micro-batches Trainer averages, where it does.
        present: [K] the sorted ids of the groups that are weighed together; None without a group column.
        materialise: Whether rows are kept as they are, or as the layers' inputs and gradients where those are smaller.
        keep_graph: Whether the graph of the losses is kept, for a second pass.

    Attributes:
        again: Whether all micro-batches have been met in this update before.
    """

    def __init__(
        self,
        trainer: JDTrainerMixin,
        model: nn.Module,
        num_items: Any,
        micro_batches: int,
        present: Tensor | None,
        materialise: bool,
        keep_graph: bool,
    ):
        self.trainer = trainer
        self.model = model
        self.num_items = num_items
        self.micro_batches = micro_batches
        self.present = present
        self.materialise = materialise
        self.keep_graph = keep_graph
        self.kind = trainer.jd_args.kind
        self.again = False
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()

    def parts(
        self, batch: Mapping[str, Any], again: bool = False, model: nn.Module | None = None
    ) -> tuple[list[Part], Tensor | None]:
        """Runs a micro-batch forward: its objectives, and what is in none of them, with a graph.

        Args:
            batch: The micro-batch.
            again: Whether it has been met in this update before.
            model: The one to run instead: DeepSpeed's engine, in a second pass.
        """
        trainer, empty = self.trainer, not holds_examples(batch)
        batch = stand_in(batch) if empty else batch
        losses, counted, groups, extra = trainer.unreduced_losses(model or self.model, batch, again or self.again)
        if empty:
            counted, extra = {name: torch.zeros_like(found) for name, found in counted.items()}, None
        documents = documents_of(batch, self.trainer.jd_args.jd_packed)
        if documents is not None:
            documents = documents.to(trainer.args.device)
            losses, counted = (by_document(tokens, documents) for tokens in (losses, counted))
        instances = self._instances(losses, groups, empty)
        if groups is None or len(groups) != instances:
            groups = torch.full((instances,), -1, device=trainer.args.device)
        present = groups if self.present is None else self.present
        divide_by = trainer.denominators(losses, counted, self.num_items, self.micro_batches)
        named = [
            Loss(values, counted[name], None if divide_by is None else divide_by[name])
            for name, values in losses.items()
        ]
        wholes = []
        if trainer.jd_args.jd_extra_losses == "objective":
            found = torch.tensor(extra is not None, device=groups.device)
            known = None if divide_by is None else self.micro_batches * process_count()
            value = torch.zeros((), device=groups.device) if extra is None else extra
            wholes, extra = [Loss(value, found, known if known is None else torch.full_like(value, known))], None
        if self.kind.of_instances:
            parts = [self.kind.split(named, groups, present)]
            parts += [by_loss(wholes, groups, present, first=len(named))] if wholes else []
        else:
            parts = [self.kind.split([*named, *wholes], groups, present)]
        trainer.keep_loss_names(list(losses), bool(wholes), bool(parts[0].counts.any()))
        if documents is not None:
            parts = [replace(part, segments=by_token(part.segments, documents)) for part in parts]
        return parts, extra

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        """Runs a micro-batch forward, and backward to its rows."""
        engine = self.trainer.engine()
        device = self.trainer.args.device
        state, own = random_state(device), None
        with self.trainer.accelerator.no_sync(self.model):
            parts, extra = self.parts(batch)
            finite = parts[0].finite
            broken = (~finite).sum() + sum(part.broken for part in parts)
            if not finite.all():
                self._report_instances(batch, finite)
            some = bool(finite.any()) and not finite.all()
            if anywhere(some, device) if engine.sharded else some:
                # NaN times 0 is NaN, in a backward pass too: the others have to be computed without those instances.
                batch = selected(batch, finite, documents_of(batch, self.trainer.jd_args.jd_packed)) if some else batch
                state = random_state(device)
                parts, extra = self.parts(batch, again=True)
            if extra is not None and extra.isfinite():
                # DeepSpeed descends it in its own pass.
                skipped = self.trainer.is_deepspeed_enabled
                own = Extra(extra.detach(), {} if skipped else engine.gradients(extra * self.scale))
            rows = [self._rows(part, self.keep_graph or part is not parts[-1]) for part in parts]
        if not self.keep_graph:
            parts = [part.detached() for part in parts]
        found = [part for part in rows if part is not None]
        return Recorded(batch, state, parts, Jacobian.cat(found) if found else None, broken, own)

    def _rows(self, part: Part, retain_graph: bool) -> Jacobian | None:
        engine = self.trainer.engine()
        if part.counts.any():
            return engine.compute_jacobian(part.matrix() * self.scale, part.segments, self.materialise, retain_graph)
        engine.keep_up(part.losses.sum())
        return Jacobian(dict.fromkeys(self.trainer.trainable()), len(part.losses)) if len(part.losses) else None

    def _instances(self, losses: Mapping[str, Tensor], groups: Tensor | None, empty: bool) -> int:
        """How many instances a micro-batch has: as many as it has losses; losses of the whole batch are of one.

        Raises:
            ValueError: Its losses can't be divided among the objectives asked for, or there is none.
        """
        asked = self.trainer.jd_args.jd_objectives
        if len(losses) > 1 and not self.kind.several:
            raise ValueError(
                f"There are several losses ({', '.join(f'`{name}`' for name in losses)}), and --jd_objectives {asked} "
                "takes one: add them up in `compute_losses`, or choose `loss` or `instance_loss`."
            )
        whole = [f"`{name}`" for name, values in losses.items() if not values.ndim]
        if whole and self.kind.of_instances:
            raise ValueError(
                f"{', '.join(whole)} is one loss for the whole batch, and --jd_objectives {asked} needs one for each "
                "instance [B], or for each token [B, T] with a bool tensor of those that count: leave out its last "
                "mean or sum, or choose --jd_objectives loss."
            )
        found = {name: len(values) for name, values in losses.items() if values.ndim}
        if not found:
            return 1
        instances = next(iter(found.values()))
        if len(set(found.values())) > 1:
            raise ValueError(
                f"The losses are those of different numbers of instances: {found}; give each one the same."
            )
        if not instances and not empty:
            raise ValueError(
                "`compute_losses` returned losses of no instance for a batch that isn't empty: return one loss for "
                "each instance [B], or for each token [B, T], with nothing counted where there is nothing to learn."
            )
        if groups is not None and len(groups) != instances:
            raise ValueError(
                f"There are losses of {instances} rows for {len(groups)} examples, so no row's group is known: use a "
                "collator that pads, or one that packs and returns `position_ids` that restart with each example."
            )
        return instances

    def _report_instances(self, batch: Mapping[str, Any], finite: Tensor) -> None:
        """Logs the instances whose loss isn't finite."""
        step = self.trainer.state.global_step + 1
        for i in (~finite).nonzero().flatten().tolist():
            groups = group_ids(batch)
            named = "" if groups is None else f" (group `{self.trainer.group_name(int(groups[i]))}`)"
            logger.warning(f"Update {step}: instance {i}{named} has a loss that isn't finite, and is left out.")
