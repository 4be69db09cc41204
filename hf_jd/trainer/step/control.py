"""Between G and w: apply the --jd_* flags for preferences, normalisation and skipped updates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_jd.arguments import JDArguments
from hf_jd.contradictions import check_weighting, listed
from hf_jd.trainer.step.weighing import call_weighting
from hf_jd.weighting import Stateful

WEIGHTS_FILE = "jd_weights.json"
"""The file with the last weights, by name, in checkpoints of a run that doesn't weigh at every update."""


class Control:
    """The weighing of an update's objectives, as the flags say.

    Args:
        jd: The flags.
        weighting: Any callable from a Gramian [m, m] to weights [m].
        names: The names of all groups or rewards, if known.

    Attributes:
        last: By the objectives' names, m w_k at the last update that weighed them; 1 is the mean's.
        of_blocks: With `--jd_blocks`, each block's weighting by name: a copy if the weighting has `reset()` or
            `state_dict()`, so that each block has its own memory.

    Raises:
        ValueError: A preference is for no objective, or the weighting can't follow a flag.
    """

    def __init__(self, jd: JDArguments, weighting: Callable[[Tensor], Tensor], names: Sequence[str] | None):
        check_weighting(jd, weighting)
        self.jd = jd
        self.weighting = weighting
        self.preferences = jd.preferences()
        self.last: dict[str, float] = {}
        self.of_blocks: dict[str, Callable[[Tensor], Tensor]] = {}
        if names is not None:
            self._check_preferences(names)

    def weights(
        self, gramian: Tensor, losses: Tensor, names: Sequence[str] | None, block: str | None = None, *, step: int
    ) -> Tensor:
        """Compute the weights [m], float64, of the unscaled rows.

        With D = diag(d) for the scales d of `--jd_normalize`, they are D W(D G D): the update combines scaled rows.

        Args:
            gramian: [m, m].
            losses: [m].
            names: [m] the objectives' names, if they stay the same from step to step.
            block: The name of the Gramian's block of parameters; None: all parameters.
            step: The number of earlier updates.
        """
        m = len(losses)
        if step < self.jd.jd_warmup_steps:
            return torch.full((m,), 1 / m, dtype=torch.float64, device=gramian.device)
        if self.jd.jd_objectives == "loss" and names is not None:
            self._check_preferences(names)
        wanted = [self.preferences.get(name, 1.0) for name in names or []]
        if self.preferences and not any(wanted):
            return torch.zeros(m, dtype=torch.float64, device=gramian.device)
        weighting: Any = self.weighting if block is None else self.of_block(block)
        if self.preferences:
            before, weighting = weighting, replace(weighting, pref_vector=[value / sum(wanted) for value in wanted])
            if isinstance(before, Stateful):
                weighting.remember_as(before)
        scales = self._scales(gramian, losses)
        scaled = scales.outer(scales).to(gramian) * gramian
        weights = scales * call_weighting(weighting, scaled, losses, names)
        if names is not None and self.jd.jd_every > 1:
            self.last |= dict(zip(names, (m * weights).tolist(), strict=True))
        return weights

    def of_block(self, block: str) -> Callable[[Tensor], Tensor]:
        """Return the weighting of a block of parameters, by its name; the first call makes it."""
        if block not in self.of_blocks:
            # Others are shared: copying an object's method would copy the object, too.
            remembers = any(callable(getattr(self.weighting, name, None)) for name in ("reset", "state_dict"))
            self.of_blocks[block] = deepcopy(self.weighting) if remembers else self.weighting
        return self.of_blocks[block]

    def measures(self, step: int) -> bool:
        """Return whether the update after `step` others needs rows, to be weighed or watched."""
        since = step - self.jd.jd_warmup_steps
        if since < 0:
            return False
        if self.jd.jd_monitor_every is not None:
            return since % self.jd.jd_monitor_every == 0
        return since % self.jd.jd_every == 0 or not self.last

    def multiplier(self, name: str, step: int) -> float:
        """Return an objective's c in an update that isn't measured: its last weight over the mean's."""
        return 1.0 if step < self.jd.jd_warmup_steps else self.last.get(name, 1.0)

    def save(self, checkpoint: Path) -> None:
        """Save the last weights to a checkpoint, if later updates need them."""
        if self.jd.jd_every > 1:
            (checkpoint / WEIGHTS_FILE).write_text(json.dumps(self.last), "utf-8")

    def load(self, checkpoint: Path) -> None:
        """Load the last weights from a checkpoint; without them, the next update is measured."""
        file = checkpoint / WEIGHTS_FILE
        self.last = json.loads(file.read_text("utf-8")) if self.jd.jd_every > 1 and file.is_file() else {}

    def _check_preferences(self, names: Sequence[str]) -> None:
        unknown = sorted(set(self.preferences) - set(names))
        if unknown:
            raise ValueError(
                f"--jd_preferences names {listed(unknown)}, which is no objective; the objectives are {listed(names)}."
            )

    def _scales(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Return d [m], float64, the factors of `--jd_normalize`; 1 for a zero row or loss."""
        sizes = {
            "none": torch.ones_like(losses),
            "rows": gramian.diagonal().clamp(min=0).sqrt(),
            "loss": losses.abs(),
        }[self.jd.jd_normalize]
        sizes = sizes.to(gramian.device, torch.float64)
        return 1 / torch.where(sizes > 0, sizes, 1)
