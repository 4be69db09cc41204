"""Processes that are started once, and run one case after another (gloo)."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import socket
import traceback
import warnings
from datetime import timedelta
from typing import Any

SECONDS = 600  # for answers that never come; the machine may be busy


class Pool:
    """W processes that train together.

    Args:
        processes: W.
    """

    def __init__(self, processes: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.cases"])
        port = free_port()
        self.answers = context.Queue()
        self.requests = [context.Queue() for _ in range(processes)]
        self.processes = [
            context.Process(target=serve, args=(r, processes, port, q, self.answers), daemon=True)
            for r, q in enumerate(self.requests)
        ]
        for process in self.processes:
            process.start()

    def ask(self, case: str, **arguments: Any) -> None:
        """Start a function of `tests.distributed.cases`, or `module.function`, on all processes."""
        for requests in self.requests:
            requests.put((case, arguments))

    def run(self, case: str, **arguments: Any) -> list[Any]:
        """Run a function of `tests.distributed.cases`; return its result on each process."""
        answers = self.answers_of(case, **arguments)
        for failed, answer in answers:
            assert not failed, answer
        return [answer for _, answer in answers]

    def answers_of(self, case: str, **arguments: Any) -> list[tuple[bool, Any]]:
        """Return, for each process, whether the function failed, and its result or error."""
        self.ask(case, **arguments)
        by_rank = dict(self.answers.get(timeout=SECONDS) for _ in self.processes)
        return [by_rank[r] for r in range(len(by_rank))]

    def answer(self, seconds: float) -> tuple[int, tuple[bool, Any]] | None:
        """Return the next (rank, (failed, answer)) within some seconds."""
        try:
            return self.answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, processes: int, port: int, requests: Any, answers: Any) -> None:
    """Run the requested functions in one process."""
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    while True:
        case, arguments = requests.get()
        module, _, name = case.rpartition(".")
        try:
            cases = importlib.import_module(f"tests.distributed.{module or 'cases'}")
            answers.put((rank, (False, getattr(cases, name)(**arguments))))
        except BaseException as error:
            answers.put((rank, (True, f"{error!r}\n{traceback.format_exc()}")))


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
