"""Failures of engines like this one: layers of odd kinds. Docstrings say what went wrong, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_jd.gramian import Engine
from tests.gramian.hazards import normal
from tests.gramian.oracle import (
    SINGLE,
    assert_engine_right,
    brute_rows,
    relative,
)


class FourBit(torch.autograd.Function):
    """Imitates bitsandbytes: a frozen base whose output is a view made inside a custom Function."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.saved_tensors[0], None


class QuantizedBase(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("packed", layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return FourBit.apply(x, self.packed)


def test_42_quantized_base():
    """42 (AgileRL#585): outputs of a 4-bit layer are views of a custom Function; LoRA adds to them in place."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = QuantizedBase(nn.Linear(6, 6))
            self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.base(x).clone()
            y += self.lora_B(self.lora_A(x))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.Tanh(), Adapted()).double()
    tiers = assert_engine_right(model, lambda step: model(normal(3, 5, 6, seed=step)).sin().sum((1, 2)))
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("option", ["padding_idx", "max_norm", "sparse", "scale_grad_by_freq"])
def test_embedding_options(option: str):
    """Options of nn.Embedding: no rows for padding; sparse gradients; a frequency over the batch is refused by name."""
    value = {"padding_idx": 2, "max_norm": 100.0, "sparse": True, "scale_grad_by_freq": True}[option]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, **{option: value}), nn.Linear(6, 3)).double()
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(0))
    if option == "scale_grad_by_freq":
        with pytest.raises(ValueError, match="scale_grad_by_freq=False"):
            Engine(model).compute_gramian(model(tokens).sin().sum((1, 2)))
        return
    tiers = assert_engine_right(model, lambda step: model(tokens).sin().sum((1, 2)))
    assert tiers["0.weight"] == 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma2RMSNorm, T5LayerNorm, Olmo2RMSNorm])
def test_rms_norms_of_float32(norm: type[nn.Module], size: float):
    """Their closed form uses the layer's eps, which matters if inputs are small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), norm(12, eps=1e-5))
    model[0].weight.data *= size
    nn.init.normal_(model[1].weight)
    engine = Engine(model)
    for _ in range(2):
        losses = model(torch.randn(4, 5, 6)).square().sum((1, 2))
        expected = brute_rows(losses, list(model.parameters()))
        jacobian = engine.compute_jacobian(losses)
        assert relative(jacobian.rows(model[1].weight), expected[model[1].weight]) < SINGLE
        assert set(engine.tiers().values()) == {1}
