"""Train the same policy on several rewards with several methods, inside TRL's GRPOTrainer, and compare the rewards.

python scripts/compare_rewards.py examples/rewards.yaml --output_dir runs/rewards --seeds 0 1 --methods upgrad mgda

A reward's measure is its mean over new completions, minus its mean before training, in standard deviations before
training. Results are one line per run in `results.jsonl`; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from studies.reward_functions import WORD, WRITTEN, Reward, fluency, named, word
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

REFERENCE = -3.0
"""The change of a reward, in standard deviations, at which a method's hypervolume is 0."""

MEASURES = ("worst", "improved", "hypervolume")
"""What the table shows of each run's `summary`."""

WIDE = 8
"""The largest number of rewards for which the table has one column each."""


class Setting:
    """The setting that all runs share.

    Args:
        plan: The contents of the YAML file.
    """

    def __init__(self, plan: dict[str, Any]):
        self.plan = plan
        self.tokenizer: Any = AutoTokenizer.from_pretrained(plan["model"])
        self.base = AutoModelForCausalLM.from_pretrained(plan["model"], dtype="float32").eval()
        functions: dict[str, Reward] = {f.__name__: f for f in WRITTEN}
        functions["fluency"] = fluency(self.base, self.tokenizer)
        functions |= {name: word(name[len(WORD) :]) for name in plan["rewards"] if name.startswith(WORD)}
        unknown = sorted(set(plan["rewards"]) - set(functions))
        if unknown:
            raise ValueError(
                f"There is no reward `{unknown[0]}`; allowed are {', '.join(functions)}, and `{WORD}` before any word."
            )
        self.prompts = [self.asked(prompt) if plan.get("chat") else prompt for prompt in plan["prompts"]]
        self.rewards = {name: named(name, functions[name], scale) for name, scale in plan["rewards"].items()}
        self.before = self.measured(self.base)

    def asked(self, question: str) -> str:
        """Format a user's question with the model's chat template, up to where the answer begins."""
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def measured(self, model: Any) -> Tensor:
        """Return the rewards [N, K] of new completions, drawn with the same random numbers for each model."""
        set_seed(0)
        scores = []
        for prompt in self.prompts:
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids.expand(self.plan["evaluated"], -1)
            length = self.plan["trainer"]["max_completion_length"]
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=True,
                top_k=0,
                temperature=self.plan["trainer"].get("temperature", 1.0),
                pad_token_id=self.tokenizer.pad_token_id,
            )
            texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            prompts = [prompt] * len(texts)
            scores.append(torch.tensor([f(prompts=prompts, completions=texts) for f in self.rewards.values()]).T)
        return torch.cat(scores).double()

    def changes(self, model: Any) -> list[float]:
        """Return each reward's change, in standard deviations before training."""
        after = self.measured(model)
        return ((after.mean(0) - self.before.mean(0)) / self.before.std(0)).tolist()


