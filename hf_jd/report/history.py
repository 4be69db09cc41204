"""A run's files -> what it logged, step by step; also of a run that is under way, or was killed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_FILE = "jd_log.jsonl"
FACTS_FILE = "jd_run.json"
STATE_FILE = "trainer_state.json"

LINES = 8
"""Groups that lines and colours keep apart."""

Series = list[tuple[int, float]]
"""Pairs of a step and a value."""


@dataclass
class History:
    """What a run logged.

    Attributes:
        folder: Of the run.
        source: The file that was read.
        facts: What the run was started with, by the flags' names; empty where that isn't known.
        losses: Training loss per token of each group.
        evaluations: Loss on each evaluation set.
        weights: Share of the weights' sum of each group.
        norms: Norm of each group's row.
        against: Of each group, the share of the steps since the last log that went against it.
        pairs: Mean cosine of the rows of each pair of groups.
        totals: What is logged of all objectives together, by its key.
        steps: The last step that is known.
        max_steps: How many there will be, if that is known.
        finished: Whether the run came to its end.
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
        """Take in one log."""
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
        ValueError: There is no such folder, or nothing was logged in it.
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
    except (OSError, ValueError):  # A run of one's own script has none.
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
            continue  # It isn't there, or was cut off by a kill: an older one may be whole.
        if entries:
            return path, entries
    raise ValueError(
        f"{folder} holds no logs of a run: no {LOG_FILE}, and no {STATE_FILE} in it or in a checkpoint of it. A run "
        "writes them from its first log on (--logging_steps)."
    )


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def current_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines that belong to the latest attempt of the run.

    Above a line that begins a run anew, none does; above one that begins a resumed run, those of earlier steps do.
    Lines that a kill has cut off are left out.
    """
    entries: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        begins = entry.pop("begins", None)
        if begins is not None:
            entries = [past for past in entries if begins == "resumed" and past["step"] < step]
        entries.append(entry)
    return entries


def mean(values: list[float]) -> float:
    """Average the finite values; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def binned(series: Series, edges: list[float]) -> list[float]:
    """Average a series between neighbouring edges; NaN where it has no value."""
    bins: list[list[float]] = [[] for _ in edges[1:]]
    at = 0
    for step, value in sorted(series):
        while at < len(bins) - 1 and step > edges[at + 1]:
            at += 1
        bins[at].append(value)
    return [mean(values) for values in bins]
