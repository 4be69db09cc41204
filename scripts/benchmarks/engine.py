"""What a step of the engine costs, as a ratio to a plain forward and backward of the same model.

Each case builds a random float32 Llama or Mixtral and times, interleaved on one thread: a plain step (mean loss,
`.backward()`), the engine's one-pass and two-pass steps, TorchJD's engine, and one backward per objective. A ratio is
the median over rounds of (its time / the plain step's time in the same round), with its quartiles. Memory is the peak
of torch's allocator beyond the plain step's peak, as a part of the rows' bytes.

    python scripts/benchmark.py engine                  the table
    python scripts/benchmark.py engine --cases full     only the lines whose label contains "full"
    python scripts/benchmark.py engine --factors        rows, factors and two-pass compared
    python scripts/benchmark.py engine --compile        the same steps of compiled models
    python scripts/benchmark.py engine --sweep          the cost per instance for m = 2 ... 256, and its picture
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_jd.gramian import Engine

VOCABULARY = 1024
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "engine-cost.png"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        tuning: "lora" or "full"; "moe": full fine-tuning of a Mixtral with 8 experts, 2 per token.
        hidden: Width h; the intermediate size is 8 h / 3, or h for each expert.
        batch: Instances B.
        tokens: Tokens T per instance.
        groups: Number of groups K; None: one objective per instance.
        layers: Number of layers.
        sorted: Whether the batch is sorted by group; otherwise, neighbours belong to different groups.
    """

    tuning: str
    hidden: int
    batch: int
    tokens: int
    groups: int | None = None
    layers: int = 4
    sorted: bool = False

    @property
    def objectives(self) -> int:
        """Number of objectives."""
        return self.groups or self.batch

    def label(self) -> str:
        """As printed."""
        objectives = f"{self.batch} instances" if self.groups is None else f"{self.groups} groups of {self.batch}"
        return f"{self.tuning} h={self.hidden} T={self.tokens}, {objectives}{', sorted' if self.sorted else ''}"


INSTANCES = [
    Case("lora", h, m, t, layers=n)
    for h, m, t, n in [
        (128, 64, 32, 8), (128, 16, 128, 8), (128, 8, 512, 4), (256, 64, 32, 8), (256, 16, 128, 8), (256, 8, 512, 4),
        (512, 32, 32, 6), (512, 8, 128, 6), (512, 8, 512, 2),
    ]
]  # fmt: skip
SHAPES = [(128, 64, 32, 8), (256, 64, 32, 8), (256, 16, 128, 8), (512, 32, 32, 6), (512, 8, 512, 2)]
GROUPS = [Case("lora", h, m, t, groups=4, layers=n) for h, m, t, n in SHAPES]
GROUPS += [Case("full", h, m, t, groups=4, layers=n, sorted=s) for h, m, t, n in SHAPES for s in (True, False)]
GROUPS += [Case("moe", 256, 16, 128, groups=4, layers=4, sorted=s) for s in (True, False)]
FACTORS = [Case("full", 256, 16, 32), Case("full", 256, 16, 128), Case("full", 512, 16, 32, layers=2)]
COMPILED = [Case("lora", 256, 16, 128), Case("full", 256, 16, 128, groups=4, sorted=True)]


