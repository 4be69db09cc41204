from __future__ import annotations

import pytest

from tests.distributed import cases
from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pools():
    """The pool of W processes, by W: started when first asked for."""
    started: dict[int, Pool] = {}

    def pool(processes: int) -> Pool:
        if processes not in started:
            started[processes] = Pool(processes)
        return started[processes]

    yield pool
    for running in started.values():
        running.end()


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
