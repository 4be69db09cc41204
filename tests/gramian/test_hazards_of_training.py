"""Failures of engines like this one: interference from training. Docstrings say what went wrong, and where."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from hf_jd.gramian import Engine
from tests.gramian.hazards import ids
from tests.gramian.oracle import (
    EXACT,
    SINGLE,
    assert_engine_right,
    brute_gramian,
    brute_rows,
    relative,
    trainable,
)
from tests.gramian.zoo import Head, instance_losses, model_of
from tests.models import tiny_gpt2, tiny_llama, with_lora


@pytest.mark.parametrize("embeddings", ["frozen", "input gradients"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
def test_14_checkpointing_of_lora(reentrant: bool | None, embeddings: str):
    """14 (peft#80, cloneofsimo/lora#26): reentrant checkpointing and frozen embeddings.

    With it, taps under `inputs=[sentinel]` silently record no rows.
    """
    model = with_lora(tiny_llama(), warm=True)
    if embeddings == "input gradients" or reentrant:
        model.enable_input_require_grads()
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    tiers = assert_engine_right(
        model, lambda step: instance_losses(model(input_ids=ids(3, 7, seed=step), use_cache=False))
    )
    assert set(tiers.values()) == {1}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_15_half_frozen_layers(frozen: str):
    """15 (opacus#436, #437): weight frozen and bias trainable (BitFit), and the other way round."""
    model = tiny_gpt2()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))


def test_15_lora_with_all_biases():
    """15: LoraConfig(bias='all')."""
    model = get_peft_model(
        tiny_gpt2(),
        LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True, init_lora_weights=False),
    ).double()
    tiers = assert_engine_right(model, lambda step: instance_losses(model(ids(3, 7, seed=step))))
    assert set(tiers.values()) == {1}


