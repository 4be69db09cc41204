"""What JDTrainer costs compared with Trainer: LoRA fine-tuning on the same data, in interleaved processes.

Each round runs one process per configuration, one after another. Each process trains the same random Llama, and reports
the time of its steps (the median over blocks of ten, without the first steps, which include the self-check), its peak
resident memory, and how much of that training added. A ratio is the median over rounds of (its number / Trainer's in
the same round).

    python scripts/benchmark.py trainer                 the table: 200 steps
    python scripts/benchmark.py trainer --steps 20 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.metrics import Averages, readable, step_metrics
from hf_jd.trainer.step import backward

VOCABULARY = 1024
BATCH = 16
GROUPS = 4
WARM_UP = 3  # steps that aren't timed: they include the self-check and one-time set-up
GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "Trainer": None,
    f"upgrad, instance (m = {BATCH})": {"jd_weighting": "upgrad"},
    f"upgrad, group (K = {GROUPS})": {"jd_weighting": "upgrad", **GROUP},
    "mean, instance": {"jd_weighting": "mean"},
    f"watched at every 10th update, group (K = {GROUPS})": {"jd_weighting": "mean", "jd_monitor_every": 10, **GROUP},
    f"upgrad at every 10th update, group (K = {GROUPS})": {"jd_weighting": "upgrad", "jd_every": 10, **GROUP},
}
BLOCK = 10  # steps to average before taking the median: some configurations measure only every tenth


def main(argv: list[str] | None = None) -> int:
    """Print the table.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per configuration")
    parser.add_argument("--hidden", type=int, default=256, help="the model's width")
    parser.add_argument("--layers", type=int, default=4, help="the model's layers")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example")
    parser.add_argument("--only", default="", help="only configurations with this text in their names, and Trainer")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP or args.rounds < 1:
        parser.error(f"--steps has to be more than {WARM_UP}, and --rounds at least 1")
    if args.one:
        print(json.dumps(measure(CONFIGURATIONS[args.one], args)))
        return 0
    names = [name for name in CONFIGURATIONS if args.only in name or name == "Trainer"]
    rounds = [{name: _in_a_process(name, args) for name in names} for _ in range(args.rounds)]
    print(table(rounds))
    costs = ", ".join(f"{logging_cost(groups) * 1e3:.2f} ms (K = {groups})" for groups in (GROUPS, 10 * GROUPS))
    print(f"\nLogging a step takes {costs}.")
    return 0


def measure(flags: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, float]:
    """Train one configuration in this process; return the median step in seconds and the memory in bytes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clock = _Clock()
    splitting = _time_splitting()
    with tempfile.TemporaryDirectory() as directory:
        common: dict[str, Any] = {
            "output_dir": directory,
            "per_device_train_batch_size": BATCH,
            "max_steps": args.steps,
        }
        common |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        common |= {"logging_steps": max(args.steps // 4, 1), "dataloader_pin_memory": False}
        model, data = _model(args), _data(args)
        before = psutil.Process().memory_info().rss
        if flags is None:
            trainer = Trainer(model, TrainingArguments(**common), train_dataset=data, callbacks=[clock])
        else:
            trainer = JDTrainer(model, JDTrainingArguments(**common, **flags), train_dataset=data, callbacks=[clock])
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps = clock.steps[WARM_UP:]
    blocks = [statistics.mean(steps[i : i + BLOCK]) for i in range(0, max(len(steps) - BLOCK + 1, 1), BLOCK)]
    split = statistics.median(splitting[WARM_UP:] or [0.0])
    return {"step": statistics.median(blocks), "split": split, "added": peak - before, "peak": peak}


def _time_splitting() -> list[float]:
    """Record the seconds that cutting each micro-batch's loss takes, including the loss's own backward."""
    seconds: list[float] = []
    cut = backward.shares_of

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        shares = cut(*args)
        seconds.append(time.perf_counter() - begin)
        return shares

    backward.shares_of = timed  # ty: ignore[invalid-assignment]
    return seconds


def logging_cost(groups: int, steps: int = 200) -> float:
    """Time a step's metrics, in seconds, with one log every ten steps."""
    rows = torch.randn(groups, 64, dtype=torch.float64)
    names, averages = {k: f"task {k}" for k in range(groups)}, Averages()
    weights, means, counts = torch.rand(3, groups, dtype=torch.float64)
    begin = time.perf_counter()
    for step in range(steps):
        averages.add(step_metrics((rows @ rows.T)[None], weights[None], means, counts, torch.arange(groups), names))
        if step % 10 == 9:
            readable(averages.take())
    return (time.perf_counter() - begin) / steps


class _Clock(TrainerCallback):
    """The time of each step, from its first micro-batch to the end of the optimizer's step."""

    def __init__(self):
        self.steps: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read it."""
        self.steps.append(time.perf_counter() - self.begin)


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Format the rounds as a markdown table."""
    lines = ["| | step [ms] | splitting [ms] | wall / Trainer | peak / Trainer | added / Trainer |", "|---" * 6 + "|"]
    for name in rounds[0]:
        step, split = (statistics.median(costs[name][key] for costs in rounds) * 1e3 for key in ("step", "split"))
        ratios = [
            statistics.median(costs[name][key] / costs["Trainer"][key] for costs in rounds)
            for key in ("step", "peak", "added")
        ]
        lines.append(f"| {name} | {step:.1f} | {split:.1f} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def _in_a_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    options = [f"--{key}={getattr(args, key)}" for key in ("steps", "hidden", "layers", "tokens")]
    script = Path(__file__).parents[1] / "benchmark.py"
    command = [sys.executable, "-W", "ignore", str(script), "trainer", f"--one={name}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _model(args: argparse.Namespace) -> Any:
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 8 // 3, "num_hidden_layers": args.layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, max_position_embeddings=args.tokens))
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _data(args: argparse.Namespace) -> Any:
    ids = torch.randint(0, VOCABULARY, (8 * BATCH, args.tokens)).tolist()
    return [{"input_ids": row, "labels": row, "task": f"task {i % GROUPS}"} for i, row in enumerate(ids)]


if __name__ == "__main__":
    sys.exit(main())
