"""Random small models compared with brute force: layers, sharing, call order, in-place activations, shapes, segments.

25 examples by default; `HF_JD_FUZZ=300 pytest tests/gramian/test_fuzz.py` tries more, different ones each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.gramian.oracle import assert_engine_right, tiers_line

EXAMPLES = int(os.environ.get("HF_JD_FUZZ", "25"))
VOCABULARY = 7


class Scale(nn.Module):
    """A layer without a rule: a shift and a scale by a function of the input."""

    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a.tanh() + self.b * x.sin()


class Functional(nn.Module):
    """A Linear layer that is never called."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight) + self.linear.bias


class Positions(nn.Module):
    """A table looked up without a batch dimension, along the second to last axis."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(torch.arange(x.shape[-2]))


class Flat(nn.Module):
    """A layer that flattens the leading dimensions into one."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.reshape(-1, x.shape[-1]))).reshape(x.shape)


class TimeFirst(nn.Module):
    """Swaps the two leading dimensions."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Stacked(nn.Module):
    """Twice the batch: [2B, ...]."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.linear(torch.cat([x, x.sin()])).chunk(2)
        return one * two.tanh()


class Mixing(nn.Module):
    """Attention over the tokens, with its own parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.v = nn.Linear(width, width, bias=False), nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ x.transpose(-1, -2)).softmax(-1) @ (x @ self.v)


class Convolution(nn.Module):
    """A convolution along the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.GroupNorm(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Keyword(nn.Module):
    """Called with keywords, returns a structure."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = self.Inner(width)

    class Inner(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.linear, self.gain = nn.Linear(width, width), nn.Parameter(torch.randn(width))

        def forward(self, *, hidden: Tensor, name: str) -> dict[str, Any]:
            return {"out": (self.linear(hidden) * self.gain, None), "name": name}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(hidden=x, name="keyword")["out"][0]


TOKENWISE = {
    "linear": lambda w: nn.Linear(w, w),
    "linear without bias": lambda w: nn.Linear(w, w, bias=False),
    "wide": lambda w: nn.Sequential(nn.Linear(w, 2 * w + 1), nn.Tanh(), nn.Linear(2 * w + 1, w)),
    "layer norm": nn.LayerNorm,
    "rms norm": nn.RMSNorm,
    "scale": Scale,
    "functional": Functional,
    "stacked": Stacked,
    "keyword": Keyword,
    "prelu": lambda w: nn.PReLU(),
    "relu": lambda w: nn.ReLU(),
    "relu in place": lambda w: nn.Sequential(nn.Linear(w, w), nn.ReLU(inplace=True)),
    "tanh": lambda w: nn.Tanh(),
}
SEQUENCEWISE = {
    "positions": Positions,
    "flat": Flat,
    "time first": TimeFirst,
    "attention": Mixing,
    "convolution": Convolution,
    "multi-head": lambda w: nn.TransformerEncoderLayer(w, 1, w + 1, dropout=0.0, batch_first=True),
}
ACTIVATIONS = {"tanh": torch.tanh, "in place": lambda x: x.clone().relu_().add_(0.1 * x), "none": lambda x: x}


@dataclass(frozen=True)
class Spec:
    """A random model and its step.

    Attributes:
        layers: What each call applies, by name; a repeated pair (name, index) is the same module called again.
        residual: For each call, whether its input is added.
        checkpointed: For each call, None or the kind of checkpointing (True: reentrant).
        shapes: (B, T) of the two steps; T None: no tokens.
        width: Features.
        tied: Whether tokens come from an embedding whose table is also the head; else random features.
        frozen: Which parameters are frozen: a bit mask by position.
        groups: None, "instances" or "tokens".
        losses: The number K of losses per instance; 1: [m].
        seed: The seed of parameters and inputs.
    """

    layers: tuple[tuple[str, int], ...]
    residual: tuple[bool, ...]
    checkpointed: tuple[bool | None, ...]
    shapes: tuple[tuple[int, int | None], ...]
    width: int
    tied: bool
    frozen: int
    groups: str | None
    losses: int
    seed: int


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    tokens = draw(st.booleans())
    names = sorted(TOKENWISE) + (sorted(SEQUENCEWISE) if tokens else [])
    count = draw(st.integers(1, 5))
    layers = tuple((draw(st.sampled_from(names)), draw(st.integers(0, 1))) for _ in range(count))
    groups = (
        draw(st.sampled_from([None, None, "instances", "tokens"]))
        if tokens
        else draw(st.sampled_from([None, "instances"]))
    )
    if groups == "tokens":  # Tokens of several objectives in one row must not mix.
        layers = tuple((n, i) for n, i in layers if n in TOKENWISE and n != "stacked") or (("linear", 0),)
    sizes = st.sampled_from([1, 2, 3, 4, 5, 6])
    first = draw(sizes), draw(st.sampled_from([2, 3, 4, 5])) if tokens else None
    second = draw(st.sampled_from([first, (draw(sizes), first[1]), (first[0], draw(sizes) if tokens else None)]))
    return Spec(
        layers=layers,
        residual=tuple(draw(st.booleans()) for _ in layers),
        checkpointed=tuple(draw(st.sampled_from([None] * 5 + [True, False])) for _ in layers),
        shapes=(first, second),
        width=draw(st.sampled_from([2, 3, 4, 5, 6])),
        tied=tokens and draw(st.booleans()),
        frozen=draw(st.sampled_from([0, 0, 0b1, 0b10110, 0b1010101])),
        groups=groups,
        losses=1 if groups else draw(st.sampled_from([1, 1, 2])),
        seed=draw(st.integers(0, 5)),
    )


class Model(nn.Module):
    def __init__(self, spec: Spec):
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        kinds = TOKENWISE | SEQUENCEWISE
        self.pool = nn.ModuleDict(
            {f"{n} {i}".replace(".", ""): kinds[n](spec.width) for n, i in dict.fromkeys(spec.layers)}
        )
        self.table = nn.Embedding(VOCABULARY, spec.width) if spec.tied else None
        self.head = nn.Linear(spec.width, VOCABULARY if spec.tied else 3, bias=False)
        if spec.tied:
            self.head.weight = self.table.weight
        for i, p in enumerate(list(self.parameters())[:-1]):
            p.requires_grad_(not (spec.frozen >> (i % 8)) & 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.table is not None:
            x = self.table(x)
        calls = zip(self.spec.layers, self.spec.residual, self.spec.checkpointed, strict=True)
        for (name, index), residual, kind in calls:
            module = self.pool[f"{name} {index}"]
            inner = x.clone() if residual else x
            y = module(inner) if kind is None or not x.requires_grad else checkpoint(module, inner, use_reentrant=kind)
            x = (x + y if residual else y).tanh()
        return self.head(x)


def batch(spec: Spec, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * spec.seed + step)
    size, length = spec.shapes[step]
    if spec.tied:
        return torch.randint(VOCABULARY, (size, length), generator=generator)
    shape = (size, spec.width) if length is None else (size, length, spec.width)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def segments_of(spec: Spec, step: int) -> Tensor | None:
    """Return the objective of each instance or token, in any order; some have none."""
    generator = torch.Generator().manual_seed(7 + spec.seed + step)
    size, length = spec.shapes[step]
    shape = (size,) if spec.groups == "instances" else (size, length)
    return torch.randint(-1, objectives(spec, step), shape, generator=generator)


def objectives(spec: Spec, step: int) -> int:
    return min(spec.shapes[step][0], 3) if spec.groups == "instances" else 3


def losses_of(model: Model, step: int) -> Tensor:
    spec = model.spec
    y = model(batch(spec, step))
    each = (y - torch.arange(y[0].numel()).view_as(y[0]).sin()).square()
    if spec.groups == "tokens":
        each, ids = each.sum(-1), segments_of(spec, step)
    elif spec.groups == "instances":
        each, ids = each.flatten(1).sum(1), segments_of(spec, step)
    elif spec.losses > 1:
        return torch.stack([each.flatten(1).sum(1), y.flatten(1).sin().sum(1)], dim=1)
    else:
        return each.flatten(1).sum(1)
    return each.new_zeros(objectives(spec, step) + 1).index_add(0, ids.flatten() + 1, each.flatten())[1:]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(spec=specs())
def test_random_models(spec: Spec):
    model = Model(spec)
    segments = (lambda step: segments_of(spec, step)) if spec.groups else None
    tiers = assert_engine_right(model, lambda step: losses_of(model, step), segments=segments, vacuous=True)
    note(tiers_line(tiers))
