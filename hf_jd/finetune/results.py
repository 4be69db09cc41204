"""A finished run's files -> its measurements by task. Knows neither torch nor transformers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        against: Of each task, 1 where the step went against it and else 0, in pairs likewise. Steps in which a task has
            no example are in neither.
        steps: How many steps were made.
        step_times: Seconds for each step, where they were measured.
        logs: How many times weights and conflicts were logged.
    """

    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    weights: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    against: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    steps: int = 0
    step_times: list[float] = field(default_factory=list)
    logs: int = 0

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Reads a run's folder.

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
        """Takes in a log of training; where it is of several steps, these are taken for one."""
        measured = {name: value for name, value in entry.items() if name.startswith(("jd/weight/", "jd/against/"))}
        self.logs += bool(measured)
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
            found = self.evaluations.setdefault(task, [])
            if not any(evaluation.step == entry["step"] for evaluation in found):
                measured = (entry.get(stem + part, float("nan")) for part in ("accuracy", "majority"))
                found.append(Evaluation(entry["step"], loss, *measured))

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, sorted."""
        return sorted(self.evaluations)

    @property
    def step_time(self) -> float | None:
        """The median of the steps' seconds."""
        return statistics.median(self.step_times) if self.step_times else None

    def mean_weight(self, task: str) -> float | None:
        """A task's share of the weights over all steps, so that the tasks' shares add up to 1."""
        return self._over_steps(self.weights, task)

    def steps_against(self, task: str) -> float | None:
        """How many of the steps went against a task."""
        share = self._over_steps(self.against, task)
        return None if share is None else share * self.steps

    def _over_steps(self, series: dict[str, list[tuple[int, float]]], task: str) -> float | None:
        return sum(value for _, value in series[task]) / self.logs if task in series else None
