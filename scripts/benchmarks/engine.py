"""What a step of the engine costs, as a ratio to a plain forward and backward of the same model.

Each case builds a random Llama of float32 and times, interleaved in one run, one thread: a plain step (mean loss,
`.backward()`), the engine's one-pass and two-pass steps, TorchJD's engine, and one backward an objective. A ratio is
the median over rounds of (its time / the plain step's time in the same round); the spread is the quartiles'.

    python scripts/benchmark.py engine                  the table
    python scripts/benchmark.py engine --quick          three cases
    python scripts/benchmark.py engine --sweep          the cost an instance for m = 2 ... 256
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_jd.gramian import Engine

VOCABULARY = 1024


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        tuning: "lora" or "full".
        hidden: Width h; the intermediate size is 8 h / 3.
        batch: Instances B.
        tokens: Tokens T of an instance.
        groups: Number of groups K; None: an objective an instance.
        layers: Number of layers.
    """

    tuning: str
    hidden: int
    batch: int
    tokens: int
    groups: int | None = None
    layers: int = 4

    @property
    def objectives(self) -> int:
        """Number of objectives."""
        return self.groups or self.batch

    def label(self) -> str:
        """As printed."""
        objectives = f"{self.batch} instances" if self.groups is None else f"{self.groups} groups of {self.batch}"
        return f"{self.tuning} h={self.hidden} T={self.tokens}, {objectives}"


INSTANCES = [
    Case("lora", h, m, t, layers=n)
    for h, m, t, n in [
        (128, 64, 32, 8), (128, 16, 128, 8), (128, 8, 512, 4), (256, 64, 32, 8), (256, 16, 128, 8), (256, 8, 512, 4),
        (512, 32, 32, 6), (512, 8, 128, 6), (512, 8, 512, 2),
    ]
]  # fmt: skip
GROUPS = [
    Case(tuning, h, m, t, groups=4, layers=n)
    for tuning in ("lora", "full")
    for h, m, t, n in [(128, 64, 32, 8), (256, 64, 32, 8), (256, 16, 128, 8), (512, 32, 32, 6), (512, 8, 512, 2)]
]
QUICK = [INSTANCES[4], GROUPS[2], GROUPS[7]]


def build(case: Case) -> nn.Module:
    """A random Llama, with LoRA r = 8 on all linear layers or fully trainable."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 32,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if case.tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean token loss of each instance [B]."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


class Way:
    """One way to take a step, on a model of its own.

    Args:
        case: The case.
        name: One of `WAYS`.
    """

    def __init__(self, case: Case, name: str):
        self.name, self.model = name, build(case)
        self._case = case
        self._ids = torch.randint(0, VOCABULARY, (case.batch, case.tokens))
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._segments = None if case.groups is None else torch.arange(case.batch) % case.groups
        self._weights = torch.full((case.objectives,), 1 / case.objectives)
        self._step = WAYS[name](self)

    def __call__(self) -> float:
        """Takes a step; its seconds."""
        for p in self._parameters:
            p.grad = None
        start = time.perf_counter()
        self._step(self._objectives())
        return time.perf_counter() - start

    def _objectives(self) -> Tensor:
        instance = losses(self.model, self._ids)
        if self._segments is None:
            return instance
        return instance.new_zeros(self._case.objectives).index_add(0, self._segments, instance)

    def plain(self) -> Callable[[Tensor], None]:
        """Mean of the losses, one backward."""
        return lambda values: values.mean().backward()

    def engine(self, keep_rows: bool) -> Callable[[Tensor], None]:
        """The engine's Gramian, then the update."""
        engine = Engine(self.model, keep_rows=keep_rows)

        def step(values: Tensor) -> None:
            engine.compute_gramian(values, self._segments)
            engine.accumulate_grad(self._weights)

        return step

    def torchjd(self) -> Callable[[Tensor], None]:
        """TorchJD's engine, then a second backward, as its documents say."""
        from torchjd.autogram import Engine as TorchJD

        engine = TorchJD(self.model, batch_dim=0)

        def step(values: Tensor) -> None:
            engine.compute_gramian(values)
            values.backward(self._weights)

        return step

    def passes(self) -> Callable[[Tensor], None]:
        """One backward an objective, rows stacked."""

        def step(values: Tensor) -> None:
            rows = [torch.autograd.grad(v, self._parameters, retain_graph=True) for v in values]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            torch.mm(jacobian, jacobian.T)
            sizes = [p.numel() for p in self._parameters]
            for p, g in zip(self._parameters, (self._weights @ jacobian).split(sizes), strict=True):
                p.grad = g.view(p.shape)

        return step


WAYS: dict[str, Callable[[Way], Callable[[Tensor], None]]] = {
    "plain": Way.plain,
    "one-pass": lambda way: way.engine(keep_rows=True),
    "two-pass": lambda way: way.engine(keep_rows=False),
    "torchjd": Way.torchjd,
    "K passes": Way.passes,
}


def compared(case: Case) -> list[str]:
    """The ways that are compared in a case."""
    return ["plain", "one-pass", "two-pass", "torchjd" if case.groups is None else "K passes"]


def measure(case: Case, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the order within a round rotates."""
    ways = [Way(case, name) for name in names]
    for way in ways:  # The first steps hold the self-check and the allocator's warming up.
        way(), way()
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for i in range(rounds):
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            seconds[way.name].append(way())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str = "plain") -> str:
    """Median and quartiles of the ratio by round, as printed."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(seconds[name], seconds[to], strict=True)], n=4, method="inclusive"
    )
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(cases: list[Case], rounds: int) -> None:
    """Prints one markdown line a case."""
    print("| case | plain step | one-pass | two-pass | torchjd, K passes | engine's gain over those |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        names = compared(case)
        seconds = measure(case, names, rounds)
        plain = statistics.median(seconds["plain"]) * 1e3
        other = names[-1]
        cells = [case.label(), f"{plain:.0f} ms", *(ratio(seconds, n) for n in names[1:])]
        print("| " + " | ".join([*cells, ratio(seconds, other, "one-pass")]) + " |", flush=True)


def sweep(rounds: int) -> None:
    """Prints the cost an instance against m, for LoRA at h = 256, T = 64."""
    print("| m | plain, ms an instance | one-pass, ms an instance | ratio |\n|---|---|---|---|")
    for m in (2, 4, 8, 16, 32, 64, 128, 256):
        seconds = measure(Case("lora", 256, m, 64), ["plain", "one-pass"], rounds)
        each = [statistics.median(seconds[n]) / m * 1e3 for n in ("plain", "one-pass")]
        print(f"| {m} | {each[0]:.2f} | {each[1]:.2f} | {ratio(seconds, 'one-pass')} |", flush=True)


def main(argv: list[str]) -> None:
    """Runs the benchmark that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="benchmark.py engine", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three cases only")
    parser.add_argument("--sweep", action="store_true", help="the cost an instance, m from 2 to 256")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchjd")
    if args.sweep:
        sweep(args.rounds)
    else:
        table(QUICK if args.quick else INSTANCES + GROUPS, args.rounds)
