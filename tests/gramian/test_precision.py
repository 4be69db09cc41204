"""The self-check of models in half precision: no false alarms, and what it must still catch."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.gramian import RULES, Engine
from hf_jd.gramian._passes.check import Checker
from hf_jd.gramian.rows import Rows
from tests.gramian.oracle import TIER_3, brute_rows, perturb, relative, trainable
from tests.gramian.zoo import VOCABULARY, WIDTH, Head
from tests.marks import in_turn
from tests.models import tiny_llama, with_lora

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ["bloom", "gpt2", "gpt_neox", "llama", "opt", "qwen2"]
PRECISIONS = ["bfloat16 base", "float16 base", "bfloat16 autocast", "float16 autocast"]


def lora(head: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=head == "gpt2", **settings)


METHODS: dict[str, Callable[[str], Any]] = {
    "lora": lora,
    "dora": lambda family: lora(family, use_dora=True),
    "modules_to_save": lambda family: lora(
        family, modules_to_save=["embed_out" if family == "gpt_neox" else "lm_head"]
    ),
    "ia3": lambda family: IA3Config(
        task_type="CAUSAL_LM",
        target_modules={"gpt_neox": ["query_key_value", "dense_4h_to_h"]}.get(family),
        feedforward_modules={"gpt_neox": ["dense_4h_to_h"]}.get(family),
    ),
    "prompt tuning": lambda family: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def tuned(model: nn.Module, family: str, method: str, precision: str) -> nn.Module:
    """Build a model in a precision, with a PEFT method's parameters in float32, none of them zero."""
    dtype, kind = precision.split()
    model = model.to(HALF[dtype] if kind == "base" else torch.float32)
    torch.manual_seed(0)
    if method != "full":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Warnings about tied layers and Conv1D.
            model = get_peft_model(model, METHODS[method](family))
        perturb([p for name, p in model.named_parameters() if "lora_B" in name or "ia3" in name])
    return model.train()


def context(precision: str) -> contextlib.AbstractContextManager:
    dtype, kind = precision.split()
    return torch.autocast("cpu", HALF[dtype], enabled=kind == "autocast")


def losses_of(model: nn.Module, precision: str, batch: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY):
    """Compute the mean cross-entropy of each sequence, in float32 as in Trainer."""
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    with context(precision):
        logits = model(input_ids=ids).logits
    logits = logits[:, -length:-1].float()  # A prompt comes first.
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def tiers_without_warning(model: nn.Module, precision: str, shapes: list[tuple[int, int]]) -> dict[str, int]:
    engine = Engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, (batch, length) in enumerate(shapes):
            engine.compute_gramian(losses_of(model, precision, batch, length, step), retain_graph=False)
    engine.detach()
    return engine.tiers()


@pytest.mark.parametrize("method", ["full", "lora", "dora", "modules_to_save", "ia3"])
@pytest.mark.parametrize(("family", "precision"), in_turn(FAMILIES, {precision: precision for precision in PRECISIONS}))
def test_no_false_alarm(family: str, method: str, precision: str):
    model = tuned(Head("decoder", family).build(), family, method, precision)
    tiers = tiers_without_warning(model, precision, [(3, 9), (3, 7)])
    # A scale of a wrapped layer's output belongs to no layer; OPT derives positions from a mask.
    beyond = {"dora": "lora_magnitude_vector", "ia3": "ia3_l", "full": "embed_positions"}.get(method, "no parameter")
    assert {tier for name, tier in tiers.items() if beyond not in name} <= {0, 1}
    assert {tier for name, tier in tiers.items() if beyond in name} <= {0, 2}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prompt_tuning_costs_what_it_does_in_float32(precision: str):
    """PEFT looks up one prompt and repeats it over the batch: its gradient arrives summed, in any precision."""
    model = tuned(Head("decoder", "llama").build(), "llama", "prompt tuning", precision)
    engine = Engine(model)
    with pytest.warns(UserWarning, match=TIER_3):
        engine.compute_gramian(losses_of(model, precision, 3, 9))
    assert set(engine.tiers().values()) == {3}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "layers, width, batch, length", [(2, 16, 1, 7), (2, 16, 40, 5), (24, 32, 8, 8), (4, 128, 7, 48), (30, 16, 2, 16)]
)
def test_no_false_alarm_at_any_size(layers: int, width: int, batch: int, length: int, precision: str):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    head = Head("decoder", "llama", {**sizes, "max_position_embeddings": 64})
    tiers = tiers_without_warning(tuned(head.build(), "llama", "lora", precision), precision, [(batch, length)])
    assert set(tiers.values()) == {1}


