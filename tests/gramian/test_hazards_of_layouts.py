"""Failures of engines like this one: whose each leading entry is. Docstrings say what went wrong, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gramian.hazards import DISTINCT, SQUARE, ids, normal, right
from tests.gramian.oracle import (
    assert_engine_right,
)
from tests.gramian.zoo import Head, instance_losses, model_of


@pytest.mark.parametrize("size", [3, 5, 8], ids=["distinct", "B==T", "B==width"])
def test_03_time_first(size: int):
    """3 (opacus#650): layers called with [T, B, d], as in XLNet and LED."""
    torch.manual_seed(0)
    attention, head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)
    model = nn.ModuleList([nn.Linear(8, 8), attention, head]).double()

    def losses(step: int) -> Tensor:
        x = model[0](normal(size, 5, 8, seed=step).transpose(0, 1))
        return model[2](model[1](x, x, x)[0]).sin().sum((0, 2))

    assert_engine_right(model, losses)


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
def test_04_flattened_tokens(shapes: list[tuple[int, int]]):
    """4 (private-transformers, swap_opt): [B*T, d] inside the model; rows are instance-major, closed rules apply."""

    class Opt(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x.reshape(-1, 6)))).view(*x.shape[:2], 4)

    torch.manual_seed(0)
    model = Opt().double()
    tiers = assert_engine_right(model, lambda step: model(normal(*shapes[step], 6, seed=step)).sin().sum((1, 2)))
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
def test_05_06_experts(family: str, shapes: list[tuple[int, int]]):
    """5, 6: experts see gathered tokens in a different order.

    Their weights are 3-D parameters of a module with children; routers return tuples.
    """
    right(Head("decoder", family), shapes)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("group", [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, -1, 0], None], ids=str)
def test_06_experts_with_many_tokens(family: str, group: list[int] | None):
    """6: if an expert sees many tokens of few objectives, its rows are formed instead of pairs of tokens."""
    model = model_of(Head("decoder", family))
    count = 4 if group is None else 2

    def losses(step: int) -> Tensor:
        each = instance_losses(model(ids(4, 30, seed=step)))
        if group is None:
            return each
        return each.new_zeros(count + 1).index_add(0, torch.tensor(group) + 1, each)[1:]

    segments = None if group is None else lambda step: torch.tensor(group)
    tiers = assert_engine_right(model, losses, segments=segments, steps=1)
    assert all(tier == 1 for name, tier in tiers.items() if "experts" in name and "shared" not in name)


def test_05_switch_experts():
    """5: Switch's experts see [2, d], [7, d], [9, d] tokens, depending on the data."""
    right(Head("encoder-decoder", "switch_transformers"), DISTINCT)


def test_12_keyword_inputs():
    """12 (pytorch#156695): a forward hook sees () if a layer is called as head(input=h)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(input=self.norm(input=self.one(input=x)))

    torch.manual_seed(0)
    model = Net().double()
    assert_engine_right(model, lambda step: model(normal(4, 6, seed=step)).sin().sum(1))


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)], ids=str
)
def test_13_in_place_after_a_layer(act: nn.Module):
    """13 (pytorch#61519): views of hooks raise under in-place operations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 2)).double()
    assert_engine_right(model, lambda step: model(normal(4, 6, seed=step)).square().sum(1))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "lfm2", "olmo2"])
@pytest.mark.parametrize("shapes", [DISTINCT, [(4, 4), (4, 4)]], ids=["distinct", "B==T==heads"])
def test_16_inputs_of_rank_4(family: str, shapes: list[tuple[int, int]]):
    """16 (opacus ghost returns {}): norms of queries and keys see [B, T, heads, d]."""
    right(Head("decoder", family), shapes)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_17_embedding_bag_with_offsets(mode: str):
    """17 (opacus#673, #518): indices are flat; only offsets determine the batch. Also a norm with a buffer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.weight = nn.EmbeddingBag(9, 6, mode=mode), nn.Parameter(torch.randn(6))
            self.register_buffer("eps", torch.tensor(1e-6))

        def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
            x = self.bag(indices, offsets)
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    torch.manual_seed(0)
    model = Net().double()
    offsets = torch.tensor([0, 2, 5])

    def losses(step: int) -> Tensor:
        indices = torch.randint(9, (9,), generator=torch.Generator().manual_seed(step))
        return (model(indices, offsets) - torch.arange(6).sin()).square().sum(1)

    assert_engine_right(model, losses)


def test_18_attention_in_a_leaf():
    """18 (pytorch#151558): scaled dot-product attention inside a module with parameters of its own."""

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x @ self.q, x @ self.k, x @ self.v, is_causal=True)

    torch.manual_seed(0)
    model = nn.Sequential(Leaf(), nn.Linear(6, 2)).double()
    assert_engine_right(model, lambda step: model(normal(3, 5, 6, seed=step)).sin().sum((1, 2)))
