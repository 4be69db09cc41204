"""Made-up logs of runs, with any number of groups and known values."""

from __future__ import annotations

import json
import math
from pathlib import Path

FORTY = [f"task {i:02d} of <many> & $x^$ {'y' * (i % 30)}" for i in range(40)]


def entry(step: int, groups: list[str], **more) -> dict:
    """Return one log: the loss of group k is (k + 1) / step, and its cosine with group l is -1 / (k + l)."""
    found = {"step": step, "loss": 10 / step, "jd/conflicts": 0.25, "jd/grad_norm": 1.0, "max_steps": 100}
    for k, name in enumerate(groups):
        found |= {f"jd/loss/{name}": (k + 1) / step, f"jd/weight/{name}": 1 / len(groups)}
        found |= {f"jd/grad_norm/{name}": k + 0.5, f"jd/against/{name}": float(k == 1)}
    if len(groups) > 1:
        cosines = [-1 / (k + m) for k in range(len(groups)) for m in range(k + 1, len(groups))]
        found["pairs"] = {"names": groups, "cosines": cosines}
    return {**found, **more}


def write_log(folder: Path, entries: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(one) + "\n" for one in entries)
    (folder / "jd_log.jsonl").write_text(lines, "utf-8")
    return folder


def write_run(folder: Path, groups: list[str], steps: int = 12, finished: bool = True) -> Path:
    entries = [entry(step, groups) for step in range(1, steps + 1)]
    entries[0]["begins"] = "anew"
    if steps > 5 and groups:
        entries[4][f"jd/loss/{groups[0]}"] = math.nan
        entries[5][f"eval_{groups[0]}_loss"] = 0.5
    return write_log(folder, [*entries, {"step": steps, "train_runtime": 1.0}] if finished else entries)