def build(case: Case) -> nn.Module:
    """Build a random Llama, with LoRA r = 8 on all linear layers or fully trainable, or a fully trainable Mixtral."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 32,
        "num_key_value_heads": case.hidden // 32,
        "use_cache": False,
    }
    if case.tuning == "moe":
        return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=case.hidden, num_local_experts=8)).train()
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=case.hidden * 8 // 3))
    if case.tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the mean token loss of each instance [B]."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


class Way:
    """One way to take a step, on a separate model.

    Args:
        case: The case.
        name: One of `WAYS`.
        compiled: Whether to compile the model, after the engine was created.
    """

    def __init__(self, case: Case, name: str, compiled: bool = False):
        self.name, self.model = name, build(case)
        self._case = case
        self._ids = torch.randint(0, VOCABULARY, (case.batch, case.tokens))
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._segments = None
        if case.groups is not None:
            segments = torch.arange(case.batch) % case.groups
            self._segments = segments.sort().values if case.sorted else segments
        self._weights = torch.full((case.objectives,), 1 / case.objectives)
        self._step = WAYS[name](self)
        if compiled:
            self.model.compile()

    def __call__(self) -> float:
        """Take a step; return its seconds."""
        for p in self._parameters:
            p.grad = None
        start = time.perf_counter()
        self._step(self._objectives())
        return time.perf_counter() - start

    def peak(self) -> int:
        """Return the peak of the bytes that torch's allocator adds during a step."""
        for p in self._parameters:
            p.grad = None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._step(self._objectives())
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    @property
    def rows_bytes(self) -> int:
        """The bytes of one row per objective."""
        return self._case.objectives * sum(p.nbytes for p in self._parameters)

    def _objectives(self) -> Tensor:
        instance = losses(self.model, self._ids)
        if self._segments is None:
            return instance
        return instance.new_zeros(self._case.objectives).index_add(0, self._segments, instance)

    def plain(self) -> Callable[[Tensor], None]:
        """Differentiate the mean of the losses."""
        return lambda values: values.mean().backward()

    def engine(self, keep_rows: bool) -> Callable[[Tensor], None]:
        """Return the engine's step: the Gramian, then the update."""
        engine = Engine(self.model, keep_rows=keep_rows)

        def step(values: Tensor) -> None:
            engine.compute_gramian(values, self._segments, retain_graph=False)
            del values  # This frees the rest of the graph before the gradient is formed.
            engine.accumulate_grad(self._weights)

        return step

    def factors(self) -> Callable[[Tensor], None]:
        """Return the same step with rows stored as factors, where those are smaller."""
        engine = Engine(self.model)

        def step(values: Tensor) -> None:
            jacobian = engine.compute_jacobian(values, self._segments, materialise=False, retain_graph=False)
            del values
            jacobian.gramian()
            for p, gradient in jacobian.weighted_sum(self._weights).items():
                p.grad = gradient

        return step

    def torchjd(self) -> Callable[[Tensor], None]:
        """Return the step that TorchJD documents: its engine's Gramian, then a second backward."""
        from torchjd.autogram import Engine as TorchJD

        engine = TorchJD(self.model, batch_dim=0)

        def step(values: Tensor) -> None:
            engine.compute_gramian(values)
            values.backward(self._weights)

        return step

    def passes(self) -> Callable[[Tensor], None]:
        """Return a step that runs one backward per objective, and stacks the rows."""

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
    "factors": Way.factors,
    "two-pass": lambda way: way.engine(keep_rows=False),
    "torchjd": Way.torchjd,
    "K passes": Way.passes,
}


def measure(ways: list[Way], rounds: int) -> dict[str, list[float]]:
    """Return each way's seconds per round; the order within a round rotates."""
    for way in ways:  # The first steps include the self-check and the allocator's warm-up.
        way(), way()
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for i in range(rounds):
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            seconds[way.name].append(way())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str = "plain") -> str:
    """Format the median and quartiles of the ratio over rounds."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(seconds[name], seconds[to], strict=True)], n=4, method="inclusive"
    )
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def memory(ways: list[Way], name: str) -> str:
    """Format a way's peak beyond the plain step's, as a part of the rows' bytes."""
    peaks = {way.name: way.peak() for way in ways if way.name in ("plain", name)}
    return f"{(peaks[name] - peaks['plain']) / ways[0].rows_bytes:.2f} of {ways[0].rows_bytes / 2**20:.0f} MB"


