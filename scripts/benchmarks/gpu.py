"""Measure what hf_jd costs on a GPU, and whether it is right, in one command of a few minutes.

The most important cases run first. Each result is printed and appended to a file of JSON lines at once, so that an
interrupted run is still useful. If a case fails, or needs something that is missing, its line says so, and the run goes
on. Times are medians of interleaved steps between CUDA events, after a warm-up; a ratio is the median over rounds of (a
step's time / the plain step's time in the same round). Nothing is downloaded.

    python scripts/benchmark.py gpu                                 about 8 minutes; results in gpu.jsonl
    python scripts/benchmark.py gpu --cases parity upgrad           only cases whose name contains one of these
    python scripts/benchmark.py gpu --tiny                          every case in miniature, also on a CPU
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import _gpu_libraries as libraries
from benchmarks import _gpu_parity as numbers
from benchmarks._gpu_cost import Cost
from benchmarks._gpu_setting import NotHereError, Setting, message

CASES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "LoRA, 1.5B, 8 x 1024, bf16": Cost("1.5B", 8, 1024),
    "parity of Gramian and update": numbers.parity,
    "full, 0.5B, 16 x 1024, 4 groups": Cost("0.5B", 16, 1024, lora=False, ways=("groups", "passes")),
    "LoRA, 135M, 8 x 256: Python's share": Cost("135M", 8, 256, ways=("instance", "groups")),
    "mean is the stock Trainer, bf16": numbers.stock,
    "copies to the host": numbers.copies,
    "LoRA, 1.5B, checkpointing": Cost("1.5B", 8, 1024, ways=("instance", "groups", "passes"), checkpointing=True),
    "LoRA, 1.5B, autocast": Cost("1.5B", 8, 1024, ways=("instance", "groups"), autocast=True),
    "upgrad on the device": numbers.weightings,
    "fp16 with GradScaler": numbers.scaler,
    "torch.compile": numbers.compiled,
    "two processes of gloo on one device": libraries.gloo,
    "one process of NCCL": libraries.nccl,
    "4-bit base": libraries.four_bit,
    "GRPO with four rewards": libraries.grpo,
}


def run(name: str, setting: Setting) -> dict[str, Any]:
    """Run one case; return its result, or the reason why there is none."""
    begin = time.monotonic()
    if setting.late():
        return {"case": name, "not_here": "the time was up"}
    try:
        result = CASES[name](setting)
    except NotHereError as reason:
        result = {"not_here": str(reason)}
    except Exception as error:
        result = {"error": message(error)}
    if setting.is_cuda:
        torch.cuda.empty_cache()
    return {"case": name, "seconds": round(time.monotonic() - begin, 2)} | result


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def printed(line: dict[str, Any]) -> str:
    """Format a case's result, with numbers to three digits and one line per step."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {cell(part)}" for key, part in value.items() if part is not None)
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    parts = {key: value for key, value in line.items() if key not in ("case", "seconds")}
    head = f"{line['case']} ({line.get('seconds', 0):.0f} s)"
    if "not_here" in parts:
        return f"{head}: not here: {parts['not_here']}"
    return "\n".join([head, *(f"    {key}: {cell(value)}" for key, value in parts.items())])


def main(argv: list[str] | None = None) -> int:
    """Run the cases.

    Returns:
        The exit code: 0, whatever the cases found.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins after this time")
    parser.add_argument("--rounds", type=int, default=10, help="the largest number of timed rounds per case")
    parser.add_argument("--tiny", action="store_true", help="every case in miniature")
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases whose name contains one of these")
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"), help="where to append the JSON lines")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("there is no GPU that torch can use; --tiny runs every case in miniature on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 3 if arguments.tiny else arguments.rounds
    setting = Setting(device, arguments.tiny, time.monotonic() + 60 * arguments.minutes, rounds)
    where = {"device": device_name(device), "torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(where.values()), flush=True)
    for name in [name for name in CASES if any(part in name for part in arguments.cases)]:
        line = run(name, setting)
        print(printed(line), flush=True)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | where | {"tiny": arguments.tiny}) + "\n")
    return 0
