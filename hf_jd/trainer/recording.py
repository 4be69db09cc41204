"""One micro-batch: forward -> losses -> objectives -> backward -> rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.collator import GROUP_KEY
from hf_jd.distributed.processes import anywhere
from hf_jd.gramian import Jacobian
from hf_jd.objectives import OBJECTIVES, Part

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Extra(NamedTuple):
    """The part of a micro-batch's loss that no token or instance owns: [] its value, and its gradient."""

    value: Tensor
    gradients: dict[nn.Parameter, Tensor]


class Recorded(NamedTuple):
    """A micro-batch after its first pass."""

    batch: Mapping[str, Any]
    rng_state: list[Tensor]
    """The random numbers of the pass, for a second one."""
    part: Part
    jacobian: Jacobian | None
    broken: Tensor
    """[] how many instances were left out because their loss isn't finite."""
    extra: Extra | None


class Recorder:
    """Records the micro-batches of one update.

    Args:
        trainer: Whose arguments, losses and engine these are.
        model: The model as Trainer has wrapped it.
        num_items: How many tokens Trainer counted in the update, if it did.
        micro_batches: How many micro-batches Trainer averages, where it does.
        present: [K] the sorted ids of the groups that are weighed together; None without a group column.
        materialise: Whether rows are kept as they are, or as the layers' inputs and gradients where those are smaller.
        keep_graph: Whether the graph of the losses is kept, for a second pass.
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
        self.kind = OBJECTIVES[trainer.jd_args.jd_objectives]
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()

    def part(self, batch: Mapping[str, Any], again: bool = False) -> tuple[Part, Tensor | None]:
        """Runs a micro-batch forward: its part in the objectives, and what no instance owns, with a graph."""
        losses, counted, groups, extra = self.trainer.unreduced_losses(self.model, batch, again)
        if groups is None:
            groups = torch.full((len(losses),), -1, device=losses.device)
        if len(groups) != len(losses):
            raise ValueError(
                f"There are losses of {len(losses)} rows for {len(groups)} examples, so no row's group is known: use a "
                "collator that pads instead of packing."
            )
        denominator = self.trainer.denominator(losses, counted, self.num_items, self.micro_batches)
        present = groups if self.present is None else self.present
        return self.kind.split(losses, counted, groups, present, denominator), extra

    def record(self, batch: Mapping[str, Any]) -> Recorded:
        """Runs a micro-batch forward, and backward to its rows, which come multiplied by `scale`."""
        engine = self.trainer.engine()
        device, two_pass = self.trainer.args.device, self.trainer.jd_args.jd_backward == "two_pass"
        rng_state = _rng_state(device) if two_pass else []
        jacobian = own = None
        with self.trainer.accelerator.no_sync(self.model):
            part, extra = self.part(batch)
            broken = (~part.finite).sum()
            if broken:
                self._report_instances(batch, part.finite)
            some = bool(broken) and bool(part.finite.any())
            if anywhere(some, device) if engine.sharded else some:
                # NaN times 0 is NaN, in a backward pass too: the others have to be computed without those instances.
                batch = _selected(batch, part.finite) if some else batch
                rng_state = _rng_state(device) if two_pass else []
                part, extra = self.part(batch, again=True)
            if extra is not None and extra.isfinite():
                own = Extra(extra.detach(), engine.gradients(extra * self.scale))
            if part.counts.any():
                jacobian = engine.compute_jacobian(part.losses * self.scale, part.segments, self.materialise)
            else:
                engine.keep_up(part.losses.sum())
        if not self.keep_graph:
            part = replace(part, losses=part.losses.detach())
        return Recorded(batch, rng_state, part, jacobian, broken, own)

    def _report_instances(self, batch: Mapping[str, Any], finite: Tensor) -> None:
        """Logs the instances whose loss isn't finite."""
        step = self.trainer.state.global_step + 1
        for i in (~finite).nonzero().flatten().tolist():
            groups = batch.get(GROUP_KEY)
            named = "" if groups is None else f" (group `{self.trainer.group_name(int(groups[i]))}`)"
            logger.warning(f"Update {step}: instance {i}{named} has a loss that isn't finite, and is left out.")


def _selected(batch: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """The batch with some of its instances only; `keep` [B] (bool)."""

    def of(value: Any) -> Any:
        by_instance = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(keep)
        return value[keep.to(value.device)] if by_instance else value

    return {key: of(value) for key, value in batch.items()}


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]