def line(case: Case, names: list[str], rounds: int, compiled: bool = False) -> None:
    """Print a markdown line: the plain step, the other ways' ratios, one-pass's gain over the last one, and memory."""
    ways = [Way(case, name, compiled) for name in names]
    seconds = measure(ways, rounds)
    cells = [
        case.label(),
        f"{statistics.median(seconds['plain']) * 1e3:.0f} ms",
        *(ratio(seconds, n) for n in names[1:]),
    ]
    if not compiled:
        cells += [ratio(seconds, names[-1], "one-pass"), memory(ways, "one-pass")]
    print("| " + " | ".join(cells) + " |", flush=True)


def head(*columns: str) -> None:
    """Print the head of a markdown table."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def table(cases: list[Case], rounds: int) -> None:
    """Print the main table."""
    head("case", "plain step", "one-pass", "two-pass", "torchjd, K passes", "gain over those", "memory against rows")
    for case in cases:
        line(case, ["plain", "one-pass", "two-pass", "torchjd" if case.groups is None else "K passes"], rounds)


def factors(rounds: int) -> None:
    """Compare storing rows, factors or nothing, in full fine-tuning by instance."""
    head("case", "plain step", "rows", "factors", "two-pass", "rows' gain over two-pass", "memory against rows")
    for case in FACTORS:
        line(case, ["plain", "one-pass", "factors", "two-pass"], rounds)


def compiled(rounds: int) -> None:
    """Compare the engine's steps on compiled models with a compiled plain step."""
    head("case", "compiled plain step", "one-pass", "two-pass")
    # Otherwise compiled backwards refuse a retained graph, and code compiled without the engine would run instead.
    with functorch_config.patch(donated_buffer=False), dynamo_config.patch(skip_nnmodule_hook_guards=False):
        for case in COMPILED:
            line(case, ["plain", "one-pass", "two-pass"], rounds, compiled=True)


def sweep(rounds: int) -> None:
    """Print and draw the cost per instance against m, for LoRA at h = 256, T = 64."""
    from matplotlib.figure import Figure

    head("m", "plain, ms per instance", "one-pass, ms per instance", "ratio")
    sizes, costs = (2, 4, 8, 16, 32, 64, 128, 256), {"plain": [], "one-pass": []}
    for m in sizes:
        case = Case("lora", 256, m, 64)
        seconds = measure([Way(case, name) for name in costs], rounds if m < 64 else min(rounds, 5))
        for name, per_instance in costs.items():
            per_instance.append(statistics.median(seconds[name]) / m * 1e3)
        print(
            f"| {m} | {costs['plain'][-1]:.2f} | {costs['one-pass'][-1]:.2f} | {ratio(seconds, 'one-pass')} |",
            flush=True,
        )
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, per_instance), style in zip(costs.items(), ("o--", "o-"), strict=True):
        axes.plot(sizes, per_instance, style, label={"plain": "plain step", "one-pass": "engine, one-pass"}[name])
    axes.set(xscale="log", xticks=sizes, xticklabels=sizes, ylim=(0, 1.1 * max(map(max, costs.values()))))
    axes.set(xlabel="instances m per step", ylabel="ms per instance", title="LoRA, h = 256, T = 64, one CPU thread")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(PICTURE, dpi=150)


def main(argv: list[str]) -> None:
    """Run the benchmark that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="benchmark.py engine", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="", help="only the lines of the table whose label contains this")
    parser.add_argument("--factors", action="store_true", help="full fine-tuning by instance: rows, factors, two-pass")
    parser.add_argument("--compile", action="store_true", help="steps of compiled models")
    parser.add_argument("--sweep", action="store_true", help="the cost per instance, m from 2 to 256, and its picture")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per case")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchjd")
    if args.sweep:
        sweep(args.rounds)
    elif args.factors:
        factors(args.rounds)
    elif args.compile:
        compiled(args.rounds)
    else:
        table([case for case in INSTANCES + GROUPS if args.cases in case.label()], args.rounds)
