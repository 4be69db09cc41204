"""A run's files -> its logs, step by step, even if it is still running or was killed."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

LOG_FILE = "jd_log.jsonl"
FACTS_FILE = "jd_run.json"
STATE_FILE = "trainer_state.json"
STEP_TIME = "step_time"
"""The metric with the seconds of a step."""

Series = list[tuple[int, float]]
"""Pairs of a step and a value."""

ALL = "all"
"""The task of a run without tasks."""


@dataclass
class History:
    """The logs of a run.

    Attributes:
        folder: The run's folder.
        source: The file that was read.
        facts: The flags that the run was started with, by name; empty if unknown.
        losses: Each group's training loss: per token, or per instance for pairs and classes.
        evaluations: The loss on each evaluation set, by its task; `ALL` if there is one set.
        accuracies: The share of its tokens that are predicted correctly, in [0, 1].
        majorities: The accuracy of always answering its most frequent token.
        weights: Each group's share of the weights' sum.
        norms: The norm of each group's row.
        against: For each group, the share of the steps since the last log that went against it.
        pairs: The mean cosine of the rows of each pair of groups.
        totals: Metrics of all objectives together, by key.
        steps: The last logged step.
        max_steps: The total number of steps, if known.
        finished: Whether the run has finished.
    """

    folder: Path = Path()
    source: Path = Path()
    facts: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Series] = field(default_factory=dict)
    evaluations: dict[str, Series] = field(default_factory=dict)
    accuracies: dict[str, Series] = field(default_factory=dict)
    majorities: dict[str, Series] = field(default_factory=dict)
    weights: dict[str, Series] = field(default_factory=dict)
    norms: dict[str, Series] = field(default_factory=dict)
    against: dict[str, Series] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Series] = field(default_factory=dict)
    totals: dict[str, Series] = field(default_factory=dict)
    steps: int = 0
    max_steps: int | None = None
    finished: bool = False

    @property
    def groups(self) -> list[str]:
        """The groups' names, sorted."""
        return sorted({*self.losses, *self.weights, *self.norms})

    @property
    def tasks(self) -> list[str]:
        """The evaluated tasks' names, sorted."""
        return sorted(self.evaluations)

    @property
    def worst(self) -> tuple[str, float]:
        """The group that the largest share of steps went against, and that share; "" and 0 if none was measured."""
        shares = [(mean(series), name) for name, series in self.against.items()]
        return max(shares, default=(0.0, ""))[::-1]

    def add(self, *entries: dict[str, Any]) -> History:
        """Add logs; return this history."""
        for entry in entries:
            self._add(entry)
        return self

    def _add(self, entry: dict[str, Any]) -> None:
        step = entry.get("step", 0)
        self.steps = max(self.steps, step)
        self.max_steps = entry.get("max_steps", self.max_steps)
        self.finished = self.finished or "train_runtime" in entry
        for key, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                series = self._series(key)
                if not series or series[-1][0] != step:  # A resumed run evaluates where it begins, once more.
                    series.append((step, float(value)))
        pairs = entry.get("pairs", {"names": [], "cosines": []})
        for names, cosine in zip(combinations(pairs["names"], 2), pairs["cosines"], strict=False):
            if cosine is not None:
                a, b = sorted(names)
                self.pairs.setdefault((a, b), []).append((step, cosine))

    def by_task(self) -> dict[str, dict[str, Series]]:
        """Return the measurements by what they are, and by task or group."""
        names = ("evaluations", "accuracies", "majorities", "weights", "against", "totals")
        return {name: getattr(self, name) for name in names}

    def _series(self, key: str) -> Series:
        """Return the series of a metric."""
        by_group = {"loss": self.losses, "weight": self.weights, "grad_norm": self.norms, "against": self.against}
        by_task = {"loss": self.evaluations, "accuracy": self.accuracies, "majority": self.majorities}
        kind, _, group = key.removeprefix("jd/").partition("/")
        if key.startswith("jd/") and group and kind in by_group:
            return by_group[kind].setdefault(group, [])
        task, _, kind = key.removeprefix("eval").rpartition("_")
        if key.startswith("eval_") and kind in by_task:
            return by_task[kind].setdefault(task.removeprefix("_") or ALL, [])
        return self.totals.setdefault(key, [])


def read_history(folder: Path) -> History:
    """Read a run's folder: its `jd_log.jsonl`, or else the state that Trainer saved last.

    Raises:
        ValueError: There is no such folder, or it has no logs.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file." if folder.exists() else f"There is no folder {folder}.")
    source, entries = _logs(folder)
    return History(folder, source, read_facts(folder)).add(*entries)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the settings of a run; {} if there are none."""
    with suppress(OSError, ValueError):  # A run started by a user's own script has none.
        return dict(json.loads((folder / FACTS_FILE).read_text("utf-8")))
    return {}


def _logs(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    log = folder / LOG_FILE
    if log.is_file() and (entries := current_lines(log.read_text("utf-8", errors="replace"))):
        return log, entries
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda place: (len(place.name), place.name), reverse=True)
    for path in (place / STATE_FILE for place in (folder, *checkpoints)):
        # It is missing, or truncated by a kill: an older one may be complete.
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text("utf-8"))
            if entries := [{**entry, "max_steps": state.get("max_steps")} for entry in state["log_history"]]:
                return path, entries
    raise ValueError(
        f"{folder} holds no logs of a run: it has no {LOG_FILE}, and no {STATE_FILE}, not even in a checkpoint. A run "
        "writes them from its first log on (--logging_steps)."
    )


def current_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines that belong to the latest attempt of the run.

    A line that begins a new run discards all lines above it; one that begins a resumed run discards those that the run
    repeats: a checkpoint's step may be evaluated again, but isn't trained again. Lines truncated by a kill are skipped.
    """
    entries: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            place = _place(entry)
        except (ValueError, KeyError, TypeError):
            continue
        begins = entry.pop("begins", None)
        if begins is not None:
            entries = [past for past in entries if begins == "resumed" and _place(past) < place]
        entries.append(entry)
    return entries


def _place(entry: dict[str, Any]) -> tuple[int, bool]:
    """Order lines as a run writes them: at the same step, evaluations follow the training log."""
    return int(entry["step"]), "loss" not in entry


def mean(series: Series) -> float:
    """Average a series' finite values; NaN if there is none."""
    finite = [value for _, value in series if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
