"""What: writes the data of a benchmark of unlearning, for `tofu.yaml` or `wmdp.yaml`.

Why:  what has to be forgotten and what has to be kept are separate sets, and a comparison needs one file with a task
      column. The smaller set is repeated, so that both have as many examples.
Run:  python examples/gpu/unlearning_data.py tofu data
See:  data/train.jsonl, and data/validation.jsonl with 100 examples of each set. These are for the curves, and trained
      on: unlearning is judged by what is left of the very examples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset

SYSTEM = "You are a helpful assistant."  # open-unlearning's, with which its models were trained
SHOWN = 100
LENGTH = 4000  # characters of a document, more than a model reads


def tofu(part: str) -> list[dict[str, Any]]:
    """Load a part of TOFU from the Hub, as chats."""
    rows: Any = load_dataset("locuslab/TOFU", part, split="train")
    roles = ("system", "user", "assistant")
    chats = [zip(roles, (SYSTEM, row["question"], row["answer"]), strict=True) for row in rows]
    return [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]


def wmdp(part: str) -> list[dict[str, Any]]:
    """Load the beginnings of WMDP's documents on computer security, or on harmless parts of it, from the Hub."""
    rows: Any = load_dataset("cais/wmdp-corpora", f"cyber-{part}-corpus", split="train")
    return [{"text": row["text"][:LENGTH]} for row in rows]


BENCHMARKS = {"tofu": (tofu, ("forget10", "retain90")), "wmdp": (wmdp, ("forget", "retain"))}


def main(benchmark: str, folder: Path) -> None:
    """Write both files."""
    load, parts = BENCHMARKS[benchmark]
    folder.mkdir(parents=True, exist_ok=True)
    sets = [[{"task": part, **row} for row in load(part)] for part in parts]
    largest = max(map(len, sets))
    write(folder / "train.jsonl", [row for rows in sets for row in rows * (largest // len(rows))])
    write(folder / "validation.jsonl", [row for rows in sets for row in rows[:SHOWN]])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
