"""TEMPORARY brute-force stand-in with the final API; being replaced by the real engine."""
import torch
from torch import Tensor, nn


class Jacobian:
    """The Jacobian of m objectives with regard to named parameters, and what a step needs of it."""

    def __init__(self, rows: dict[nn.Parameter, Tensor]):
        self._rows = rows  # each [m, *parameter.shape]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._rows)

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def dense(self) -> Tensor:
        """[m, n]: every row, parameters flattened in order."""
        return torch.cat([r.flatten(1) for r in self._rows.values()], dim=1)

    def gramian(self) -> Tensor:
        d = self.dense()
        return d @ d.T

    def weighted_sum(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        return {p: torch.einsum("m,m...->...", weights.to(r.dtype), r) for p, r in self._rows.items()}

    def select(self, index: Tensor) -> "Jacobian":
        return Jacobian({p: r[index] for p, r in self._rows.items()})

    def scaled(self, factors: Tensor) -> "Jacobian":
        """Each row multiplied by its factor [m]."""
        return Jacobian({p: torch.einsum("m,m...->m...", factors.to(r.dtype), r) for p, r in self._rows.items()})

    def __add__(self, other: "Jacobian") -> "Jacobian":
        """The same objectives, contributions of two batches added."""
        return Jacobian({p: r + other._rows[p] for p, r in self._rows.items()})

    @staticmethod
    def cat(parts: list["Jacobian"]) -> "Jacobian":
        """The objectives of several batches, one below the other."""
        return Jacobian({p: torch.cat([j._rows[p] for j in parts]) for p in parts[0]._rows})
