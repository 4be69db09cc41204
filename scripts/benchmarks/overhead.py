"""What a step of the engine costs besides arithmetic, in microseconds per adapter beyond a plain step.

The model is a Llama with 24 layers and 14 LoRA matrices per layer (A and B of seven linear layers). It is so narrow
(hidden size 32, 4 instances of 8 tokens) that both steps spend their time in Python and in launching kernels. Steps
alternate on one thread. The medians over rounds are compared, for wall-clock time and for the process's CPU time.

    python scripts/benchmark.py overhead
    python scripts/benchmark.py overhead --profile      also print where the engine's step spends its time
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import time

import torch

from benchmarks.engine import Case, Way

LAYERS, ADAPTERS = 24, 14
CASE = Case("lora", 32, 4, 8, layers=LAYERS)


def interleaved(ways: list[Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return each way's (wall, CPU) seconds per round, without the zeroing of gradients; the order alternates."""
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for way in ways:  # The first steps include the self-check and the allocator's warm-up.
        way(), way(), way()
    gc.collect()
    gc.disable()
    for i in range(rounds):
        for way in ways[:: 1 if i % 2 else -1]:
            start = time.process_time()
            wall = way()
            seconds[way.name].append((wall, time.process_time() - start))
            if i % 10 == 0:
                gc.collect()
    gc.enable()
    return seconds


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.py overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds, with one step of each kind")
    parser.add_argument("--profile", action="store_true", help="print where the engine spends its time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ways = [Way(CASE, name) for name in ("plain", "one-pass")]
    seconds = interleaved(ways, args.rounds)
    print("| clock | plain step | one-pass | more per adapter |\n|---|---|---|---|")
    for clock, name in enumerate(("wall", "CPU")):
        plain, ours = (statistics.median(s[clock] for s in seconds[way.name]) for way in ways)
        more = (ours - plain) / (LAYERS * ADAPTERS)
        print(f"| {name} | {plain * 1e3:.1f} ms | {ours * 1e3:.1f} ms | {more * 1e6:.0f} us |")
    if args.profile:
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(args.rounds):
            ways[1]()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
