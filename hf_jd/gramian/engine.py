"""TEMPORARY brute-force stand-in with the final API; being replaced by the real engine."""
import torch
from torch import Tensor, nn

from hf_jd.gramian.jacobians import Jacobian


class Engine:
    def __init__(self, *modules: nn.Module, batch_dim: int | None = 0, keep_rows="auto", check: bool = True):
        self.modules = modules

    def compute_jacobian(self, losses: Tensor, segments: Tensor | None = None) -> Jacobian:
        parameters = list(dict.fromkeys(p for m in self.modules for p in m.parameters() if p.requires_grad))
        rows = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in losses]
        return Jacobian({p: torch.stack([torch.zeros_like(p) if r[i] is None else r[i] for r in rows]) for i, p in enumerate(parameters)})

    def compute_gramian(self, losses: Tensor, segments: Tensor | None = None) -> Tensor:
        self._jacobian = self.compute_jacobian(losses, segments)
        return self._jacobian.gramian()

    def accumulate_grad(self, weights: Tensor) -> None:
        for p, g in self._jacobian.weighted_sum(weights).items():
            p.grad = g if p.grad is None else p.grad + g

    def detach(self) -> None:
        pass
