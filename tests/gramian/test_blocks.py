"""Blocks of parameters, each with its own Gramian and weights, compared with each block's brute-force Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine, Jacobian
from tests.gramian.oracle import brute_rows, perturb, relative, trainable
from tests.gramian.small import B, batch, lm_losses, mlp, token_ids
from tests.models import tiny_llama, with_lora

EXACT = 1e-8
FORMS = {
    "layer": lambda name: name.split(".layers.")[0] + ".layers." + name.split(".layers.")[1].split(".")[0],
    "module": lambda name: name.rpartition(".")[0],
    "parameter": lambda name: name,
}


def adapters() -> nn.Module:
    model = with_lora(tiny_llama()).double()
    perturb(trainable(model))
    return model


def by_block(names: dict[nn.Parameter, str], form) -> dict[str, list[nn.Parameter]]:
    blocks: dict[str, list[nn.Parameter]] = {}
    for p, name in names.items():
        blocks.setdefault(form(name), []).append(p)
    return blocks


def assert_blocks(engine: Engine, model: nn.Module, losses: Tensor, form) -> None:
    """Assert that the Gramians and updates of all blocks are those of each block's own Jacobian."""
    names = trainable(model)
    rows, blocks = brute_rows(losses, list(names)), by_block(names, form)
    gramians = engine.compute_gramian(losses)
    weights = torch.rand(len(blocks), *losses.shape, dtype=torch.float64)
    model.zero_grad()
    engine.accumulate_grad(weights)
    order = torch.arange(losses.numel()).view(losses.shape)
    assert len(gramians) == len(blocks)
    for gramian, w, parameters in zip(gramians, weights, blocks.values(), strict=True):
        jacobian = torch.cat([rows[p].double() for p in parameters], 1)
        expected = (jacobian @ jacobian.T)[order][..., order]
        back = [*range(losses.dim()), *reversed(range(losses.dim(), 2 * losses.dim()))]
        assert relative(gramian, expected.permute(back)) < EXACT
        flat = torch.cat([p.grad.flatten() for p in parameters])
        assert relative(flat, w.flatten() @ jacobian) < EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep_rows", [True, 1])
def test_blocks_of_adapters(form: str, keep_rows: bool | int):
    """Rows of small layers in stacks that hold several blocks; and factors that do not fit."""
    model = adapters()
    engine = Engine(model, keep_rows=keep_rows, blocks=form)
    for step in range(3):
        losses = lm_losses(model, token_ids(B, 5, seed=step))
        assert_blocks(engine, model, losses, FORMS[form])


@pytest.mark.parametrize("shape", [(B,), (B, 2), (2, B)])
@pytest.mark.parametrize("last", [False, True])
def test_blocks_with_losses_of_any_shape(shape: tuple[int, ...], last: bool):
    model = mlp()
    axis = shape.index(B)
    engine = Engine(model, batch_dim=axis - len(shape) if last else axis, blocks="module")
    for step in range(2):
        per_instance = model(batch(B, 4) + step).square().sum(1)
        losses = per_instance if len(shape) == 1 else torch.stack([per_instance, per_instance.sin()], 1 - axis)
        assert_blocks(engine, model, losses, FORMS["module"])


def test_blocks_without_a_batch_dimension_and_with_groups():
    model = mlp()
    engine = Engine(model, batch_dim=None, blocks="parameter")
    assert_blocks(engine, model, model(batch(B, 4)).square().mean(0), FORMS["parameter"])
    engine.detach()
    engine, segments = Engine(model, blocks="module"), torch.tensor([0, 1, 0])[:B]
    losses = torch.zeros(2, dtype=torch.float64).index_add(0, segments, model(batch(B, 4)).square().sum(1))
    gramians = engine.compute_gramian(losses, segments)
    assert relative(gramians.sum(0), Engine(model, batch_dim=None).compute_gramian(losses)) < EXACT


def test_blocks_from_a_function_or_a_mapping():
    model = mlp()
    names = trainable(model)
    losses = model(batch(B, 4)).square().sum(1)
    first = next(iter(names.values())).rpartition(".")[0]
    function = Engine(model, blocks=lambda name: "first" if name.startswith(first) else "others")
    mapping = Engine(model, blocks={first: "first", "": "others"})
    assert torch.equal(function.compute_gramian(losses), mapping.compute_gramian(losses))
    assert mapping.compute_jacobian(losses).blocks == ["first", "others"]
    assert_blocks(mapping, model, losses, lambda name: name.startswith(first))


def test_one_block_equals_no_blocks():
    """With one block, and summed over blocks, all results are the same as without blocks."""
    model = adapters()
    plain, one, many = Engine(model), Engine(model, blocks=lambda name: "all"), Engine(model, blocks="parameter")
    losses = lm_losses(model, token_ids(B, 5))
    weights = torch.rand(B, dtype=torch.float64)
    updates = {}
    for engine in (plain, one, many):
        gramian = engine.compute_gramian(losses)
        count = 1 if engine is plain else len(gramian)
        assert relative(gramian if engine is plain else gramian.sum(0), plain.compute_gramian(losses)) < 1e-12
        model.zero_grad()
        plain._step = None
        engine.compute_gramian(losses)
        engine.accumulate_grad(weights if engine is plain else weights.expand(count, B))
        updates[engine] = torch.cat([p.grad.flatten() for p in trainable(model)])
    assert relative(updates[one], updates[plain]) < 1e-12
    assert relative(updates[many], updates[plain]) < 1e-12


def test_blocks_outlive_operations_on_a_jacobian():
    model = adapters()
    engine = Engine(model, blocks="layer")
    parts = [engine.compute_jacobian(lm_losses(model, token_ids(B, t, seed=t))) for t in (4, 6)]
    index, factors = torch.tensor([2, 0]), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[:B]
    for jacobian in (parts[0] + parts[1], Jacobian.cat(parts), parts[0].select(index), parts[1].scaled(factors)):
        assert jacobian.blocks == parts[0].blocks
        assert len(jacobian.blocks) > 1
        assert relative(jacobian.gramians().sum(0), jacobian.gramian()) < EXACT


@pytest.mark.parametrize("blocks", ["layers", 3, True])
def test_invalid_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match=r"allowed are 'layer', 'module', 'parameter', None"):
        Engine(mlp(), blocks=blocks)


def test_blocks_refuse_unsupported_settings():
    model = mlp()
    with pytest.raises(ValueError, match='keep_rows has to be "auto" or True'):
        Engine(model, blocks="layer", keep_rows=False)
    with pytest.raises(ValueError, match=r"leave out \d+ trainable parameter"):
        Engine(model, blocks={"nothing": "here"}).compute_gramian(model(batch(B, 4)).square().sum(1))
    engine = Engine(model, blocks="module")
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    with pytest.raises(ValueError, match="one weight in each block"):
        engine.accumulate_grad(torch.ones(B))
