"""Kinds of architectures that TorchJD's engine is tried on, and some that break engines of per-instance gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_jd.gramian import Engine
from tests.gramian.oracle import assert_engine_right, check_step, trainable

D = 6


def randn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Plain(nn.Module):
    """A layer, then a head."""

    def __init__(self, layer: nn.Module, out: int = 4):
        super().__init__()
        self.layer, self.head = layer, nn.LazyLinear(out) if out else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x))


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
    """A pytree of tensors in, one tensor out; parameters of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = randn(D, 3), randn(D, 3)

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["one"][0] @ self.a + inputs["two"] @ self.b


class ManyOut(nn.Module):
    """One tensor in, a pytree of tensors out."""

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
    """An output that is a named tuple, with a string in it."""

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
    """The same network on two slices of the features."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :3]) + self.net(x[:, 3:])


class CalledOnceInVain(nn.Module):
    """Two calls, one of which has no gradient: last-in-first-out pairing keeps a stale one."""

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
    """Two outputs, of which one needs no gradient."""

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
    """Holds a parameter that requires grad, yet its output does not."""

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
    """A module with two outputs, one of which leads nowhere."""

    def __init__(self):
        super().__init__()
        self.many = ManyOut()

    def forward(self, x: Tensor) -> Tensor:
        return self.many(x)["first"][0]


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
    """A buffer that every forward changes in place: calling the module again must not count."""

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
    """Its result depends on how often it was called."""

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
    """Arguments that are no tensors, by position and by keyword, and structures with both."""

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
    """Layers called by keyword."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.linear(input=x).tanh())


class BatchByKeyword(nn.Module):
    """What depends on the batch comes by keyword, what does not comes first."""

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


class Attention(nn.Module):
    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=batch_first), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.head(self.attention(x, x, x)[0])
        return y if self.batch_first else y.transpose(0, 1)


class Transformer(nn.Module):
    def __init__(self, batch_first: bool = True, norm_first: bool = False):
        super().__init__()
        self.batch_first = batch_first
        self.model = nn.Transformer(
            D, 2, 1, 1, 8, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.model(x, x.flip(-1))
        return y if self.batch_first else y.transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], batch_first: bool = True, **options: Any):
        super().__init__()
        self.batch_first = batch_first
        self.rnn, self.head = kind(D, 5, batch_first=batch_first, **options), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.head(self.rnn(x)[0])
        return y if self.batch_first else y.transpose(0, 1)


class Cell(nn.Module):
    """A cell called once a time step: as many uses of its parameters."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell = kind(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class InstanceNormNet(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3)) + self.norm(self.conv(x)).sin().sum((2, 3))


class Convolutions(nn.Module):
    """A small network of images: strides, groups, dilation, padding modes, pooling, norms, residuals."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding="same", groups=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1, bias=False)
        )
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, dilation=2), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.down(h + self.block(h)))


class ConvTransposed(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        kinds = {
            1: (nn.Conv1d, nn.ConvTranspose1d),
            2: (nn.Conv2d, nn.ConvTranspose2d),
            3: (nn.Conv3d, nn.ConvTranspose3d),
        }
        conv, transposed = kinds[dims]
        self.down, self.up = conv(3, 4, 2, stride=2), transposed(4, 3, 2, stride=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh())


class FreeParameters(nn.Module):
    """Parameters of the root itself, beside modules."""

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
    """The child is called, and its weight is read beside: hook-only engines lose the second use in silence."""

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


class InPlace(nn.Module):
    """Works in place on outputs of layers."""

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
    """Outputs that are views of each other, split, transposed, and written to."""

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
        """Draws inside a module that only tier 2 covers: calling it again must draw the same, or be caught."""

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
    """[B*T, d] inside, as OPT; then stacked halves, [2B, T, d], as preference trainers."""

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


class Bags(nn.Module):
    """nn.EmbeddingBag with offsets: one leading dimension of indices, another of outputs."""

    def __init__(self, mode: str):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, D, mode=mode), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 3).long().clamp(max=8)
        return self.head(self.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1])).tanh())


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(D, D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.flip(-1))


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


