"""The model changes under the engine: copied, saved, resized, tied, frozen, compiled."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    SINGLE,
    assert_engine_right,
    check_step,
    perturb,
    trainable,
)
from tests.gramian.small import WIDTH, B, T, assert_gramian, batch, lm_losses, mlp, token_ids
from tests.gramian.test_engine_errors import losses_of
from tests.models import VOCABULARY, tiny_llama, with_lora


def test_detach_restores_the_model():
    model = mlp()
    before = [list(m._forward_hooks) for m in model.modules()]
    engine = Engine(model)
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    engine.detach()
    assert [list(m._forward_hooks) for m in model.modules()] == before
    assert "Tap" not in type(model(batch(B, 4)).grad_fn).__name__
    with pytest.raises(ValueError, match="compute_gramian"):
        engine.accumulate_grad(torch.ones(B))


def test_a_deleted_engine_leaves_no_hooks():
    model = mlp()
    before = [list(m._forward_hooks) for m in model.modules()]
    engine = Engine(model)
    engine.compute_gramian(losses_of(model))
    del engine
    assert [list(m._forward_hooks) for m in model.modules()] == before
    assert not model._forward_pre_hooks
    assert_engine_right(model, lambda step: model(batch(B, 4, seed=step)).square().sum(1))


def test_deep_copy_does_not_report_to_the_engine():
    model = mlp()
    engine = Engine(model)
    twin = copy.deepcopy(model)
    losses = model(batch(B, 4)).square().sum(1) + 0 * twin(batch(B, 4)).sum()
    assert_gramian(engine, losses, model)
    assert_engine_right(twin, lambda step: twin(batch(B, 4, seed=step)).square().sum(1))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_pickling_a_model_with_an_engine(used: bool):
    model = mlp()
    engine = Engine(model)
    if used:
        engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(batch(B, 4)), model(batch(B, 4)))
    assert_engine_right(twin, lambda step: twin(batch(B, 4, seed=step)).square().sum(1))
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_saving_a_pretrained_model_with_an_engine(tmp_path):
    model = tiny_llama()
    Engine(model)
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(twin(token_ids(2, 4)).logits, model(token_ids(2, 4)).logits)


def test_moved_to_another_dtype_after_the_engine():
    model = mlp().float()
    engine = Engine(model)
    model.double()
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_adapters_added_after_the_engine():
    """Hooks set too early are how training 'looks healthy' while lora_B never moves."""
    model = tiny_llama()
    engine = Engine(model)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"])).double()
    for step in range(2):
        losses = lm_losses(adapted, token_ids(B, 6, seed=step))
        assert_gramian(engine, losses, adapted, tolerance=SINGLE)
        assert all("lora" in name for name in engine.tiers())
        perturb(trainable(adapted))


def test_lora_b_moves_after_one_step():
    model = with_lora(tiny_llama())
    engine = Engine(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine.compute_gramian(lm_losses(model, token_ids(B, 6)))
    engine.accumulate_grad(torch.ones(B))
    optimizer.step()
    for name, p in model.named_parameters():
        if name in before:
            assert not torch.equal(p, before[name])


def test_embeddings_resized_after_the_engine():
    model = tiny_llama()
    engine = Engine(model)
    model.resize_token_embeddings(VOCABULARY + 4)
    assert_gramian(engine, lm_losses(model, token_ids(B, 6) + 3), model, tolerance=SINGLE)


def test_weights_tied_after_the_engine():
    model = tiny_llama()
    engine = Engine(model)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    errors = check_step(engine, trainable(model), lm_losses(model, token_ids(B, 6)), tolerance=SINGLE)
    assert not errors


def test_parameter_replaced_between_steps():
    model = mlp()
    engine = Engine(model)
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)
    model[3].weight = nn.Parameter(model[3].weight.detach().clone() + 1)
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_module_replaced_between_steps():
    model = mlp()
    engine = Engine(model)
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)
    model[3] = nn.Linear(WIDTH, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_parameters_frozen_and_unfrozen_between_steps():
    model = mlp()
    engine = Engine(model)
    for frozen in ([], ["0.weight"], ["0.weight", "0.bias"], ["3.bias", "2.weight"], []):
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert not check_step(engine, trainable(model), model(batch(B, 4)).square().sum(1))
        assert set(engine.tiers()) == {n for n, _ in model.named_parameters()} - set(frozen)


def test_adapters_added_and_switched_between_steps():
    model = with_lora(tiny_llama(), warm=True)
    engine = Engine(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.double()
    for active in ("default", "second", "default"):
        model.set_adapter(active)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            losses = lm_losses(model, token_ids(B, 6))
            assert not check_step(engine, trainable(model), losses, tolerance=SINGLE)
        assert all(active in name for name in engine.tiers())


@pytest.mark.parametrize("kept", [None, "lm_head"], ids=["adapters", "and a head"])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_forward_without_adapters_before_the_gramian(gradient: bool, kept: str | None):
    """The reference model is the same model with its adapters off, which freezes them temporarily."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=kept and [kept], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).double()
    engine = Engine(model)
    for step in range(2):
        losses = lm_losses(model, token_ids(B, T, step))
        with model.disable_adapter(), torch.set_grad_enabled(gradient):
            model(input_ids=token_ids(B, T, step))
        assert_gramian(engine, losses, model, tolerance=SINGLE)
        assert set(engine.tiers().values()) == {1}


def test_a_parameter_unused_in_some_steps():
    first, second = mlp(seed=0), mlp(seed=1)
    model = nn.ModuleList([first, second])
    engine = Engine(model)
    for used in ([0], [0, 1], [1], [0]):
        losses = sum(model[i](batch(B, 4)).square().sum(1) for i in used)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert not check_step(engine, trainable(model), losses)
        for i in range(2):
            tiers = {t for n, t in engine.tiers().items() if n.startswith(f"{i}.")}
            assert (tiers == {0}) == (i not in used)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["engine first", "compiled first"])
def test_torch_compile(order: str, backend: str):
    torch._dynamo.reset()
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if order == "engine first":
            engine = Engine(model)
            compiled = torch.compile(model, backend=backend)
        else:
            compiled = torch.compile(model, backend=backend)
            compiled(batch(B, 4))
            engine = Engine(model)
        for step in range(2):
            losses = compiled(batch(B, 4, seed=step)).square().sum(1)
            assert_gramian(engine, losses, model)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it.
@pytest.mark.parametrize("alike", [False, True], ids=["the same model", "another of its kind"])
def test_code_compiled_without_the_engine_is_compiled_again(alike: bool):
    torch._dynamo.reset()
    model = mlp()
    before = torch.compile(copy.deepcopy(model) if alike else model, backend="aot_eager")
    with dynamo_config.patch(skip_nnmodule_hook_guards=False), functorch_config.patch(donated_buffer=False):
        before(batch(B, 4)).sum().backward()
        engine, compiled = Engine(model), torch.compile(model, backend="aot_eager")
        assert_gramian(engine, compiled(batch(B, 4)).square().sum(1), model)
    assert set(engine.tiers().values()) == {1}
    torch._dynamo.reset()
