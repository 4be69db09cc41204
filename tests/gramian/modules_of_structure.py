"""Modules with unusual inputs and outputs: trees, strings, keywords, dataclasses, buffers, nothing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.gramian.architectures import D, randn


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Sequential(nn.Sequential(nn.Linear(D, 7), nn.ReLU()), nn.Sequential(nn.Sequential(nn.Linear(7, 5))))
        self.body = nn.Sequential(nn.Sequential(inner, nn.ReLU()), nn.Sequential(nn.Linear(5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.join = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        return self.join((self.left(h).tanh() + self.right(h)).relu())


class TwoMatrices(nn.Module):
    """A module from a pytree of tensors to one tensor, with its own parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = randn(D, 3), randn(D, 3)

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["one"][0] @ self.a + inputs["two"] @ self.b


class ManyOut(nn.Module):
    """A module from one tensor to a pytree of tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = randn(D, 3), randn(D, 4), randn(D, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"first": (x @ self.a, [x @ self.b]), "second": ([((x @ self.c),)],)}


class PyTrees(nn.Module):
    def __init__(self):
        super().__init__()
        self.many, self.two = ManyOut(), TwoMatrices()

    def forward(self, x: Tensor) -> Tensor:
        out = self.many(x)
        mixed = self.two({"one": [x * 2], "two": x.sin()})
        return torch.cat([out["first"][0], out["first"][1][0], out["second"][0][0][0], mixed], dim=1)


class Pair(NamedTuple):
    value: Tensor
    label: str


class NamedOut(nn.Module):
    """A module that returns a named tuple with a string in it."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(D, D), randn(D)

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.linear(x) * self.scale, "linear")


class NamedOuter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = NamedOut(), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).value)


class NoTensorOut(nn.Module):
    """Modules with parameters that return None, an empty tuple, a string."""

    class Observer(nn.Module):
        def __init__(self, result: Any):
            super().__init__()
            self.weight, self.result = randn(D, 2), result

        def forward(self, x: Tensor) -> Any:
            return self.result

    def __init__(self):
        super().__init__()
        self.observers = nn.ModuleList([self.Observer(r) for r in (None, (), "seen", {"one": [None, ()]})])
        self.linear = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for observer in self.observers:
            observer(x)
        return self.linear(x)


class Buffered(nn.Module):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.tensor(1.5))
            self.weight = randn(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * (x @ self.weight)

    def __init__(self):
        super().__init__()
        self.scaled = self.Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class CountedBuffer(nn.Module):
    """Every forward changes a buffer in place: calling the module again must not count."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.weight = randn(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (x @ self.weight).tanh()

    def __init__(self):
        super().__init__()
        self.counter = self.Counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.counter(x)


class SideEffect(nn.Module):
    """A module whose result depends on how often it was called."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.calls = randn(D, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * (x @ self.matrix)

    def __init__(self):
        super().__init__()
        self.counter = self.Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counter.calls = 0
        return self.counter(x)


class Strings(nn.Module):
    """A module with non-tensor arguments, by position and by keyword, and structures of both."""

    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = randn(D, D), randn(D, D)

        def forward(self, x: Tensor, kind: str, *, options: dict[str, Any] | None = None) -> Tensor:
            matrix = self.a if kind == "a" else self.b
            y = x @ matrix
            return y if options is None else y * options["factor"] + options["more"][0]

    def __init__(self):
        super().__init__()
        self.choice, self.head = self.Choice(), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.choice(x, "a").tanh()
        h = self.choice(h, kind="b")
        h = self.choice(h.tanh(), "a", options={"factor": 0.5, "more": [x, None, "text"]})
        return self.head(h)


class Keywords(nn.Module):
    """A module that calls layers by keyword."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.linear(input=x).tanh())


class BatchByKeyword(nn.Module):
    """A module that passes what depends on the batch by keyword, and what doesn't by position."""

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = randn(D)

        def forward(self, shift: Tensor, *, hidden: Tensor) -> Tensor:
            return hidden * self.weight + shift

    def __init__(self):
        super().__init__()
        self.add, self.shift, self.head = self.Add(), nn.Parameter(torch.randn(D)), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.add(self.shift, hidden=x).tanh())


class CalledByForward(nn.Module):
    """`layer.forward(x)` runs no hooks."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one.forward(x).tanh())


class Scripted(nn.Module):
    """A module with a part compiled by TorchScript, which takes no hooks."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script")
            self.part = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Tanh()))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


@dataclass
class Carrier:
    """Not a pytree: torch does not look inside."""

    value: Tensor


class DataclassOut(nn.Module):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = randn(D, 3)

        def forward(self, carrier: Carrier) -> Carrier:
            return Carrier(carrier.value @ self.matrix)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(Carrier(x)).value.tanh()


class SharedDictionary(nn.Module):
    """Adapters that read one dictionary, which the model holds, too."""

    class Adapter(nn.Module):
        def __init__(self, bank: nn.ParameterDict, sign: int):
            super().__init__()
            self.bank, self.sign = bank, sign

        def forward(self, x: Tensor) -> Tensor:
            return x + self.sign * x @ self.bank["matrix"]

    def __init__(self):
        super().__init__()
        self.bank = nn.ParameterDict({"matrix": randn(D, D)})
        self.one, self.two = self.Adapter(self.bank, 1), self.Adapter(self.bank, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class TwoPaths(nn.Module):
    """A part that is held under two paths, in a module that is called again for its own parameter."""

    def __init__(self):
        super().__init__()
        self.scale = randn(D)
        self.one = self.two = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x * self.scale).tanh())


class ScalarOut(nn.Module):
    """A module with a part that returns one number, without a batch dimension."""

    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = randn()

        def forward(self) -> Tensor:
            return self.log.exp()

    def __init__(self):
        super().__init__()
        self.temperature, self.linear = self.Temperature(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.temperature()).tanh()


class Lambda(nn.Module):
    """Modules without parameters, and containers that are never called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.ModuleList([nn.Identity(), nn.Linear(D, 2)])})
        self.act = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["b"][1](self.act(self.layers["b"][0](self.layers["a"](x))))