class WeightNorm(nn.Module):
    """Weights computed from parameters at each forward."""

    def __init__(self, kind: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.layer = kind(nn.Linear(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class NoModules(nn.Module):
    """Only parameters, and losses of rank 0 to 4 come from such."""

    def __init__(self, *shape: int):
        super().__init__()
        self.matrix = randn(D, *shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.matrix, dims=([1], [0]))


class MultiLinear(nn.Module):
    """Norms and scales of many kinds, some without bias or weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(D, D, bias=False),
            nn.LayerNorm(D, bias=False),
            nn.RMSNorm(D),
            nn.LayerNorm(D, elementwise_affine=False),
            nn.PReLU(D),
            nn.Linear(D, D),
            nn.PReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Normalised(nn.Module):
    """RMSNorms, and what looks like one: each is a scale of w or 1 + w by a function of its own."""

    FUNCTIONS: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "rms": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        "large eps": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.5),
        "no eps": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True)),
        "clipped": lambda x: (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).clamp(-1.5, 1.5),
        "sum, not mean": lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6),
        "centred": lambda x: x - x.mean(-1, keepdim=True),
        "bounded where large": lambda x: torch.tanh(x / 50) * 50 * torch.rsqrt(x.square().mean(-1, keepdim=True)),
    }

    class Scale(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor], offset: float):
            super().__init__()
            self.weight, self.function, self.offset = randn(D), function, offset

        def forward(self, x: Tensor) -> Tensor:
            return (self.offset + self.weight) * self.function(x)

    def __init__(self):
        super().__init__()
        scales = [self.Scale(f, offset) for f in self.FUNCTIONS.values() for offset in (0.0, 1.0)]
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in scales])
        self.scales = nn.ModuleList(scales)

    def forward(self, x: Tensor) -> Tensor:
        return sum(scale(layer(x).tanh()) for layer, scale in zip(self.layers, self.scales, strict=True))


class BiasKeepsNoInput(nn.Module):
    """Inputs of layers whose gradients need none are changed in place: autograd has not saved them."""

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
    """Instances in another order inside, as models that sort them by length have."""

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


class CalledByForward(nn.Module):
    """`layer.forward(x)` runs no hooks."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one.forward(x).tanh())


class Scripted(nn.Module):
    """A part that is compiled by TorchScript, which takes no hooks."""

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
    """No pytree: torch does not look inside."""

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
    """Adapters that read one dictionary, which the model holds too."""

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
    """A part that is held at two paths, in a module that is called again for its own parameter."""

    def __init__(self):
        super().__init__()
        self.scale = randn(D)
        self.one = self.two = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x * self.scale).tanh())


class ScalarOut(nn.Module):
    """A part gives one number, without a batch."""

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


VECTORS: dict[str, Callable[[], nn.Module]] = {
    "nested": Nested,
    "branches": Branches,
    "pytrees": PyTrees,
    "named tuple with a string": NamedOuter,
    "no tensor out": NoTensorOut,
    "parameter used twice inside": UsedTwiceInside,
    "parameter of two modules": SharedByTwoModules,
    "weight of two Linears": SharedByLinears,
    "parameter of parent and child": SharedByParentAndChild,
    "module called twice": CalledTwice,
    "module called on parts": CalledOnParts,
    "module called in vain": CalledOnceInVain,
    "unused": Unused,
    "frozen": Frozen,
    "frozen branch": FrozenBranch,
    "output without gradient": TrainableButUnusedThere,
    "unused output": UnusedOutput,
    "buffer": Buffered,
    "buffer that counts": CountedBuffer,
    "side effect": SideEffect,
    "strings": Strings,
    "keywords": Keywords,
    "batch by keyword": BatchByKeyword,
    "free parameters": FreeParameters,
    "parent reads child": ParentReadsChild,
    "parent also reads child": ParentAlsoReadsChild,
    "read two levels up": ReadTwoLevelsUp,
    "weight in the loss": ReadOutside,
    "in place": InPlace,
    "in place on inputs": BiasKeepsNoInput,
    "called by forward": CalledByForward,
    "scripted part": Scripted,
    "dataclasses": DataclassOut,
    "shared dictionary": SharedDictionary,
    "two paths": TwoPaths,
    "scalar out": ScalarOut,
    "views": Views,
    "random": Random,
    "dropouts": Dropouts,
    "bag of sums": lambda: Bags("sum"),
    "bag of means": lambda: Bags("mean"),
    "bilinear": Bilinear,
    "custom function": Custom,
    "control flow": DataDependent,
    "weight norm": lambda: WeightNorm(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: WeightNorm(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: WeightNorm(nn.utils.parametrizations.orthogonal),
    "many norms": MultiLinear,
    "RMSNorms, and alike": Normalised,
    "containers": Lambda,
    **{
        f"outputs of rank {len(shape) + 1}": lambda shape=shape: NoModules(*shape)
        for shape in [(), (2,), (2, 3), (2, 1, 3)]
    },
    "RNN cell over features": lambda: Plain(nn.Linear(D, 3), 0),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "attention, time first": lambda: Attention(batch_first=False),
    "transformer": Transformer,
    "transformer, norm first": lambda: Transformer(norm_first=True),
    "transformer, time first": lambda: Transformer(batch_first=False),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU, num_layers=2),
    "LSTM": lambda: Recurrent(nn.LSTM, bidirectional=True),
    "LSTM, time first": lambda: Recurrent(nn.LSTM, batch_first=False),
    "RNN cell": lambda: Cell(nn.RNNCell),
    "LSTM cell": lambda: Cell(nn.LSTMCell),
    "flattened and stacked": Flattened,
    "gathered": Gathered,
    "shared table": SharedTransposed,
    "in another order": Reordered,
    "batch last": BatchLast,
    "one by one": OneByOne,
    "linear in rank 3": lambda: Plain(nn.Linear(D, 3)),
    "conv1d": lambda: Plain(nn.Conv1d(5, 4, 3)),
    "transposed conv1d": lambda: Plain(nn.ConvTranspose1d(5, 4, 3)),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "instance norm": lambda: InstanceNormNet(affine=True),
    "instance norm without parameters": lambda: InstanceNormNet(),
    "convolution": lambda: Plain(nn.Conv2d(3, 2, 3)),
    "depthwise": lambda: Plain(nn.Conv2d(3, 6, 3, groups=3, padding=1)),
    "circular": lambda: Plain(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
    "transposed convolution": lambda: Plain(nn.ConvTranspose2d(3, 2, 3)),
}


def cases(kinds: dict[str, Callable[[], nn.Module]]) -> list:
    return [pytest.param(build, id=name) for name, build in kinds.items()]


def build_in_float64(build: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested_tensor")
        model = build().double()
    with torch.no_grad():
        model(x)  # Lazy layers.
    return model.double()


def losses_from(model: nn.Module, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    def losses(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        y = model(torch.randn(*shape, generator=generator, dtype=torch.float64))
        y = y.flatten(1) if y.dim() > 1 else y[:, None]
        # Not one target for all: after a norm, that loss would be constant.
        return (y - torch.arange(y.shape[1]).sin()).square().mean(1)

    return losses


def assert_right(build: Callable[[], nn.Module], *shape: int) -> None:
    model = build_in_float64(build, torch.ones(*shape, dtype=torch.float64))
    # A power iteration goes on with each forward: what it gives is not repeated.
    assert_engine_right(
        model, losses_from(model, shape), own_graph=not any("_u" in name for name, _ in model.named_buffers())
    )


@pytest.mark.parametrize("size", [4, D, 1], ids=["B=4", "B==width", "B=1"])
@pytest.mark.parametrize("build", cases(VECTORS))
def test_of_vectors(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, D)


@pytest.mark.parametrize("size", [4, 5, D], ids=["B=4", "B==T", "B==width"])
@pytest.mark.parametrize("build", cases(SEQUENCES))
def test_of_sequences(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, 5, D)


@pytest.mark.parametrize("size", [2, 3], ids=["B=2", "B==channels"])
@pytest.mark.parametrize("build", cases(IMAGES))
def test_of_images(build: Callable[[], nn.Module], size: int):
    assert_right(build, size, 3, 9, 9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_of_convolutions(dims: int):
    assert_right(lambda: ConvTransposed(dims), 2, 3, *[4] * dims)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])  # Those of the CPU.
def test_of_attention_backends(backend: SDPBackend):
    model = build_in_float64(Transformer, torch.ones(4, 5, D, dtype=torch.float64))
    losses = losses_from(model, (4, 5, D))

    def under(step: int) -> Tensor:
        with sdpa_kernel(backend):
            return losses(step)

    assert_engine_right(model, under)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_with_running_statistics(affine: bool):
    """Statistics of each instance in training; the buffers average over the batch and change with each forward."""
    model = build_in_float64(
        lambda: InstanceNormNet(affine=affine, track_running_stats=True), torch.ones(2, 3, 9, 9).double()
    )
    losses = losses_from(model, (2, 3, 9, 9))
    engine = Engine(model)
    for mode in (True, False, True):
        model.train(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            y = losses(0)
            before = {k: v.clone() for k, v in model.state_dict().items()}
            assert not check_step(engine, trainable(model), y)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("build", [CountedBuffer, lambda: WeightNorm(nn.utils.parametrizations.spectral_norm)])
def test_buffers_are_left_as_the_forward_left_them(build: Callable[[], nn.Module]):
    """Calling a module again to form rows must not be seen in its buffers."""
    model = build_in_float64(build, torch.ones(4, D, dtype=torch.float64)).train()
    engine = Engine(model)
    for step in range(2):
        losses = losses_from(model, (4, D))(step)
        before = {k: v.clone() for k, v in model.named_buffers()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            engine.compute_gramian(losses)
        assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_a_module_that_is_called_again_keeps_its_tensors():
    model = build_in_float64(TwoPaths, torch.ones(2, D).double())
    before = [*model.parameters(), *model.buffers()]
    engine = Engine(model)
    engine.compute_gramian(losses_from(model, (3, D))(0))
    assert engine.tiers()["scale"] == 2
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], before, strict=True))


@pytest.mark.parametrize("build", [SharedDictionary, Custom])
def test_of_what_tier_2_covers(build: Callable[[], nn.Module]):
    """Adapters that read one dictionary; functions that only plain autograd knows."""
    model = build_in_float64(build, torch.ones(2, D).double())
    engine = Engine(model)
    engine.compute_gramian(losses_from(model, (3, D))(0))
    assert 3 not in engine.tiers().values()


def test_a_plain_backward_through_hooks_is_a_plain_backward():
    """Hooks change no gradient and no output, whether the engine was used or not."""
    for build in (Branches, PyTrees, InPlace, Strings, SharedByTwoModules):
        model = build_in_float64(build, torch.ones(4, D, dtype=torch.float64))
        plain = losses_from(model, (4, D))(0)
        plain.sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        engine = Engine(model)
        for use in (False, True):
            losses = losses_from(model, (4, D))(0)
            assert torch.equal(losses, plain)
            if use:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    engine.compute_gramian(losses)
            losses.sum().backward()
            for name, p in model.named_parameters():
                assert torch.equal(p.grad, expected[name])
            model.zero_grad()