def test_19_autocast_mixes_dtypes():
    """19 (opacus#740, #764): under autocast, x is bfloat16 and g float32, or the other way round."""
    model = tiny_llama().float()
    engine = Engine(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = instance_losses(model(ids(4, 6))).float()
    expected = brute_rows(losses, list(trainable(model)))
    jacobian = engine.compute_jacobian(losses)
    for p, name in trainable(model).items():
        rows = jacobian.rows(p)
        assert rows.dtype == torch.float32, name
        assert relative(rows, expected[p]) < 0.1, name


def test_20_adapters_after_construction_are_trained():
    """20 (opacus#820, peft#3409): training looks healthy, but lora_B stays 0; 45 GPU-hours were lost."""
    base = tiny_llama()
    engine = Engine(base)
    instance_losses(base(ids(3, 5)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).double()
    model(ids(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            losses = instance_losses(model(ids(3, 5)))
            engine.compute_gramian(losses)
    engine.accumulate_grad(torch.ones(3))
    moved = [p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert len(moved) == 2
    assert all(moved)


def test_22_instance_without_labels():
    """22 (opacus#612, #530): all labels of one instance are ignored; a group is absent."""
    model = tiny_llama()
    labels = ids(3, 6)
    labels[1] = -100

    def losses(step: int) -> Tensor:
        logits = model(input_ids=ids(3, 6, seed=step)).logits.double()
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)

    assert_engine_right(model, losses)
    gramian = Engine(model).compute_gramian(losses(0))
    assert not gramian[1].any()


def test_23_accumulation():
    """23 (backpack#220, opacus#422): entries pop from the wrong forward when forwards and backwards interleave."""
    model = with_lora(tiny_llama(), warm=True)
    names = list(trainable(model))
    engine = Engine(model)
    batches = [ids(n, t, seed=n) for n, t in ((3, 5), (2, 5), (3, 4))]
    pending = [instance_losses(model(b)) for b in batches]
    with torch.no_grad():
        model(batches[0])
    found = []
    for losses in pending:
        expected = brute_rows(losses, names)
        jacobian = engine.compute_jacobian(losses)
        found.append(jacobian)
        assert all(relative(jacobian.rows(p), expected[p]) < SINGLE for p in names)
    total = type(found[0]).cat(found)
    assert len(total) == 8


def test_24_backward_to_given_inputs_changes_nothing_else():
    """24 (backpack#233): `backward(inputs=...)` silently differs with hooks; `.grad` must stay unchanged."""
    model = tiny_gpt2()
    engine = Engine(model)
    losses = instance_losses(model(ids(3, 6)))
    names = list(trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gramian = engine.compute_gramian(losses)
    assert all(p.grad is None for p in names)
    losses.sum().backward(inputs=names[:2], retain_graph=True)
    assert [p.grad is not None for p in names[:3]] == [True, True, False]
    assert relative(gramian, brute_gramian(brute_rows(losses, names), losses.shape)) < EXACT


def test_26_rows_do_not_depend_on_the_batch_size():
    """26 (bergson#112): an instance's row is the same in batches of 2 and 8."""
    model = tiny_gpt2()
    engine = Engine(model)
    tokens = ids(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        large = engine.compute_jacobian(instance_losses(model(tokens)))
        small = engine.compute_jacobian(instance_losses(model(tokens[3:5])))
    assert relative(small.dense(), large.dense()[3:5]) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_30_padding(side: str):
    """30 (bergson, numerical stability): an instance's rows, in a batch with padding and alone."""
    model = tiny_llama()
    engine = Engine(model)
    tokens, mask = ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:], mask[2, 5:] = 0, 0
    if side == "left":
        tokens, mask = tokens.flip(1), mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def losses(rows: slice, columns: Tensor) -> Tensor:
        logits = model(
            tokens[rows][:, columns], mask[rows][:, columns], position_ids=positions[rows][:, columns]
        ).logits
        return ((logits.double() - 0.3).square().mean(2) * mask[rows][:, columns]).sum(1)

    together = engine.compute_jacobian(losses(slice(None), torch.arange(7))).dense()
    for i in range(3):
        alone = engine.compute_jacobian(losses(slice(i, i + 1), mask[i].nonzero().squeeze(1))).dense()
        assert relative(together[i : i + 1], alone) < SINGLE


def test_31_padding_free_documents():
    """31 (transformers#46333): a batch dimension of 1, with instances along the tokens; ids follow the documents."""
    model = with_lora(tiny_llama(), warm=True)
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])

    def losses(step: int) -> Tensor:
        logits = model(input_ids=ids(1, 9, seed=step), position_ids=positions, use_cache=False).logits.double()
        return torch.zeros(3, dtype=torch.float64).index_add(0, document[0], (logits - 0.3).square().mean(2)[0])

    tiers = assert_engine_right(model, losses, segments=lambda step: document)
    assert set(tiers.values()) == {1}


def test_32_balancing_loss_is_named():
    """32 (transformers#28255): Mixtral's auxiliary loss mixes instances."""
    head = Head("decoder", "mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1})
    model = model_of(head)
    engine = Engine(model)
    tokens = ids(3, 6)
    output = model(input_ids=tokens, labels=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        engine_losses = instance_losses(output) + output.aux_loss.double()
        with pytest.raises(ValueError, match=r"mix.*balancing"):
            engine.compute_gramian(engine_losses)


def test_34_group_of_two_is_the_sum_of_their_rows():
    """34 (GhostSuite): the outer product of sum(x) and sum(g) is a wrong shortcut; error 1.15 with two instances."""
    model = tiny_llama()
    tokens, group = ids(4, 6), torch.tensor([0, 0, 1, 1])
    engine = Engine(model)
    each = instance_losses(model(tokens))
    rows = engine.compute_jacobian(each).dense()
    grouped = engine.compute_jacobian(torch.stack([each[:2].sum(), each[2:].sum()]), group).dense()
    assert relative(grouped, torch.stack([rows[:2].sum(0), rows[2:].sum(0)])) < SINGLE
