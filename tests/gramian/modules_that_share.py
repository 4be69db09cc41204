"""Modules whose parameters are used twice, elsewhere, partly, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gramian.architectures import D, randn
from tests.gramian.modules_of_structure import ManyOut


class UsedTwiceInside(nn.Module):
    """One parameter, two uses in one forward."""

    def __init__(self):
        super().__init__()
        self.matrix = randn(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + (x**2 / 5) @ self.matrix


class Product(nn.Module):
    def __init__(self, matrix: nn.Parameter):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class SharedByTwoModules(nn.Module):
    def __init__(self):
        super().__init__()
        matrix = randn(D, 3)
        self.one, self.two = Product(matrix), Product(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x**2 / 5)


class SharedByLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class SharedByParentAndChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(D, D)
        self.alias = self.child.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x).tanh() @ self.alias


class SharedTransposed(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, D), nn.Linear(D, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x.abs() * 3).long().clamp(max=10)).tanh())


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + self.module(x**2 / 5)


class CalledOnParts(nn.Module):
    """A module that calls the same network on two slices of the features."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :3]) + self.net(x[:, 3:])


class CalledOnceInVain(nn.Module):
    """A module that calls a layer twice, once without a gradient: last-in-first-out pairing keeps a stale input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        unused = self.linear(torch.eye(D, dtype=x.dtype))
        y = self.linear(x)
        self.linear(x * 2)
        return y.tanh() + unused.detach().sum()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.never, self.matrix = nn.Linear(D, 3), nn.Linear(D, 3), randn(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.never(x)
        return self.linear(x)


class Frozen(nn.Module):
    """Frozen and trainable parameters in one module, and frozen modules before and after."""

    def __init__(self):
        super().__init__()
        self.a, self.b = randn(D, D), nn.Parameter(torch.randn(D, D), requires_grad=False)
        self.before, self.mixed, self.after = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.before.requires_grad_(False)
        self.after.requires_grad_(False)
        self.mixed.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x).tanh()
        return self.after(self.mixed(h @ self.a + h**2 @ self.b).tanh())


class FrozenBranch(nn.Module):
    """A module with two outputs, one of which needs no gradient."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = randn(D, 3), nn.Parameter(torch.randn(D, 3), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.a, x @ self.b

    def __init__(self):
        super().__init__()
        self.both = self.Both()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.both(x), dim=1)


class TrainableButUnusedThere(nn.Module):
    """A module with a parameter that requires grad, but an output that does not."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.unused = nn.Parameter(torch.randn(D, D), requires_grad=False), randn(3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.frozen

    def __init__(self):
        super().__init__()
        self.inner, self.linear = self.Inner(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(x))


class UnusedOutput(nn.Module):
    """A module with two outputs, one of which is never used."""

    def __init__(self):
        super().__init__()
        self.many = ManyOut()

    def forward(self, x: Tensor) -> Tensor:
        return self.many(x)["first"][0]


class FreeParameters(nn.Module):
    """The root itself has parameters, in addition to modules."""

    def __init__(self):
        super().__init__()
        self.matrix, self.shift, self.scalar, self.linear = randn(D, D), randn(D), randn(), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x @ self.matrix + self.shift).tanh() * self.scalar)


class ParentReadsChild(nn.Module):
    """The child's forward is never called: its parameters are used functionally."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight, self.linear.bias)


class ParentAlsoReadsChild(nn.Module):
    """The child is called, and its weight is also read: hook-only engines silently lose the second use."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(x**2, self.linear.weight)


class ReadTwoLevelsUp(nn.Module):
    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("never called")

    def __init__(self):
        super().__init__()
        self.middle, self.table = self.Middle(), nn.ParameterDict({"a": randn(3), "b": nn.ParameterList([randn(3)])})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.middle.leaf.weight.T * self.table["a"]).tanh() * self.table["b"][0]


class ReadOutside(nn.Module):
    """A regulariser: the loss reads parameters that have no instance at all."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 + self.linear.weight.square().sum())
