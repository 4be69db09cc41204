"""A run's files -> its logs, step by step, even if it is still running or was killed."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_FILE = "jd_log.jsonl"
FACTS_FILE = "jd_run.json"
STATE_FILE = "trainer_state.json"

LINES = 8
"""The most groups that lines and colours can tell apart."""

Series = list[tuple[int, float]]
"""Pairs of a step and a value."""


@dataclass
class History:
    """The logs of a run.

    Attributes:
        folder: The run's folder.
        source: The file that was read.
        facts: The flags that the run was started with, by name; empty if unknown.
        losses: Each group's training loss: per token, or per instance for pairs and classes.
        evaluations: The loss on each evaluation set.
        weights: Each group's share of the weights' sum.
        norms: The norm of each group's row.
        against: For each group, the share of the steps since the last log that went against it.
        pairs: The mean cosine of the rows of each pair of groups.
        totals: Metrics of all objectives together, by key.
        steps: The last logged step.
        max_steps: The total number of steps, if known.
        finished: Whether the run has finished.
    """

    folder: Path
    source: Path
    facts: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Series] = field(default_factory=dict)
    evaluations: dict[str, Series] = field(default_factory=dict)
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

    def add(self, entry: dict[str, Any]) -> None:
        """Add one log."""
        step = entry.get("step", 0)
        self.steps = max(self.steps, step)
        self.max_steps = entry.get("max_steps", self.max_steps)
        self.finished = self.finished or "train_runtime" in entry
        for key, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._put(key, step, float(value))
        pairs = entry.get("pairs")
        if pairs:
            names, cosines = pairs["names"], iter(pairs["cosines"])
            for i, a in enumerate(names):
                for b, cosine in zip(names[i + 1 :], cosines, strict=False):
                    if cosine is not None:
                        first, second = sorted((a, b))
                        self.pairs.setdefault((first, second), []).append((step, cosine))

    def _put(self, key: str, step: int, value: float) -> None:
        by_group = {"loss": self.losses, "weight": self.weights, "grad_norm": self.norms, "against": self.against}
        kind, _, group = key.removeprefix("jd/").partition("/")
        if key.startswith("jd/") and group:
            if kind in by_group:
                by_group[kind].setdefault(group, []).append((step, value))
        elif key.startswith("eval_") and key.endswith("_loss"):
            self.evaluations.setdefault(key[5:-5] or "all", []).append((step, value))
        elif key.startswith("jd/") or key in ("loss", "grad_norm", "learning_rate"):
            self.totals.setdefault(key, []).append((step, value))


def read_history(folder: Path) -> History:
    """Read a run's folder: its `jd_log.jsonl`, or else the state that Trainer saved last.

    Raises:
        ValueError: There is no such folder, or it has no logs.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file." if folder.exists() else f"There is no folder {folder}.")
    source, entries = _logs(folder)
    history = History(folder, source, _facts(folder))
    for entry in entries:
        history.add(entry)
    return history


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS_FILE).read_text("utf-8"))
    except (OSError, ValueError):  # A run started by a user's own script has none.
        return {}
    return facts if isinstance(facts, dict) else {}


def _logs(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    log = folder / LOG_FILE
    if log.is_file() and (entries := current_lines(log.read_text("utf-8", errors="replace"))):
        return log, entries
    checkpoints = sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)
    for path in (place / STATE_FILE for place in (folder, *checkpoints)):
        try:
            state = json.loads(path.read_text("utf-8"))
            entries = [{**entry, "max_steps": state.get("max_steps")} for entry in state["log_history"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # It is missing, or truncated by a kill: an older one may be complete.
        if entries:
            return path, entries
    raise ValueError(
        f"{folder} holds no logs of a run: it has no {LOG_FILE}, and no {STATE_FILE}, not even in a checkpoint. A run "
        "writes them from its first log on (--logging_steps)."
    )


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


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


def binned(series: Series, edges: list[float]) -> list[float]:
    """Average a series between neighbouring edges; NaN where it has no value."""
    bins: list[Series] = [[] for _ in edges[1:]]
    for step, value in series:
        at = bisect_left(edges, step, lo=1, hi=len(edges) - 1)  # the bin's right edge
        bins[at - 1].append((step, value))
    return [mean(points) for points in bins]
