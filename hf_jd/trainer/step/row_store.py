"""Store the rows of an update's micro-batches, summed or side by side, within a limit of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from hf_jd.distributed.processes import add_over_processes
from hf_jd.gramian import Jacobian
from hf_jd.objectives import ObjectiveTable
from hf_jd.trainer.step.backward import Recorded

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


class RowStore:
    """The rows of the micro-batches of this process.

    Args:
        shared: Whether micro-batches contribute to the same objectives: then there are as many rows as objectives,
            whatever the accumulation. Otherwise each has its own.
    """

    def __init__(self, shared: bool):
        self.shared = shared
        self.recorded: list[Recorded] = []
        self._jacobians: list[Jacobian] = []

    @property
    def nbytes(self) -> int:
        """The bytes of the rows, or of the layers' inputs and gradients that stand for them."""
        return sum(jacobian.nbytes for jacobian in self._jacobians)

    def add(self, recorded: Recorded) -> None:
        """Add one more micro-batch."""
        jacobian = recorded.jacobian
        self.recorded.append(recorded._replace(jacobian=None))
        if jacobian is not None and self.shared and self._jacobians:
            jacobian = self._jacobians.pop() + jacobian
        if jacobian is not None:
            self._jacobians.append(jacobian)

    def joined(self) -> tuple[ObjectiveTable, Jacobian | None]:
        """Return the table of the objectives of all micro-batches, and their rows."""
        tables = [recorded.table for recorded in self.recorded]
        table = ObjectiveTable.added(tables) if self.shared else ObjectiveTable.cat(tables)
        return table, Jacobian.cat(self._jacobians) if self._jacobians else None


def allowed(trainer: JDTrainerMixin) -> int | None:
    """Return the bytes that `--jd_keep_rows` allows for an update's rows; None for any number."""
    keep, device = trainer.jd_args.keep_rows(), trainer.args.device
    if keep == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return free // 2
    return None if isinstance(keep, bool) else int(keep)


def is_full(trainer: JDTrainerMixin, store: RowStore, micro_batches: int, budget: int) -> bool:
    """Predict from the first micro-batch whether the rows of all won't fit; the same on all processes.

    Raises:
        ValueError: They won't fit, and `--jd_when_full` is `error`.
    """
    expected = store.nbytes * (1 if store.shared else micro_batches)
    full = bool(add_over_processes(torch.tensor(float(expected > budget), device=trainer.args.device)))
    if full and trainer.jd_args.jd_when_full == "error":
        raise ValueError(
            f"The rows of the {micro_batches} micro-batches of an update take about {expected / 1e9:.3g} GB, but "
            f"--jd_keep_rows {trainer.jd_args.jd_keep_rows} allows {budget / 1e9:.3g} GB: accumulate fewer, allow "
            "more, choose --jd_objectives group, or weigh each micro-batch separately, which is a different algorithm, "
            "with --jd_when_full micro_batch."
        )
    return full
