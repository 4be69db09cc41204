"""Modules that draw random numbers: calling them again draws no new ones, and rows use the forward's numbers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian import Engine
from hf_jd.gramian.random_streams import random_state, set_random_state, unchanged_streams
from tests.gramian.oracle import SINGLE, TIER_3, check_step, perturb, trainable
from tests.models import VOCABULARY, tiny_llama

B, T, WIDTH = 3, 4, 6
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(f"ignore:{TIER_3}")


class Attention(nn.MultiheadAttention):
    """A module that draws from torch, inside one of torch's functions."""

    def __init__(self):
        super().__init__(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    """A module that draws from torch between its two layers."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class NoisyRouter(nn.Module):
    """A module that reads its weight in F.linear(x, W), called again for all instances at once; draws from torch."""

    def __init__(self):
        super().__init__()
        self.router = nn.ParameterDict({"weight": torch.randn(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.empty_like(x).uniform_(0.5, 1.5) if self.training else x
        return torch.tanh(F.linear(x, self.router["weight"]))


class NoisyLinear(nn.Module):
    """A linear layer to a probe, except for noise on its weight; draws from torch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1 + 0.3 * torch.randn_like(self.weight)))


class NoisyScale(nn.Module):
    """The same for a layer that scales; draws from torch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x * torch.rand(())


class MaskedSpectrum(nn.Module):
    """SpecAugment: replaces random times by a parameter; draws from numpy."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        masked = torch.from_numpy(np.random.rand(*x.shape[:2]) < 0.5)
        return torch.where(masked[..., None], self.embedding, x)


class DroppedLayer(nn.Module):
    """A layer that is skipped at random; draws from Python."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterDict({"scale": torch.randn(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else torch.sin(x @ self.scales["scale"])


KINDS = [Attention, Recurrent, NoisyRouter, NoisyLinear, NoisyScale, MaskedSpectrum, DroppedLayer]


class Model(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer, self.head = nn.Linear(4, WIDTH), kind(), nn.Linear(WIDTH, 2)
        self.double()

    def losses(self, step: int = 0) -> Tensor:
        x = torch.randn(B, T, 4, generator=torch.Generator().manual_seed(step)).double()
        return self.head(self.layer(self.stem(x))).square().sum((1, 2))


def draws() -> list[float]:
    """Return the next number of each stream."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


@pytest.mark.parametrize("check", [True, False], ids=["proved", "unchecked"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_module_that_draws(kind, check: bool):
    """Rows are right even without a check: a module that would draw other numbers is not called again."""
    model = Model(kind)
    engine = Engine(model, check=check)
    for step in range(4):
        seed(step)
        losses = model.losses(step)
        state = random_state(CPU)
        engine.compute_gramian(losses)
        after = draws()
        set_random_state(state, CPU)
        assert after == draws()
        assert not check_step(engine, trainable(model), losses)
        perturb(trainable(model))


@pytest.mark.parametrize(
    "kind, training",
    [(Attention, 3), (Recurrent, 3), (NoisyRouter, 2)],
    ids=["each instance has numbers of its own", "in two layers", "called again as a whole"],
)
def test_a_module_that_draws_only_in_training(kind, training: int):
    """It is called again in evaluation mode, and in training mode if that draws the forward's numbers."""
    model = Model(kind)
    engine = Engine(model)
    tiers = []
    for mode in (True, True, False, True):
        model.train(mode)
        losses = model.losses()
        engine.compute_gramian(losses)
        assert not check_step(engine, trainable(model), losses)
        tiers.append({tier for name, tier in engine.tiers().items() if name.startswith("layer")})
    assert tiers[1:] == [{training}, {2}, {training}]


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], module_dropout=0.2),
        LoKrConfig(r=2, target_modules=["q_proj", "up_proj"], rank_dropout=0.3),
        LoKrConfig(r=2, target_modules=["q_proj", "up_proj"]),
    ],
    ids=["LoHa", "LoHa, left out at random", "LoKr, ranks left out", "LoKr"],
)
def test_adapters_that_draw_for_the_whole_batch_are_called_again(config):
    """They toss a coin in each forward, even if they need none: with the forward's numbers, tier 2 is right."""
    model = get_peft_model(tiny_llama(), config).double().train()
    torch.manual_seed(0)
    perturb(trainable(model))
    engine = Engine(model)
    ids = torch.randint(3, VOCABULARY, (B, 6), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            torch.manual_seed(step)
            logits = model(input_ids=ids).logits
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
            assert not check_step(engine, trainable(model), losses, tolerance=SINGLE)
            assert step == 0 or set(engine.tiers().values()) <= {0, 2}
            perturb(trainable(model))


def test_streams_are_restored_after_an_error():
    seed(0)
    expected = draws()
    seed(0)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), unchanged_streams(CPU):
        torch.tensor(draws()) @ torch.rand(2, 2)
    assert draws() == expected


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), lambda: np.random.rand(), lambda: np.random.randn(), lambda: random.random()],
    ids=["torch", "numpy", "numpy, of which it keeps a second number", "Python"],
)
def test_a_draw_from_each_stream_is_noticed(draw):
    np.random.seed(0)
    np.random.randn()  # Stores a second number, to be returned without another draw.
    with unchanged_streams(CPU) as has_drawn:
        assert not has_drawn()
        draw()
        assert has_drawn()
