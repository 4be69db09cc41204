"""What: writes TOFU's questions as chats, for `tofu.yaml`: 400 of `forget10`, and 3,600 of `retain90`.

Why:  the parts of TOFU are separate, and a comparison needs one file with a task column. Those to be forgotten come
      nine times, so that both tasks have as many examples.
Run:  python examples/gpu/tofu_data.py data
See:  data/train.jsonl, and data/validation.jsonl with 100 of each task. These are for the curves, and trained on:
      unlearning is judged by what is left of the very examples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset

REPEATED = {"forget10": 9, "retain90": 1}
SYSTEM = "You are a helpful assistant."  # open-unlearning's, with which its models were trained
SHOWN = 100


def main(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {task: chats(task) for task in REPEATED}
    write(folder / "train.jsonl", [row for task, of_task in rows.items() for row in of_task * REPEATED[task]])
    write(folder / "validation.jsonl", [row for of_task in rows.values() for row in of_task[:SHOWN]])


def chats(task: str) -> list[dict[str, Any]]:
    """Load one part of TOFU from the Hub, as chats."""
    parts: Any = load_dataset("locuslab/TOFU", task, split="train")
    roles = ("system", "user", "assistant")
    return [
        {
            "task": task,
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(roles, (SYSTEM, row["question"], row["answer"]), strict=True)
            ],
        }
        for row in parts
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
