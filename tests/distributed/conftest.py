from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.distributed import cases
from tests.distributed.pool import Pool


@contextmanager
def pools_by_size() -> Iterator[Callable[[int], Pool]]:
    started: dict[int, Pool] = {}

    def pool(processes: int) -> Pool:
        if processes not in started:
            started[processes] = Pool(processes)
        return started[processes]

    try:
        yield pool
    finally:
        for running in started.values():
            running.end()


@pytest.fixture(scope="session")
def pools():
    """Return the pool of W processes, by W; start it when it is first requested."""
    with pools_by_size() as pool:
        yield pool


@pytest.fixture(scope="module")
def own_pools():
    """Return the same, with processes that run only one module's tests: DeepSpeed's settings persist."""
    with pools_by_size() as pool:
        yield pool


@pytest.fixture(scope="session")
def alone():
    """Train with one process; each configuration once."""
    known: dict[str, dict] = {}

    def train(**configuration) -> dict:
        key = repr(sorted(configuration.items()))
        if key not in known:
            known[key] = cases.train(**configuration)
        return known[key]

    return train
