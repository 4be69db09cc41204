"""(G, w) -> the metrics logged under `jd/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

# A cosine this small is rounding, not a conflict: a weighting's solution makes many products exactly 0.
_NO_CONFLICT = 1e-6
# With more groups, the cosines of all pairs make too many lines in a log: 8 groups have 28.
_FEW = 8

Key = str | tuple[str, str]
"""Identifies a number: the key it is logged under, or the names of the two groups whose cosine it is."""


class Metrics(NamedTuple):
    """The metrics of one step: keys, and values [q], which may still be computing on a GPU."""

    keys: Sequence[Key]
    values: Tensor


def step_metrics(
    gramians: Tensor, weights: Tensor, means: Tensor | None, counts: Tensor, groups: Tensor, names: Mapping[int, str]
) -> Metrics:
    """Compute a step's metrics.

    With S [K, m] the membership of the m objectives in the K groups, the row of group k is (S J)_k, its product with
    the update is (S G w)_k, and the step goes against the group if that is negative. The update here is J^T w, before
    clipping and the optimizer. Over blocks of parameters, Gramians and products add up, and weights are averaged.

    Args:
        gramians: [B, m, m], one per block of parameters.
        weights: [B, m], one set per block.
        means: [m] each objective's loss per token; None if unknown.
        counts: [m] the number of tokens of each objective.
        groups: [m] the group id of each objective.
        names: The names of the K groups; empty if there are none.

    Returns:
        `conflicts` (share of the pairs of objectives whose product is negative), `cosine` (mean cosine of all pairs),
        `min_gw` (min_k (G w)_k), `grad_norm` (mean norm of a row), `weight_sum`; and for each group in the step
        `weight/<group>` (its share of the weights' sum), `against/<group>` (1 if the step goes against it),
        `loss/<group>` (per token) and `grad_norm/<group>`; all with the prefix `jd/`. And the cosine of each pair of
        groups.
    """
    gramians, weights, counts = (x.detach().double().to(gramians.device) for x in (gramians, weights, counts))
    by_block = _products(gramians, weights)
    step_norm = (weights * by_block).sum().clamp(min=0).sqrt()
    gramian, products, weights = gramians.sum(0), by_block.sum(0), weights.mean(0)
    norms = gramian.diagonal().clamp(min=0).sqrt()
    overall = [products.min(), norms.mean(), weights.sum()]
    if len(gramian) > 1:
        cosines = _cosines(gramian, norms)
        overall += [(cosines < -_NO_CONFLICT).double().mean(), cosines.mean()]
    values = [torch.stack(overall)]
    if names:
        member = (groups.to(gramian.device) == torch.tensor(list(names), device=gramian.device)[:, None]).double()
        among = member @ gramian @ member.T
        norms = among.diagonal().clamp(min=0).sqrt()
        values += [
            (member @ weights) / weights.sum(),
            (member @ products < -_NO_CONFLICT * norms * step_norm).double(),
            norms,
            _cosines(among, norms),
        ]
        if means is not None:
            values.append((member @ (means.double().to(counts.device) * counts)) / (member @ counts))
    return Metrics(_keys(len(gramian) > 1, tuple(names.values()), means is not None), torch.cat(values))


def block_metrics(gramians: Tensor, weights: Tensor) -> Metrics:
    """Compute the metrics of a step that is weighed by blocks of parameters.

    Args:
        gramians: [B, m, m], one per block.
        weights: [B, m], one set per block.

    Returns:
        `jd/against_in_worst_block`: the largest share, over the blocks, of objectives that the block's update goes
        against, (G w)_k < 0.
    """
    gramians, weights = gramians.detach().double(), weights.detach().double().to(gramians.device)
    products = _products(gramians, weights)
    norms = gramians.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    # Small blocks often have an update of 0, up to rounding: its length says nothing.
    summed = (weights.abs() * norms).sum(1, keepdim=True)
    against = (products < -_NO_CONFLICT * norms * summed).double().mean(1)
    return Metrics(("jd/against_in_worst_block",), against.max()[None])


def _products(gramians: Tensor, weights: Tensor) -> Tensor:
    """Compute [B, m], the product of each row with the update, in each block."""
    return (gramians @ weights[:, :, None])[:, :, 0]


def loss_metrics(means: Tensor, counts: Tensor, groups: Tensor, names: Mapping[int, str]) -> Metrics:
    """Compute only the `loss/<group>` of `step_metrics`, for a step that isn't weighed."""
    member = (groups == torch.tensor(list(names), dtype=groups.dtype, device=groups.device)[:, None]).double()
    return Metrics(tuple(f"jd/loss/{name}" for name in names.values()), (member @ (means * counts)) / (member @ counts))


def _cosines(gramian: Tensor, norms: Tensor) -> Tensor:
    """Return the cosines of all pairs of rows, [m (m - 1) / 2]."""
    i, j = torch.triu_indices(len(gramian), len(gramian), offset=1, device=gramian.device)
    return gramian[i, j] / (norms[i] * norms[j]).clamp(min=torch.finfo(torch.float64).tiny)


@lru_cache(maxsize=64)
def _keys(several: bool, names: tuple[str, ...], valued: bool) -> tuple[Key, ...]:
    """Return the keys of `step_metrics`, in its order."""
    keys = ["min_gw", "grad_norm", "weight_sum", *(["conflicts", "cosine"] if several else [])]
    keys += [f"{kind}/{name}" for kind in ("weight", "against", "grad_norm") for name in names]
    losses = [f"jd/loss/{name}" for name in names] if valued else []
    return (*(f"jd/{key}" for key in keys), *combinations(names, 2), *losses)


class Averages:
    """The averages of metrics between two logs, each over the steps that have it."""

    def __init__(self):
        self._sums: dict[Sequence[Key], Tensor] = {}
        self._counts: dict[Sequence[Key], int] = {}

    def add(self, metrics: Metrics) -> None:
        """Add one step's metrics."""
        keys = tuple(metrics.keys)
        self._sums[keys] = self._sums[keys] + metrics.values if keys in self._sums else metrics.values
        self._counts[keys] = self._counts.get(keys, 0) + 1

    def take(self) -> dict[Key, float]:
        """Return the averages since the last call; only this waits for the GPU."""
        sums: dict[Key, float] = {}
        counts: dict[Key, int] = {}
        for keys, values in self._sums.items():
            for key, value in zip(keys, values.tolist(), strict=True):
                sums[key] = sums.get(key, 0.0) + value
                counts[key] = counts.get(key, 0) + self._counts[keys]
        self._sums, self._counts = {}, {}
        return {key: sums[key] / counts[key] for key in sums}


def pairs(averages: Mapping[Key, float]) -> dict[tuple[str, str], float]:
    """Return the cosines, by the names of two groups or losses."""
    return {key: value for key, value in averages.items() if isinstance(key, tuple)}


def readable(averages: Mapping[Key, float]) -> dict[str, float]:
    """Return the metrics to log, sorted by name; cosines only if there are at most 8 groups."""
    cosines = pairs(averages)
    logged = {key: value for key, value in averages.items() if isinstance(key, str)}
    if len({name for pair in cosines for name in pair}) <= _FEW:
        logged |= {f"jd/cosine/{a}/{b}": value for (a, b), value in cosines.items()}
    return dict(sorted(logged.items()))
