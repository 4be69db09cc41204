"""What rewards as objectives cost: forward and backward of a GRPO update, beside TRL's own and one backward per reward.

The embedded model with LoRA has eight completions of each of four prompts and K rewards of different scales. The
completions are generated once and the parameters stay, so that every update is on-policy. The ways alternate on one
thread; each time is the median over rounds, and each ratio the median of the round's own.

    python scripts/benchmark.py rewards                 the table: K = 2, 8
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from hf_jd.finetune.example import example_path

WORDS = ("happy", "sad", "mom", "dog", "tree", "ball", "play", "friend")
PROMPTS = ("Once upon a time", "One day, a boy named Tom", "Mom and Ben", "There was a big dog")


def reward(word: str, scale: float) -> Callable[..., list[float]]:
    """Return the reward function for a word, with random numbers that keep it from being constant."""

    def score(completions: list[str], **columns: Any) -> list[float]:
        return [scale * (text.count(word) + torch.rand(()).item()) for text in completions]

    score.__name__ = word
    return score


def trainer_of(ours: bool, rewards: int, completions: int, folder: str) -> Any:
    """Build TRL's trainer or ours, after one update, which includes the self-check."""
    from trl import GRPOConfig, GRPOTrainer

    from hf_jd import JDGRPOConfig, JDGRPOTrainer

    set_seed(0)
    path = example_path("stories15m")
    flags: dict[str, Any] = {"output_dir": folder, "max_steps": 1, "report_to": "none", "save_strategy": "no"}
    flags |= {"disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    flags |= {"per_device_train_batch_size": 8 * len(PROMPTS), "max_completion_length": completions}
    flags |= {"jd_objectives": "reward", "jd_weighting": "upgrad"} if ours else {}
    kinds: tuple[Any, Any] = (JDGRPOTrainer, JDGRPOConfig) if ours else (GRPOTrainer, GRPOConfig)
    trainer = kinds[0](
        model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        args=kinds[1](**flags),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=[reward(word, 10.0**i) for i, word in enumerate(WORDS[:rewards])],
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.train()
    batch = trainer._prepare_inputs([{"prompt": prompt} for prompt in PROMPTS for _ in range(8)])
    trainer._prepare_inputs = lambda inputs: batch
    return trainer


def update(trainer: Any) -> None:
    """Run the trainer's own step: forward, loss and backward."""
    trainer.training_step(trainer.model, trainer._prepare_inputs(None), None)


def backward_per_reward(trainer: Any, rewards: int) -> None:
    """Run TRL's loss on one forward pass, and one backward pass per reward."""
    batch, forward = trainer._prepare_inputs(None), trainer._get_per_token_logps_and_entropies
    outputs: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    trainer._get_per_token_logps_and_entropies = once
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for k in range(rewards):
        advantages = batch["advantages"].roll(k)  # any advantages cost the same
        loss = trainer.compute_loss(trainer.model, batch | {"advantages": advantages})
        torch.autograd.grad(loss, parameters, retain_graph=k + 1 < rewards)
    del trainer._get_per_token_logps_and_entropies


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py rewards", description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", type=int, nargs="+", default=[2, 8], help="numbers of rewards, up to 8")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, with one update of each kind")
    parser.add_argument("--tokens", type=int, default=40, help="tokens per completion")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| rewards | TRL | by reward | / TRL | one backward per reward | / TRL |\n|---|---|---|---|---|---|")
    for rewards in args.rewards:
        with tempfile.TemporaryDirectory() as folder:
            stock, ours = (trainer_of(kind, rewards, args.tokens, folder) for kind in (False, True))
            ways = [lambda: update(stock), lambda: update(ours), lambda: backward_per_reward(stock, rewards)]  # noqa: B023
            seconds = [_timed(ways[:: 1 if i % 2 else -1])[:: 1 if i % 2 else -1] for i in range(args.rounds + 1)][1:]
        times = [statistics.median(column) for column in zip(*seconds, strict=True)]
        ratios = [statistics.median(row[i] / row[0] for row in seconds) for i in (1, 2)]
        cells = [f"{times[0]:.2f} s", f"{times[1]:.2f} s", f"{ratios[0]:.2f}", f"{times[2]:.2f} s", f"{ratios[1]:.2f}"]
        print(f"| {rewards} | {' | '.join(cells)} |", flush=True)


def _timed(ways: Sequence[Callable[[], None]]) -> list[float]:
    seconds = []
    for way in ways:
        begin = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - begin)
    return seconds
