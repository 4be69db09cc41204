"""A finished run's files -> its measurements by task. Needs neither torch nor transformers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_jd.report.history import STATE_FILE, mean

STEP_TIMES = "step_times.json"
"""The file with the seconds of each step."""
ALL = "all"
"""The task's name in a run without tasks."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one task.

    Attributes:
        step: The number of optimizer steps before it; 0 is before training.
        loss: Per token.
        accuracy: The share of correctly predicted tokens, in [0, 1].
        majority: The accuracy of always answering the most frequent token.
    """

    step: int
    loss: float
    accuracy: float
    majority: float


@dataclass
class Results:
    """The measurements of a run.

    Attributes:
        evaluations: Each task's evaluations, by step.
        weights: Each task's share of the weights' sum, as pairs of step and share.
        against: For each task, the share of the steps since the last log that went against it, in the same pairs. Both
            leave out steps without examples of the task, and steps that weren't measured.
        steps: The number of steps.
        step_times: The seconds of each step, if measured.
    """

    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    weights: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    against: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    steps: int = 0
    step_times: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read a run's folder.

        Raises:
            ValueError: The folder holds no finished run.
        """
        try:
            state = json.loads((folder / STATE_FILE).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{folder} holds no finished run: it has no {STATE_FILE}.") from error
        results = cls.of_log(state["log_history"], state["global_step"])
        times = folder / STEP_TIMES
        if times.exists():
            results.step_times = json.loads(times.read_text("utf-8"))
        return results

    @classmethod
    def of_log(cls, log: Iterable[dict[str, Any]], steps: int) -> Results:
        """Read Trainer's log of that many steps."""
        results = cls(steps=steps)
        by_kind = {"weight": results.weights, "against": results.against}
        for entry in log:
            results._add_evaluations(entry)
            for name, value in entry.items():
                kind, _, task = name.removeprefix("jd/").partition("/")
                if name.startswith("jd/") and kind in by_kind:
                    by_kind[kind].setdefault(task, []).append((entry["step"], value))
        return results

    def _add_evaluations(self, entry: dict[str, Any]) -> None:
        for name, loss in entry.items():
            if not (name.startswith("eval_") and name.endswith("_loss")):
                continue
            stem = name.removesuffix("loss")
            task = stem.removeprefix("eval_").removesuffix("_") or ALL
            evaluations = self.evaluations.setdefault(task, [])
            if not any(evaluation.step == entry["step"] for evaluation in evaluations):
                measured = (entry.get(stem + part, float("nan")) for part in ("accuracy", "majority"))
                evaluations.append(Evaluation(entry["step"], loss, *measured))

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, sorted."""
        return sorted(self.evaluations)

    @property
    def step_time(self) -> float | None:
        """The median of the steps' seconds."""
        return statistics.median(self.step_times) if self.step_times else None

    def mean_weight(self, task: str) -> float | None:
        """Return a task's mean share of the weights, over the logs with examples of it."""
        return mean(self.weights[task]) if task in self.weights else None

    def share_against(self, task: str) -> float | None:
        """Return the mean share of measured steps that went against a task, over the same logs."""
        return mean(self.against[task]) if task in self.against else None

    def steps_against(self, task: str) -> float | None:
        """Return the number of measured steps that went against a task, for a run that logged every step."""
        return sum(value for _, value in self.against[task]) if task in self.against else None