class Dequantized(torch.autograd.Function):
    """x W^T with a weight stored in 4 bits, as in bitsandbytes: computed in half precision, returned in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.dtype = dtype
        return (x.to(dtype) @ dequantized(codes, scale, dtype).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        (g,) = grad_outputs
        return (g.to(ctx.dtype) @ dequantized(*ctx.saved_tensors, ctx.dtype)).to(g.dtype), None, None, None


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ((codes.to(torch.float32) - 8) * scale).to(dtype)


class Linear4bit(nn.Linear):
    """A frozen linear layer whose weight is stored as 4-bit codes."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 7, requires_grad=False)
        codes = (linear.weight.detach() / self.scale + 8).round().to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.compute_dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return Dequantized.apply(input, self.weight, self.scale, self.compute_dtype)


@pytest.mark.parametrize("compute", HALF)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_no_false_alarm_on_4_bits(method: str, base: torch.dtype, compute: str):
    """No parameter, output or autocast shows that a float32 model computes in half precision."""
    model = Head("decoder", "llama", {"num_hidden_layers": 8}).build().to(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Linear4bit(module, HALF[compute]))
    torch.manual_seed(0)
    model = get_peft_model(model, METHODS[method]("llama")).train()
    perturb([p for p in model.parameters() if p.requires_grad])
    tiers = tiers_without_warning(model, "bfloat16 none", [(4, 12)])
    assert set(tiers.values()) == ({1} if method == "lora" else {2})


SPOILT: dict[str, Callable[[Rows], Rows]] = {
    "one row doubled": lambda rows: rows.scaled(torch.tensor([1.0, 2.0, 1.0])),
    "rows exchanged": lambda rows: rows.select(torch.tensor([1, 0, 2])),
    "a row lost": lambda rows: rows.scaled(torch.tensor([0.0, 1.0, 1.0])),
    "all too large": lambda rows: rows.scaled(torch.full((3,), 1.2)),
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("spoilt", "precision"), in_turn(SPOILT, {precision: precision for precision in PRECISIONS}))
def test_wrong_rule_is_caught(spoilt: str, method: str, precision: str):
    def wrong(module, input, grad_output, segments):
        rows = RULES[nn.Linear](module, input, grad_output, segments)
        return {name: SPOILT[spoilt](row) for name, row in rows.items()}

    model = tuned(Head("decoder", "llama").build(), "llama", method, precision)
    names = trainable(model)
    engine = Engine(model, rules={**RULES, nn.Linear: wrong})
    losses = losses_of(model, precision, 3, 9)
    jacobian = engine.compute_jacobian(losses)
    tiers = engine.tiers()
    # In a new model, softmax leaves such small gradients to queries and keys that they prove nothing yet.
    small = ("embed", "norm", *(("q_proj", "k_proj") if method == "full" else ()))
    proved = {p: name for p, name in names.items() if not any(part in name for part in small)}
    assert {tiers[name] for name in proved.values()} == {2}
    for p, rows in brute_rows(losses, list(proved)).items():
        assert relative(jacobian.rows(p), rows) < 0.03, names[p]


