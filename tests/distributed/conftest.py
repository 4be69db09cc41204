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
    """The pool of W processes, by W: started when first asked for."""
    with pools_by_size() as pool:
        yield pool


@pytest.fixture(scope="module")
def own_pools():
    """The same, of processes that run nothing but one module's tests: DeepSpeed sets what stays set."""
    with pools_by_size() as pool:
        yield pool


@pytest.fixture(scope="session")
def alone():
    """What one process trains; each configuration once."""
    known: dict[str, dict] = {}

    def train(**configuration) -> dict:
        key = repr(sorted(configuration.items()))
        if key not in known:
            known[key] = cases.train(**configuration)
        return known[key]

    return train