def run(setting: Setting, method: str, seed: int, rate: float, directory: Path) -> dict[str, Any]:
    """Train with one method; return how the rewards changed."""
    from trl import GRPOConfig, GRPOTrainer

    from hf_jd import JDGRPOConfig, JDGRPOTrainer

    flags = setting.plan["methods"][method]
    ours = any(flag.startswith("jd_") for flag in flags)
    common: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **setting.plan["trainer"],
        **({"jd_objectives": "reward"} if ours else {}),
        **flags,
        "seed": seed,
        "learning_rate": rate,
    }
    set_seed(seed)
    kinds: tuple[Any, Any] = (JDGRPOTrainer, JDGRPOConfig) if ours else (GRPOTrainer, GRPOConfig)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.plan["model"], dtype="float32")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = kinds[0](
        model=model,
        args=kinds[1](output_dir=str(directory / "out"), **common),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in setting.prompts]),
        processing_class=setting.tokenizer,
        reward_funcs=list(setting.rewards.values()),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    way = [
        [entry[f"rewards/{name}/mean"] for name in setting.rewards]
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    seconds = time.perf_counter() - start
    changes = setting.changes(trainer.model.eval())
    settings = {"method": method, "seed": seed, "learning_rate": rate, "updates": common["max_steps"]}
    return {**settings, "rewards": list(setting.rewards), "changes": changes, "way": way, "seconds": seconds}


def summary(changes: Sequence[float]) -> dict[str, float]:
    """Summarise a run: the worst reward, the number of better ones, and the hypervolume."""
    volume = 1.0
    for change in changes:
        volume *= max(0.0, (change - REFERENCE) / -REFERENCE)  # 1 for the policy before training
    improved = sum(change > 0 for change in changes)
    return {"worst": min(changes), "improved": improved, "hypervolume": volume}


def table(results: Sequence[dict[str, Any]], control: str | None = None) -> str:
    """Format the results in Markdown: a line per method and learning rate, with means over seeds.

    The worst reward, the number improved and the hypervolume have their standard deviations; the worst reward is also
    compared with the control's on the same seeds. With more than `WIDE` rewards, each method is a column instead.
    """
    names = results[0]["rewards"]
    paired = f"worst, less `{control}`"
    lines = [["method", "learning rate", "seeds", *names, *MEASURES, *([paired] if control else [])]]
    runs = {(r["method"], r["learning_rate"], r["seed"]): r["changes"] for r in results}
    for method, rate in dict.fromkeys((method, rate) for method, rate, _ in runs):
        seeds = [seed for m, r, seed in runs if (m, r) == (method, rate)]
        each = [runs[method, rate, seed] for seed in seeds]
        means = torch.tensor(each, dtype=torch.float64).mean(0).tolist()
        summaries = [summary(changes) for changes in each]
        spreads = [_spread([s[measure] for s in summaries]) for measure in MEASURES]
        line = [method, f"{rate:g}", str(len(seeds)), *(f"{mean:.2f}" for mean in means), *spreads]
        if control:
            shared = [seed for seed in seeds if method != control and (control, rate, seed) in runs]
            line.append(_paired([min(runs[method, rate, s]) - min(runs[control, rate, s]) for s in shared]))
        lines.append(line)
    if len(names) > WIDE:
        lines = [list(column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Format mean ± standard deviation."""
    each = torch.tensor(values, dtype=torch.float64)
    deviation = f" ± {each.std():.2f}" if len(values) > 1 else ""
    return f"{each.mean():{sign}.2f}{deviation}"


def _paired(differences: Sequence[float]) -> str:
    """Format differences to the control, and on how many seeds the method was better."""
    if not differences:
        return ""
    return f"{_spread(differences, '+')}; {sum(d > 0 for d in differences)} of {len(differences)}"


def draw(results: Sequence[dict[str, Any]], before: Tensor, path: Path) -> None:
    """Draw each reward over the steps, one panel per reward, averaged over seeds and learning rates."""
    import matplotlib.pyplot as plt

    names = results[0]["rewards"]
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), layout="constrained", squeeze=False)
    axes = grid.flatten()
    for method in dict.fromkeys(r["method"] for r in results):
        ways = [torch.tensor(r["way"], dtype=torch.float64) for r in results if r["method"] == method]
        shortest = min(map(len, ways))
        way = (torch.stack([w[:shortest] for w in ways]).mean(0) - before.mean(0)) / before.std(0)
        for axis, name, changes in zip(axes, names, way.T, strict=False):
            axis.plot(changes, label=method)
            axis.set(title=name, xlabel="update")
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis in grid[:, 0]:
        axis.set_ylabel("change / standard deviation")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then write `results.jsonl`, `table.md` and `picture.png`."""
    parser = argparse.ArgumentParser(description="Compare methods on several rewards.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--max_steps", type=int, help="updates per run, instead of the plan's")
    for part, kind in (("seeds", int), ("learning_rates", float), ("methods", str), ("rewards", str)):
        parser.add_argument(f"--{part}", type=kind, nargs="*", help="instead of the plan's")
    arguments = parser.parse_args(argv)
    plan = yaml.safe_load(arguments.plan.read_text("utf-8"))
    for part in ("methods", "rewards"):
        unknown = sorted(set(getattr(arguments, part) or []) - set(plan[part]))
        if unknown:
            parser.error(f"there is no {part[:-1]} `{unknown[0]}`; those of the plan are {', '.join(plan[part])}.")
        plan[part] = {name: plan[part][name] for name in getattr(arguments, part) or plan[part]}
    plan |= {part: getattr(arguments, part) or plan[part] for part in ("seeds", "learning_rates")}
    plan["trainer"] |= {"max_steps": arguments.max_steps} if arguments.max_steps else {}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    setting = Setting(plan)
    results = completed(setting, arguments.output_dir)
    text = table(results, plan.get("control"))
    (arguments.output_dir / "table.md").write_text(text, "utf-8")
    print(text)
    draw(results, setting.before, arguments.output_dir / "picture.png")
    return 0


def completed(setting: Setting, directory: Path) -> list[dict[str, Any]]:
    """Run what the plan has and `results.jsonl` lacks; return the results of its methods, rates and rewards."""
    plan, file = setting.plan, directory / "results.jsonl"
    rates, methods = plan["learning_rates"], list(plan["methods"])
    same = {"updates": plan["trainer"]["max_steps"], "rewards": list(plan["rewards"])}
    results = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    results = [
        r for r in results if r.items() >= same.items() and r["method"] in methods and r["learning_rate"] in rates
    ]
    done = {(r["seed"], r["learning_rate"], r["method"]) for r in results}
    for seed, rate, method in product(plan["seeds"], rates, methods):
        if (seed, rate, method) in done:
            continue
        results.append(run(setting, method, seed, rate, directory))
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(results[-1]) + "\n")
        print(f"{method}, seed {seed}, {rate:g}: {summary(results[-1]['changes'])}", flush=True)
    return sorted(results, key=lambda r: (rates.index(r["learning_rate"]), methods.index(r["method"]), r["seed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