class Positions(nn.Module):
    """Relative positions [T, T] between frozen layers, and a head; the frozen layers have a different dtype."""

    def __init__(self, length: int, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(WIDTH, WIDTH).to(dtype).requires_grad_(False)
        self.table, self.head = nn.Embedding(2 * length, WIDTH), nn.Linear(WIDTH, 2)
        self.after = nn.Linear(WIDTH, WIDTH).to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        bias = self.table((ids[:, None] - ids[None]) % (2 * len(ids)))
        y = torch.einsum("btd,tsd->bsd", self.before(x.to(self.before.weight.dtype)).to(bias.dtype), bias)
        return self.head(self.after(y.to(self.after.weight.dtype)).to(bias.dtype))


@pytest.mark.filterwarnings(f"ignore:{TIER_3}")
@pytest.mark.parametrize("size", [5, 2, 3], ids=["B==T", "B=2", "B=3"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_wrong_layout_is_caught(precision: str, size: int):
    dtype, kind = precision.split()
    model = Positions(5, HALF[dtype] if kind == "base" else torch.float32)
    x = torch.randn(size, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    engine = Engine(model)
    with context(precision):
        losses = model(x).float().square().mean((1, 2))
    jacobian = engine.compute_jacobian(losses)
    for p, rows in brute_rows(losses, list(trainable(model))).items():
        assert relative(jacobian.rows(p), rows) < 0.03
    tiers = engine.tiers()
    assert (tiers["table.weight"], tiers["head.weight"]) == (3, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_instances_that_mix_are_named(method: str, precision: str):
    model = tuned(Head("decoder", "llama").build(), "llama", method, precision)
    engine = Engine(model)
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    with context(precision):
        logits = model(input_ids=ids).logits.float().flatten(1)
    losses = F.cross_entropy(logits @ logits.T / logits.shape[1] ** 0.5, torch.arange(4), reduction="none")
    with pytest.raises(ValueError, match=r"mix.*in-batch negatives"):
        engine.compute_gramian(losses)


@pytest.mark.parametrize("reader, read", [*itertools.permutations(range(3), 2)])
def test_one_instance_that_reads_another_is_noticed(reader: int, read: int):
    model = with_lora(tiny_llama().bfloat16(), warm=True)
    engine = Engine(model)
    ids = torch.randint(3, 37, (3, 6), generator=torch.Generator().manual_seed(0))
    mixing = torch.eye(3)
    mixing[reader, read] = 0.5
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state.float()
    losses = torch.einsum("bc,ctd->btd", mixing, hidden).square().mean((1, 2))
    with pytest.raises(ValueError, match="mix"):
        engine.compute_gramian(losses)


class Shifted(nn.Module):
    """A LayerNorm whose gradient autograd adds up in bfloat16, token by token: a fifth of it is rounding error."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).float()


def norm_losses(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(4, 30_000, 8, generator=generator), torch.randn(4, 30_000, 2, generator=generator)
    return (model(x.bfloat16()) * target).sum((1, 2))


def test_rows_hidden_by_noise_are_proved_in_float32_with_one_warning():
    model = Shifted()
    engine = Engine(model)
    with pytest.warns(UserWarning, match=r"can't prove the rows of 2.*norm\.weight, norm\.bias.*float32"):
        engine.compute_gramian(norm_losses(model))
    assert set(engine.tiers().values()) == {1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.compute_gramian(norm_losses(model, 1))
    assert set(engine.tiers().values()) == {1}


def test_wrong_rule_behind_noise_is_caught_in_float32():
    def wrong(module, input, grad_output, segments):
        rows = RULES[nn.LayerNorm](module, input, grad_output, segments)
        return {name: row.scaled(torch.tensor([1.0, 1.0, 1.5, 1.0])) for name, row in rows.items()}

    model = Shifted()
    engine = Engine(model, rules={**RULES, nn.LayerNorm: wrong})
    with pytest.warns(UserWarning, match="can't prove"):
        engine.compute_gramian(norm_losses(model))
    tiers = engine.tiers()
    assert (tiers["norm.weight"], tiers["norm.bias"]) == (2, 2)
    assert tiers["head.weight"] == 1


def test_one_noisy_objective_keeps_its_rules():
    model = Shifted()
    engine = Engine(model)
    x = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.compute_gramian((model(x) * torch.randn(4096, 2)).sum((1, 2)))
    assert set(engine.tiers().values()) == {1}


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5, 6, 12, 25, 64])
def test_probe_tells_objectives_apart(objectives: int):
    for probe in (Checker().probe(torch.zeros(objectives)) for _ in range(3)):
        assert len(probe) == (1 if objectives <= 5 else 2)
        assert len(probe.unique(dim=1).T) == min(objectives, 25)
        assert bool((probe.sum(1) > 0).all())
        assert bool((torch.frexp(probe.abs())[0] == 0.5).all())
