"""Run commands as processes, a few at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.2
USER_ERROR = 2
"""The exit code for errors that the user can fix."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: The name to print.
        command: The command.
        log: The file for its output.
    """

    name: str
    command: Sequence[str]
    log: Path


@contextmanager
def _sigterm_as_exit() -> Generator[None]:
    """Makes SIGTERM, which batch systems send when time is up, raise an exception like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_sigterm_as_exit()
def run_jobs(
    jobs: Sequence[Job], processes: int, environment: Mapping[str, str], finished: Callable[[Job], None]
) -> None:
    """Runs all jobs in order, `processes` at a time, and prints when each is done.

    An error, Ctrl-C or SIGTERM also ends the running jobs.

    Args:
        jobs: The commands.
        processes: How many to run at a time, at least 1.
        environment: Variables to add to this process's environment.
        finished: Called with each job that succeeds.

    Raises:
        ValueError: A run failed with an error that the user can fix; the message is the run's.
        RuntimeError: A run failed otherwise.
    """
    waiting = list(jobs)
    running: list[tuple[Job, subprocess.Popen, float]] = []
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < max(1, processes):
                running.append(_start(waiting.pop(0), environment))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                running.remove(entry)
                job, process, start = entry
                if process.returncode != 0:
                    raise _failure(job, process.returncode)
                done += 1
                finished(job)
                print(f"[{done}/{len(jobs)}] {job.name}: {time.monotonic() - start:.0f} s", flush=True)
    finally:
        for _, process, _ in running:
            process.kill()
            process.wait()


def _start(job: Job, environment: Mapping[str, str]) -> tuple[Job, subprocess.Popen, float]:
    with job.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
        )
    return job, process, time.monotonic()


def _failure(job: Job, code: int) -> Exception:
    log = job.log.read_text("utf-8", errors="replace").strip()
    _, said, rest = log.rpartition(": error: ")
    if code == USER_ERROR and said:
        return ValueError(f"{job.name}: {rest.splitlines()[0]}")  # Other libraries may log something after it.
    end = "\n".join(log.splitlines()[-20:])
    return RuntimeError(f"The run {job.name!r} failed with exit code {code}: see {job.log}\n{end}")
