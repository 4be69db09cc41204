"""Families of Jacobians whose entries are exact floats, so that their float64 Gramians are exact, too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def integers(generator: torch.Generator, m: int, n: int) -> Tensor:
    return torch.randint(-9, 10, (m, n), generator=generator, dtype=torch.float64)


def random(generator: torch.Generator, m: int) -> Tensor:
    return integers(generator, m, m + 3)


def conflicting_pair(generator: torch.Generator, m: int) -> Tensor:
    jacobian = integers(generator, m, m + 3).abs() + 1
    jacobian[1, ::2] *= -4
    return jacobian


def near_duplicates(generator: torch.Generator, m: int) -> Tensor:
    jacobian = random(generator, m)
    jacobian[1] = jacobian[0] + integers(generator, 1, m + 3)[0] * 2**-10
    jacobian[-1] = -jacobian[0] + integers(generator, 1, m + 3)[0] * 2**-10
    return jacobian


def rank_one(generator: torch.Generator, m: int) -> Tensor:
    scales = integers(generator, m, 1)
    scales[scales == 0] = 1
    return scales * (integers(generator, 1, m).abs() + 1)


def rank_deficient(generator: torch.Generator, m: int) -> Tensor:
    return integers(generator, m, max(1, m - 2))


def duplicates(generator: torch.Generator, m: int) -> Tensor:
    jacobian = random(generator, m)
    jacobian[1] = jacobian[0]
    jacobian[-1] = 2 * jacobian[-2]
    return jacobian


def zero_row(generator: torch.Generator, m: int) -> Tensor:
    jacobian = random(generator, m)
    jacobian[m // 2] = 0
    return jacobian


def tiny(generator: torch.Generator, m: int) -> Tensor:
    return random(generator, m) * 2.0**-40


def huge(generator: torch.Generator, m: int) -> Tensor:
    return random(generator, m) * 2.0**40


def one_long_row(generator: torch.Generator, m: int) -> Tensor:
    jacobian = random(generator, m)
    jacobian[0] *= 2.0**20
    return jacobian


def one_short_row(generator: torch.Generator, m: int) -> Tensor:
    jacobian = random(generator, m)
    jacobian[0] *= 2.0**-20
    return jacobian


def dominated(generator: torch.Generator, m: int) -> Tensor:
    """One row is a positive combination of two others, which conflict."""
    jacobian = conflicting_pair(generator, m)
    jacobian[-1] = jacobian[0] + 2 * jacobian[1]
    return jacobian


def all_equal(generator: torch.Generator, m: int) -> Tensor:
    return random(generator, m)[:1].repeat(m, 1)


def orthogonal(generator: torch.Generator, m: int) -> Tensor:
    return torch.diag(integers(generator, 1, m)[0].abs() + 1)


def opposite(generator: torch.Generator, m: int) -> Tensor:
    """Pareto stationary: 0 is inside the rows' hull."""
    jacobian = random(generator, m)
    jacobian[-1] = -jacobian[:-1].sum(dim=0)
    return jacobian


FAMILIES: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    family.__name__: family
    for family in (
        random,
        conflicting_pair,
        near_duplicates,
        rank_one,
        rank_deficient,
        duplicates,
        zero_row,
        tiny,
        huge,
        one_long_row,
        one_short_row,
        dominated,
        all_equal,
        orthogonal,
        opposite,
    )
}


def jacobians(family: str, sizes: range = range(2, 6), seeds: int = 3) -> list[Tensor]:
    return [FAMILIES[family](torch.Generator().manual_seed(1000 * m + seed), m) for m in sizes for seed in range(seeds)]
