"""With a large Gramian, a step copies only scalars to the host, as far as a CPU can tell; never the Gramian."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_jd.weighting import WEIGHTINGS, LossWeighting, build_weighting
from hf_jd.weighting._solvers.projection import together

LOSSES = {name for name, cls in WEIGHTINGS.items() if issubclass(cls, LossWeighting)}
ON_THE_CPU = {"mgda", "gapo", "cagrad", "raco", "pcd"}  # one active set per problem, which changes row by row
SOLVED = {"upgrad": 80, "cr_mogm": 80, "nash_mtl": 60, "fairgrad": 60}  # tests for the end of an iteration


class Synchronisations(TorchDispatchMode):
    """A counter of what makes the host wait for a device: reading scalars, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select"}:
            self.counts[name] += 1
        if name in {"index", "index_put", "index_put_"} and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.counts["index by a mask"] += 1
        return func(*args, **(kwargs or {}))


def gramian(m: int) -> Tensor:
    rows = torch.randn(m, 4 * m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = rows @ rows.T
    return (product + product.T) / 2


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the sizes of tensors copied to the host."""
    counts: list[int] = []

    def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **kwargs: (counts.append(tensor.numel()), method(tensor, *args, **kwargs))[1]

    for name in ("numpy", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, recorded(getattr(Tensor, name)))
    return counts


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name not in LOSSES | ON_THE_CPU | {"dualproj"}])
def test_a_step_reads_a_few_scalars(name: str, copies: list[int]) -> None:
    weighting = build_weighting(name, **({"weights": [1.0] * 64} if name == "constant" else {}))
    with Synchronisations() as synchronisations:
        weighting(gramian(64))
    memory = 64 * 64 if name == "gradvac" else 64  # stateful weightings store their memory on the CPU
    assert all(size <= memory for size in copies)
    assert synchronisations.counts.total() <= SOLVED.get(name, 6), synchronisations.counts


@pytest.mark.parametrize("problems", [1, 64])
def test_the_projection_of_a_large_gramian_stays_on_its_device(problems: int, copies: list[int]) -> None:
    with Synchronisations() as synchronisations:
        together(gramian(64), torch.eye(64, dtype=torch.float64)[:problems])
    assert not copies
    assert synchronisations.counts.total() <= SOLVED["upgrad"], synchronisations.counts


@pytest.mark.parametrize("name", sorted(ON_THE_CPU))
def test_what_is_solved_on_the_cpu_is_copied_once(name: str, copies: list[int]) -> None:
    build_weighting(name)(gramian(64))
    assert sum(size == 64 * 64 for size in copies) <= 2  # .cpu().numpy() is one copy, recorded twice
    assert len(copies) <= 8
