"""The setting that all cases of `benchmark.py gpu` share, and how they are timed."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], object]
WARM_UP = 2  # steps that aren't timed: the self-check, and the allocator's first requests


class NotHereError(Exception):
    """This machine lacks something that a case needs."""


@dataclass(frozen=True)
class Setting:
    """Where the cases run, and how long.

    Attributes:
        device: The device.
        tiny: Whether to use tiny sizes, as in tests.
        deadline: When to stop, by `time.monotonic`.
        rounds: The largest number of times to time each step.
    """

    device: torch.device
    tiny: bool
    deadline: float
    rounds: int

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU of NVIDIA's or AMD's."""
        return self.device.type == "cuda"

    def late(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def require_cuda(self) -> None:
        """Raise `NotHereError` on another device."""
        if not self.is_cuda:
            raise NotHereError("needs CUDA")


def require(package: str) -> None:
    """Raise `NotHereError` if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise NotHereError(f"needs {package}")


def milliseconds(step: Step, device: torch.device) -> float:
    """Time one step; on a GPU, between two CUDA events."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_megabytes(step: Step, device: torch.device) -> float | None:
    """Return the peak memory that a step adds, in MB; None if the allocator doesn't report it."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(steps: Mapping[str, Step], setting: Setting) -> dict[str, dict[str, Any]]:
    """Time steps in turn, as ratios to the first one.

    Returns:
        Per step, the median in ms, the ratio (the median over rounds of its time / the first one's in the same round),
        and the peak memory in MB. A step that fails has its error instead, and is not run again.
    """
    results: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        try:
            for _ in range(WARM_UP - 1):
                step()
            results[name] = {"peak_mb": peak_megabytes(step, setting.device)}
            times[name] = []
        except Exception as error:
            results[name] = {"error": message(error)}
            if setting.is_cuda:
                torch.cuda.empty_cache()
    for i in range(setting.rounds):
        names = list(times)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(milliseconds(steps[name], setting.device))
        if i >= 2 and setting.late():
            break
    first = times.get(next(iter(steps)), [])
    for name, values in times.items():
        results[name] |= {"ms": statistics.median(values), "rounds": len(values)}
        if first:
            results[name]["ratio"] = statistics.median(a / b for a, b in zip(values, first, strict=True))
    return results


def message(error: Exception) -> str:
    """Return the first line of an error, with its type."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
