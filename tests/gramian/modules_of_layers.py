"""Modules made of torch's layers: attention, recurrent layers, convolutions, norms, bags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.gramian.architectures import D, randn


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
    """A cell called once per time step, so its parameters are used as often."""

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
    """A small network for images: strides, groups, dilation, padding modes, pooling, norms, residuals."""

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


class WeightNorm(nn.Module):
    """Weights computed from parameters at each forward."""

    def __init__(self, kind: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.layer = kind(nn.Linear(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class NoModules(nn.Module):
    """Only parameters, no submodules; gives losses of rank 0 to 4."""

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
    """RMSNorms, and layers that look like one: each scales by w or 1 + w in its own way."""

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
