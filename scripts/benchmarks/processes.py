"""What an update of two processes costs, as a ratio to a plain step of DDP on the same model.

Each process has one thread and m = 8 instances. A step of DDP (mean loss, `.backward()`) and an update by UPGrad, as
`JDTrainer` takes it, are timed in turn. A ratio is the median over rounds of (its time / DDP's in the same round). The
times of the update's parts are medians on the first process, and so is the time to compare all weights by hash, as
`--jd_check_processes` does.

The last line shows what an exchange during the backward pass could save at best. It sends as many bytes as the rows
have, once after the pass, and once while it runs, as if all rows existed from its start; both are ratios to the pass
alone.

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
from hf_jd.distributed.agreement import check_weights
from hf_jd.distributed.rows import AddedRows, GatheredRows
from hf_jd.gramian import Engine
from hf_jd.objectives import ObjectiveTable
from hf_jd.weighting import UPGradWeighting

PROCESSES = 2
CASES = [
    Case("lora", 256, 8, 128),
    Case("lora", 256, 8, 128, groups=4),
    Case("full", 256, 8, 128, groups=4),
]
COLUMNS = 4 * 1024 * 1024  # sent at a time
PARTS = ["forward", "rows", "table", "gramian", "weights", "update"]


@dataclass
class Stopwatch:
    """The seconds that each part of a step takes."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    last: float = 0.0

    def start(self) -> None:
        """Start timing a step."""
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """Add the time since the last call to a part of the step."""
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
        """Compute the update, without the optimizer's step."""
        self.watch.start()
        with self.model.no_sync():
            values, segments = losses(self.model, ids), None
            if self._groups is not None:
                segments = torch.arange(len(values)) % self._groups
                values = values.new_zeros(self._groups).index_add(0, segments, values)
            self.watch("forward")
            jacobian = self._engine.compute_jacobian(values, segments, retain_graph=False)
        self.watch("rows")
        rows = (GatheredRows if self._groups is None else AddedRows)(jacobian, self._parameters)
        numbers = values.detach().double()[:, None].expand(-1, 3)
        objectives = len(rows.exchange(ObjectiveTable.of(numbers, torch.zeros(len(values), 2))))
        self.watch("table")
        gramians = rows.gramians()
        self.watch("gramian")
        weights = self._weighting(gramians[0])[None]
        self.watch("weights")
        for p, gradient in rows.weighted_sum(weights, torch.ones(objectives, dtype=torch.bool)).items():
            p.grad = gradient
        self.watch("update")


def run(rank: int, port: int, rounds: int) -> None:
    """Run all cases in one process."""
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    for case in CASES:
        measure(case, rank, rounds)
    overlap(CASES[-1], rank, rounds)
    distributed.destroy_process_group()


def measure(case: Case, rank: int, rounds: int) -> None:
    """Time one case; only the first process prints."""
    torch.manual_seed(rank)
    ids = torch.randint(0, VOCABULARY, (case.batch, case.tokens))
    plain = DistributedDataParallel(build(case))
    update = Update(case, DistributedDataParallel(build(case)))

    def stock(ids: Tensor) -> None:
        losses(plain, ids).mean().backward()

    steps, seconds = {"ddp": stock, "ours": update}, {"ddp": [], "ours": []}
    for i in range(rounds + 2):  # The first two include the self-check and the allocator's warm-up.
        for name in sorted(steps, reverse=i % 2 == 1):
            for model in (plain, update.model):
                model.zero_grad(set_to_none=True)
            distributed.barrier()
            start = time.perf_counter()
            steps[name](ids)
            distributed.barrier()
            seconds[name].append(time.perf_counter() - start)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    checks = [seconds_of_check(trained) for _ in range(rounds)]
    ratios = [o / d for o, d in zip(seconds["ours"][2:], seconds["ddp"][2:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    n = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    parts = ", ".join(f"{part} {1000 * statistics.median(s[2:]):.1f}" for part, s in update.watch.seconds.items())
    if rank == 0:
        ddp = 1000 * statistics.median(seconds["ddp"][2:])
        print(f"{case.label()}, n = {n / 1e6:.2f}M: {middle:.3f} [{low:.3f}, {high:.3f}] of DDP's {ddp:.1f} ms")
        print(f"    {parts}; weights compared: {1000 * statistics.median(checks):.1f} ms", flush=True)


def overlap(case: Case, rank: int, rounds: int) -> None:
    """Time the backward pass that forms rows: alone, before an exchange of as many bytes, and during one."""
    torch.manual_seed(rank)
    ids = torch.randint(0, VOCABULARY, (case.batch, case.tokens))
    model = build(case)
    engine, groups = Engine(model), case.groups or 1
    leaving = groups * sum(p.numel() for p in model.parameters() if p.requires_grad) // PROCESSES
    parts = [torch.ones(min(COLUMNS, leaving - start)) for start in range(0, leaving, COLUMNS)]
    seconds: dict[str, list[float]] = {"alone": [], "after": [], "during": []}
    for i in range(rounds + 2):
        names = list(seconds)
        for when in names[i % 3 :] + names[: i % 3]:
            segments = torch.arange(case.batch) % groups
            values = torch.zeros(groups).index_add(0, segments, losses(model, ids))
            distributed.barrier()
            start = time.perf_counter()
            work = send(parts, rank) if when == "during" else []
            engine.compute_jacobian(values, segments)
            work += send(parts, rank) if when == "after" else []
            for one in work:
                one.wait()
            distributed.barrier()
            seconds[when].append(time.perf_counter() - start)
    if rank == 0:
        alone = seconds["alone"][2:]
        ratios = {k: statistics.median(t / a for t, a in zip(s[2:], alone, strict=True)) for k, s in seconds.items()}
        print(
            f"{4 * leaving / 1e6:.1f} MB sent after the backward: {ratios['after']:.3f}, during: {ratios['during']:.3f}"
        )


def send(parts: list[Tensor], rank: int) -> list[distributed.Work]:
    """Start sending each tensor to the other process."""
    work = []
    for part in parts:
        sizes = [0 if q == rank else len(part) for q in range(PROCESSES)]
        received = torch.empty_like(part)
        work.append(distributed.all_to_all_single(received, part, sizes, sizes, async_op=True))
    return work


def seconds_of_check(parameters: dict[str, nn.Parameter]) -> float:
    """Time the comparison of parameters with the other process's."""
    distributed.barrier()
    start = time.perf_counter()
    check_weights(parameters, step=0)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(prog="benchmark.py processes", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run, (port, args.rounds), nprocs=PROCESSES)
