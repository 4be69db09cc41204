from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_jd.cli import main

ROWS = [
    {"task": task, "prompt": prompt, "completion": completion}
    for task, prompt, completion in [
        ("story", "", "Once upon a time, there was a little girl."),
        ("story", "", "One day, Tom went to the park with his mom."),
        ("sum", "1 + 2 =", " 3"),
        ("sum", "2 + 2 =", " 4"),
        ("sum", "3 + 2 =", " 5"),
        ("story", "", "Lily was very sad. She wanted to play."),
        ("sum", "1 + 1 =", " 2"),
        ("story", "", "The sun was hot, and the cat was big."),
    ]
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", ROWS)


@pytest.fixture(scope="session")
def finetune(train_file: Path) -> Callable[..., Path]:
    """Run `hf-jd finetune` for two steps; return the run's folder."""

    def run(folder: Path, *flags: str, config: Path | None = None) -> Path:
        common = ["--train_file", str(train_file), "--task_column", "task", "--output_dir", str(folder)]
        sizes = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--max_length", "16"]
        quiet = ["--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-3"]
        first = [] if config is None else [str(config)]
        assert main(["finetune", *first, *common, *sizes, *quiet, *flags]) == 0
        return folder

    return run
