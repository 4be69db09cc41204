"""What an update of two processes costs, as a ratio to a plain step of DDP on the same model.

Each process has one thread and m = 8 instances. Timed in turn, in one run: a step of DDP (mean loss, `.backward()`),
and an update by UPGrad as `JDTrainer` takes it. A ratio is the median over rounds of (its time / DDP's in the same
round); the parts of the update are medians too, of the first process.

    python scripts/benchmark.py processes
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.engine import VOCABULARY, Case, build, losses
from hf_jd.distributed.rows import AddedRows, GatheredRows
from hf_jd.gramian import Engine
from hf_jd.weighting import UPGradWeighting

PROCESSES = 2
CASES = [
    Case("lora", 256, 8, 128),
    Case("lora", 256, 8, 128, groups=4),
    Case("full", 256, 8, 128, groups=4),
]
PARTS = ["forward", "rows", "table", "gramian", "weights", "update"]


@dataclass
class Stopwatch:
    """Seconds of the parts of a step."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    last: float = 0.0

    def start(self) -> None:
        """Begins a step."""
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """Ends a part of the step."""
        now = time.perf_counter()
        self.seconds[part].append(now - self.last)
        self.last = now


class Update:
    """An update by UPGrad of all processes' objectives.

    Args:
        case: The case.
        model: Wrapped by DDP.
    """

    def __init__(self, case: Case, model: DistributedDataParallel):
        self.model, self.watch = model, Stopwatch()
        self._groups, inner = case.groups, model.module
        assert isinstance(inner, nn.Module)
        self._engine, self._weighting = Engine(inner), UPGradWeighting()
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, ids: Tensor) -> None:
        """Takes the step, without the optimizer's."""
        self.watch.start()
        with self.model.no_sync():
            values, segments = losses(self.model, ids), None
            if self._groups is not None:
                segments = torch.arange(len(values)) % self._groups
                values = values.new_zeros(self._groups).index_add(0, segments, values)
            self.watch("forward")
            jacobian = self._engine.compute_jacobian(values, segments)
        self.watch("rows")
        rows = (GatheredRows if self._groups is None else AddedRows)(jacobian, self._parameters)
        objectives = len(rows.table(torch.stack([values.detach().double()] * 4, dim=1)))
        self.watch("table")
        gramian = rows.gramian()
        self.watch("gramian")
        weights = self._weighting(gramian)
        self.watch("weights")
        for p, gradient in rows.weighted_sum(weights, torch.ones(objectives, dtype=torch.bool)).items():
            p.grad = gradient
        self.watch("update")


def run(rank: int, port: int, rounds: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    for case in CASES:
        measure(case, rank, rounds)
    distributed.destroy_process_group()


def measure(case: Case, rank: int, rounds: int) -> None:
    """Times one case; the first process prints."""
    torch.manual_seed(rank)
    ids = torch.randint(0, VOCABULARY, (case.batch, case.tokens))
    plain = DistributedDataParallel(build(case))
    update = Update(case, DistributedDataParallel(build(case)))

    def stock(ids: Tensor) -> None:
        losses(plain, ids).mean().backward()

    steps, seconds = {"ddp": stock, "ours": update}, {"ddp": [], "ours": []}
    for i in range(rounds + 2):  # The first two hold the self-check and the allocator's warming up.
        for name in sorted(steps, reverse=i % 2 == 1):
            for model in (plain, update.model):
                model.zero_grad(set_to_none=True)
            distributed.barrier()
            start = time.perf_counter()
            steps[name](ids)
            distributed.barrier()
            seconds[name].append(time.perf_counter() - start)
    ratios = [o / d for o, d in zip(seconds["ours"][2:], seconds["ddp"][2:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    n = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    parts = ", ".join(f"{part} {1000 * statistics.median(s[2:]):.1f}" for part, s in update.watch.seconds.items())
    if rank == 0:
        ddp = 1000 * statistics.median(seconds["ddp"][2:])
        print(f"{case.label()}, n = {n / 1e6:.2f}M: {middle:.3f} [{low:.3f}, {high:.3f}] of DDP's {ddp:.1f} ms")
        print(f"    {parts}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(prog="benchmark.py processes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run, (port, args.rounds), nprocs=PROCESSES)
