"""Run commands as processes, a few at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import psutil

USER_ERROR = 2
"""The exit code for errors that the user can fix."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: The name to print.
        command: The command.
        log: The file for its output.
        finished: Called when it has succeeded.
    """

    name: str
    command: Sequence[str]
    log: Path
    finished: Callable[[], object] = lambda: None


def run_jobs(jobs: Sequence[Job], processes: int) -> None:
    """Run all jobs in order, `processes` at a time, one thread each, and print when each is done.

    An error, Ctrl-C, or SIGTERM, which batch systems send when time is up, also ends the running jobs.

    Args:
        jobs: The commands.
        processes: How many to run at a time, at least 1.

    Raises:
        ValueError: A run failed with an error that the user can fix; the message is the run's.
        RuntimeError: A run failed otherwise.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    pool = ThreadPoolExecutor(max(1, processes))
    futures = [pool.submit(_run, job) for job in jobs]
    try:
        for done, future in enumerate(as_completed(futures), 1):
            print(f"[{done}/{len(jobs)}] {future.result()}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in futures):  # A thread may be about to start one more process.
            for child in psutil.Process().children():
                child.kill()
            time.sleep(0.05)
        signal.signal(signal.SIGTERM, before)


def _run(job: Job) -> str:
    start = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with job.log.open("wb") as log:
        code = subprocess.run(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code != 0:
        raise _failure(job, code)
    job.finished()
    return f"{job.name}: {time.monotonic() - start:.0f} s"


def _failure(job: Job, code: int) -> Exception:
    log = job.log.read_text("utf-8", errors="replace").strip()
    _, said, rest = log.rpartition(": error: ")
    if code == USER_ERROR and said:
        return ValueError(f"{job.name}: {rest.splitlines()[0]}")  # Other libraries may log something after it.
    end = "\n".join(log.splitlines()[-20:])
    return RuntimeError(f"The run {job.name!r} failed with exit code {code}: see {job.log}\n{end}")
