"""A finished run's files -> its measurements by task. Knows neither torch nor transformers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_jd.report.history import mean

STATE = "trainer_state.json"
STEP_TIMES = "step_times.json"
"""The file of a run's seconds for each step."""
ALL = "all"
"""The name of the only task, where the run knows none."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one task.

    Attributes:
        step: The optimizer step after which it was made; 0 is before training.
        loss: Per token.
        accuracy: Share of the tokens that are predicted right, in [0, 1].
        majority: The accuracy of always answering the most frequent token.
    """

    step: int
    loss: float
    accuracy: float
    majority: float


@dataclass
class Results:
    """What a run measured.

    Attributes:
        evaluations: Those of each task, by step.
        weights: Of each task, its share of the weights' sum, as pairs of step and share.
        against: Of each task, the share of the steps since the last log that went against it, in pairs likewise. Steps
            in which a task has no example, or that weren't measured, are in neither.
        steps: How many steps were made.
        step_times: Seconds for each step, where they were measured.
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
            ValueError: It holds no finished run.
        """
        try:
            state = json.loads((folder / STATE).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{folder} holds no finished run: it has no {STATE}.") from error
        results = cls.of_log(state["log_history"], state["global_step"])
        times = folder / STEP_TIMES
        if times.exists():
            results.step_times = json.loads(times.read_text("utf-8"))
        return results

    @classmethod
    def of_log(cls, log: Iterable[dict[str, Any]], steps: int) -> Results:
        """Read what Trainer logged in so many steps."""
        results = cls(steps=steps)
        for entry in log:
            results._add_evaluations(entry)
            results._add_step(entry)
        return results

    def _add_step(self, entry: dict[str, Any]) -> None:
        """Take in a log of training."""
        measured = {name: value for name, value in entry.items() if name.startswith(("jd/weight/", "jd/against/"))}
        for name, value in measured.items():
            kind, task = name.removeprefix("jd/").split("/", 1)
            series = self.weights if kind == "weight" else self.against
            series.setdefault(task, []).append((entry["step"], value))

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
        """Return a task's share of the weights, averaged over the logs of steps in which it had examples."""
        return mean([value for _, value in self.weights[task]]) if task in self.weights else None

    def share_against(self, task: str) -> float | None:
        """Return the share of the measured steps that went against a task, averaged likewise."""
        return mean([value for _, value in self.against[task]]) if task in self.against else None

    def steps_against(self, task: str) -> float | None:
        """Return how many of the measured steps went against a task, of a run that logged every step."""
        return sum(value for _, value in self.against[task]) if task in self.against else None
