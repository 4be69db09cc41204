"""One update of a Trainer with a loss of its own: micro-batches run as they come, through Trainer's own step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.distributed.gradients import add_gradients
from hf_jd.distributed.processes import anywhere
from hf_jd.gramian.sharding import whole_bytes
from hf_jd.objectives import Objectives
from hf_jd.trainer.gradients import accumulate, added, all_finite
from hf_jd.trainer.kept import Kept, is_full
from hf_jd.trainer.recording import Recorded
from hf_jd.trainer.splitting import SplitRecorder
from hf_jd.trainer.update import Update

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class SplitUpdate(Update):
    """An update whose losses are split at the model's outputs; see `Update`.

    Args:
        trainer: Whose model, arguments and step these are.
        model: The model as Trainer has wrapped it.
        batches: The micro-batches of this process, which `take` is then given one by one.
        alone: Whether they are weighed apart from the other micro-batches and processes.
    """

    recorder: SplitRecorder

    def __init__(self, trainer: JDTrainerMixin, model: nn.Module, batches: list[Any], alone: bool):
        super().__init__(trainer, model, batches, None, alone)
        trainer.jd_loss_names = ["loss"]
        self._measures = trainer.jd_control.measures(trainer.state.global_step)
        self._row_store = Kept(self.kind.shared)
        self._gradients: list[dict[nn.Parameter, Tensor]] = []
        self._seconds = 0.0

    def take(self, batch: Any, step: Callable[[Any], Tensor]) -> Tensor:
        """Runs Trainer's own step on a micro-batch, and keeps its rows, or its gradient where the weights are known.

        Args:
            batch: As collated.
            step: The step, of a batch without the groups' ids.

        Returns:
            What the step returned, for Trainer's log.
        """
        if not self._measures:
            value, gradients = self.recorder.descend(batch, step, self._multipliers())
            self._gradients.append(gradients)
            return value
        start = time.perf_counter()
        value, recorded = self.recorder.record(batch, step)
        self._row_store.add(recorded)
        self._seconds += time.perf_counter() - start
        first = len(self._row_store.recorded) == 1 < len(self.batches)
        if first and self.budget is not None and is_full(self.trainer, self._row_store, len(self.batches), self.budget):
            self.alone = True
            self.weigh_apart()
        return value

    def finish(self) -> None:
        """Adds the update to `.grad`."""
        if not self._measures:
            self._descend()
            return
        weighed = self.weighed(self._row_store, self._seconds)
        if self.trainer.accelerator.scaler is not None and weighed.broken:
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            accumulate({p: torch.full_like(p, torch.inf) for p in self.trainable})
        else:
            accumulate(weighed.rows.weighted_sum(weighed.weights, weighed.usable))
        self.add_extra(weighed.recorded)

    def objectives(self, table: Tensor, own: Tensor, first: Recorded) -> Objectives:
        if self.kind.shared:
            table = torch.cat([table[:, :3], own[:, 3:]], dim=1)  # Groups and names are the same everywhere.
        return Objectives(table, self.jd.own_mean, normalised=True, valued=False)

    def add_extra(self, recorded: list[Recorded]) -> list[Tensor]:
        """Adds what of the losses doesn't come through the model's outputs, over micro-batches and processes."""
        total = added(r.extra.gradients for r in recorded if r.extra is not None)
        if anywhere(self.recorder.has_rest, self.trainer.args.device):
            accumulate(add_gradients(total, self.trainable))
        return []

    def _make_recorder(  # ty: ignore[incompatible-method-override]  # what uses another recorder is overridden, too
        self, num_items: Any, micro_batches: int
    ) -> SplitRecorder:
        return SplitRecorder(self.trainer, self.model, self.present, self._rows_fit())

    def _rows_fit(self) -> bool:
        if self.budget is None:
            return self.jd.keep_rows() is True
        shared = self.kind.shared and self.present is not None
        rows = len(self.present) if shared else len(self.batches) * self.trainer.args.per_device_train_batch_size
        return rows * sum(whole_bytes(p) for p in self.trainable) <= self.budget

    def _multipliers(self) -> Tensor | None:
        """[K] the known weights of the groups over the mean's; None where all are 1."""
        if not self.kind.shared or self.present is None:
            return None
        trainer, step = self.trainer, self.trainer.state.global_step
        known = [trainer.jd_control.multiplier(trainer.group_name(k), step) for k in self.present.tolist()]
        return None if set(known) == {1.0} else torch.tensor(known, device=trainer.args.device)

    def _descend(self) -> None:
        """Adds the gradients of losses whose weights were known; what isn't finite is left out."""
        total = add_gradients(added(self._gradients), self.trainable)
        if self.trainer.accelerator.scaler is not None:
            accumulate(total)
            return
        finite = all_finite(list(total.values()))
        if finite:
            accumulate(total)
        else:
            logger.warning(f"Update {self.trainer.state.global_step + 1}: the gradient isn't finite, and is left out.")
        self.trainer.count_broken(not finite)
