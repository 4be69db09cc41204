"""(G, w) -> what is logged under `jd/`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A cosine this small is rounding, not a conflict: at the solution of a weighting, many products are exactly 0.
_NO_CONFLICT = 1e-6


def step_metrics(
    gramian: Tensor, weights: Tensor, means: Tensor, counts: Tensor, groups: Tensor, names: Mapping[int, str]
) -> dict[str, Tensor]:
    """What a step tells about its objectives, as 0-d tensors that nothing waits for.

    With S [K, m] the membership of the m objectives in the K groups, the row of group k is (S J)_k, its product with
    the update is (S G w)_k, and the step goes against the group where that is negative. The update meant here is J^T w,
    before clipping and the optimizer.

    Args:
        gramian: [m, m].
        weights: [m].
        means: [m] each objective's loss a token.
        counts: [m] how many tokens each objective has.
        groups: [m] the id of each objective's group.
        names: The names of the K groups; empty where there are none.

    Returns:
        `conflicts` (share of the pairs of objectives whose product is negative), `cosine` (their mean cosine), `min_gw`
        (min_k (G w)_k), `grad_norm` (mean norm of a row), `weight_sum`; and for each group that is present
        `weight/<group>` (its share of the weights' sum), `against/<group>` (1 where the step goes against it),
        `loss/<group>` (a token) and `grad_norm/<group>`; all with the prefix `jd/`.
    """
    gramian, weights, means, counts = (
        x.detach().double().to(gramian.device) for x in (gramian, weights, means, counts)
    )
    products = gramian @ weights
    norms = gramian.diagonal().clamp(min=0).sqrt()
    found = {
        "min_gw": products.min(),
        "grad_norm": norms.mean(),
        "weight_sum": weights.sum(),
    }
    if len(gramian) > 1:
        i, j = torch.triu_indices(len(gramian), len(gramian), offset=1, device=gramian.device)
        cosines = gramian[i, j] / (norms[i] * norms[j]).clamp(min=torch.finfo(torch.float64).tiny)
        found["conflicts"] = (cosines < -_NO_CONFLICT).double().mean()
        found["cosine"] = cosines.mean()
    step_norm = (weights @ products).clamp(min=0).sqrt()
    for k, name in names.items():
        member = (groups == k).to(gramian)
        norm = (member @ gramian @ member).clamp(min=0).sqrt()
        found[f"weight/{name}"] = (member @ weights) / weights.sum()
        found[f"against/{name}"] = (member @ products < -_NO_CONFLICT * norm * step_norm).double()
        found[f"loss/{name}"] = (member @ (means * counts)) / (member @ counts)
        found[f"grad_norm/{name}"] = norm
    return {f"jd/{key}": value for key, value in found.items()}


class Averages:
    """Metrics averaged over the steps between two logs; each over the steps in which it was there."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Takes in one step's metrics."""
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        """The averages since the last time, sorted by name; only here a GPU is waited for."""
        averages = {key: (self._sums[key] / self._counts[key]).item() for key in sorted(self._sums)}
        self._sums, self._counts = {}, {}
        return averages
