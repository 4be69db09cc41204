"""Failures of engines like this one: parameters of several modules. Docstrings say what went wrong, and where."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian import Engine
from tests.gramian.hazards import DISTINCT, SQUARE, ids, normal, right
from tests.gramian.oracle import (
    assert_engine_right,
    check_step,
    trainable,
)
from tests.gramian.tuning import tuned
from tests.gramian.zoo import Head, instance_losses
from tests.models import tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    "head", [Head("decoder", "gpt_oss"), Head("decoder", "mamba"), Head("encoder", "bert")], ids=str
)
def test_07_parameter_of_a_parent(head: Head):
    """7 (private-transformers): a module with children has parameters itself (sinks, A_log, D, a head's bias)."""
    tiers = right(head, DISTINCT)
    names = {"gpt_oss": "sinks", "mamba": "A_log", "bert": "predictions.bias"}
    assert any(names[head.family] in n and t > 0 for n, t in tiers.items())


@pytest.mark.parametrize("family", ["bart", "pegasus", "mt5", "m2m_100"])
def test_08_shared_table_whose_owner_is_never_called(family: str):
    """8: `shared` is used by encoder and decoder and head, its own forward never."""
    right(Head("encoder-decoder", family), DISTINCT)


@pytest.mark.parametrize(
    "method", ["ia3", "adalora", "vera", "loha", "vblora", "lora-embeddings", "trainable-tokens", "shira"]
)
def test_08_adapters_in_dictionaries(method: str):
    """8: parameters in a ParameterDict, which is never called: hook-only engines silently lose them."""
    model = tuned(method, tied=False)
    tiers = assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))
    assert all(t > 0 for t in tiers.values())


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE, [(2, 4), (2, 4)]], ids=["distinct", "B==T", "B=2"])
@pytest.mark.parametrize(
    "head", [Head("decoder", "gpt2"), Head("encoder", "bert"), Head("encoder-decoder", "bart")], ids=str
)
def test_09_tied_weights(head: Head, shapes: list[tuple[int, int]]):
    """9 (opacus#413, #433): rows of all uses are added before the Gramian; without cross terms, it is wrong by 10 %."""
    right(head, shapes)


@pytest.mark.parametrize("keep_rows", [True, False, 10_000])
def test_09_tied_embedding_and_head(keep_rows: bool | int):
    """9 (pytorch#80951): in each mode."""
    model = tiny_gpt2()
    engine = Engine(model, keep_rows=keep_rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(2):
            losses = instance_losses(model(ids(3, 6, seed=step)))
            assert not check_step(engine, trainable(model), losses, keep_rows=[keep_rows])


def test_10_module_used_twice():
    """10 (backpack#248, opacus#58): net(x[:, :5]) + net(x[:, 5:]) as two calls; ALBERT's layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()

    def losses(step: int) -> Tensor:
        x = normal(3, 10, seed=step)
        return (net(x[:, :5]) + net(x[:, 5:])).square().sum(1)

    assert_engine_right(net, losses)
    right(Head("encoder", "albert"), DISTINCT)


@pytest.mark.parametrize("batch", [3, 16], ids=["distinct", "B==width"])
def test_11_dora_calls_its_adapter_twice(batch: int):
    """11: DoRA calls lora_A with the identity [in, in] and no gradient; if in == B, even its shape fits."""
    model = tuned("dora", tied=False)
    assert_engine_right(model, lambda step: instance_losses(model(ids(batch, 4, seed=step))))


class Fused(nn.Module):
    """A LoRA layer whose forward reads its adapters' weights, but calls neither adapter."""

    def __init__(self):
        super().__init__()
        self.base, self.lora_A, self.lora_B = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A.weight), self.lora_B.weight)


@pytest.mark.parametrize("size", [3, 6], ids=["distinct", "B==width"])
def test_29_fused_adapters(size: int):
    """29 (unsloth#1713, #11132): fused forwards bypass modules; their parameters must not vanish from the Gramian."""
    torch.manual_seed(0)
    model = nn.Sequential(Fused(), nn.Tanh(), Fused(), nn.Linear(6, 2)).double()
    tiers = assert_engine_right(model, lambda step: model(normal(size, 5, 6, seed=step)).sin().sum((1, 2)))
    assert all(t > 0 for t in tiers.values())


def test_28_head_read_by_its_weight():
    """28 (trl#5846): a fused loss reads `lm_head.weight`; the head's forward is never called."""
    model = tiny_llama()

    def losses(step: int) -> Tensor:
        tokens = ids(3, 6, seed=step)
        hidden = model.model(input_ids=tokens).last_hidden_state
        logits = (hidden @ model.lm_head.weight.T).double()
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)

    tiers = assert_engine_right(model, losses)
    assert tiers["lm_head.weight"] == 3
    assert {t for n, t in tiers.items() if n != "lm_head.weight"} == {1}
