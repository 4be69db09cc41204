"""Modules that work in place, reorder, gather, draw at random, or use custom functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.gramian.architectures import D, randn


class InPlace(nn.Module):
    """A module that changes outputs of layers in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h.relu_()
        h = self.norm(h)
        h += x
        h[:, 0] *= 2
        y = self.two(h)
        y.mul_(0.5).sigmoid_()
        return y


class Views(nn.Module):
    """Outputs that are views of each other: split, transposed, and changed in place."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k = k.clone()
        k[..., 0] = q[..., 0]
        return self.out((q * k).tanh() * v)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.noisy = nn.Linear(D, D), self.Noisy()

    class Noisy(nn.Module):
        """A module that draws, and that only tier 2 covers: another call must draw the same, or be caught."""

        def __init__(self):
            super().__init__()
            self.matrix = randn(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (x + torch.rand_like(x)) @ self.matrix

    def forward(self, x: Tensor) -> Tensor:
        return self.noisy(self.linear(x).tanh())


class Dropouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Flattened(nn.Module):
    """[B*T, d] inside, as in OPT; then stacked halves, [2B, T, d], as in preference trainers."""

    def __init__(self):
        super().__init__()
        self.flat, self.stacked, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.flat(x.flatten(0, 1)).view_as(x).tanh()
        one, two = self.stacked(torch.cat([h, h.flip(-1)])).chunk(2)
        return self.head(one * two)


class Gathered(nn.Module):
    """Experts see a selection of tokens; some see none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        kind = (flat[:, 0] * 3).long().abs() % 2  # The third expert is never chosen.
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = kind == i
            y[chosen] = expert(flat[chosen]).tanh()
        return y.view_as(x)


class CustomFunction(torch.autograd.Function):
    """Not differentiable by vmap: no setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Custom(nn.Module):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = randn(D)

        def forward(self, x: Tensor) -> Tensor:
            return CustomFunction.apply(x, self.weight)

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(D, D), self.Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.linear(x).tanh())


class DataDependent(nn.Module):
    """Control flow on values: `.item()` breaks vmap."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = randn(D, 3), randn(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row @ (self.a if row[0].item() > 0 else self.b) for row in x])

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class BiasKeepsNoInput(nn.Module):
    """A module that changes inputs in place that no gradient of a layer needs, so that autograd has not saved them."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = randn(D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    def __init__(self):
        super().__init__()
        self.first, self.biased, self.shifted = nn.Linear(D, D), nn.Linear(D, D), self.Shift()
        self.biased.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.biased(h)
        h += y
        z = self.shifted(h)
        h *= 2
        return (h + z).tanh()


class Reordered(nn.Module):
    """A module that reorders instances, like models that sort them by length."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.flip(0))).flip(0)


class BatchLast(nn.Module):
    """A layer of [T, d, B]."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = randn(3, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.matrix @ x

    def __init__(self):
        super().__init__()
        self.product = self.Product()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.permute(1, 2, 0)).permute(2, 0, 1).tanh()


class OneByOne(nn.Module):
    """Layers called for each instance alone."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(self.linear(one)) for one in x])
