"""Losses of any shape and ownership: Gramians of instances, groups and packed documents."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from hf_jd.gramian.layouts import Segments
from tests.gramian.oracle import (
    EXACT,
    assert_engine_right,
    brute_rows,
    brute_update,
    relative,
    trainable,
)
from tests.gramian.small import B, T, assert_gramian, batch, lm_losses, mlp, token_ids
from tests.models import tiny_gpt2, tiny_llama, with_lora


def test_vector_of_losses():
    model = mlp()
    assert_engine_right(model, lambda step: model(batch(B, 4, seed=step)).square().sum(1))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2), (1, 6)])
def test_losses_of_any_trailing_shape(shape: tuple[int, ...]):
    model = mlp()
    assert_engine_right(model, lambda step: model(batch(B, 4, seed=step)).view(B, *shape))


def test_generalised_gramian_has_the_reversed_shape_last():
    model = mlp()
    losses = model(batch(B, 4)).view(B, 2, 3)
    gramian = Engine(model).compute_gramian(losses)
    assert gramian.shape == (B, 2, 3, 3, 2, B)
    rows = brute_rows(losses, list(trainable(model)))
    i, j = 1 * 6 + 0 * 3 + 2, 2 * 6 + 1 * 3 + 1
    inner = sum(float(r[i] @ r[j]) for r in rows.values())
    assert float(gramian[1, 0, 2, 1, 1, 2]) == pytest.approx(inner, rel=1e-10)


@pytest.mark.parametrize("others", [(), (6,), (2, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("keep_rows", [True, False, "auto", 0])
def test_instances_in_any_dimension(others: tuple[int, ...], keep_rows: bool | str | int):
    """The Gramian and the weights follow the losses' own shape."""
    for batch_dim in range(-1 - len(others), 1 + len(others)):
        model = mlp()
        engine = Engine(model, batch_dim=batch_dim, keep_rows=keep_rows)
        outputs = model(batch(B, 4)).square()
        losses = (outputs.view(B, *others) if others else outputs.sum(1)).movedim(0, batch_dim)
        assert_gramian(engine, losses, model)
        names = list(trainable(model))
        weights = batch(*losses.shape, seed=2)
        expected = brute_update(brute_rows(losses, names), weights)
        engine.accumulate_grad(weights)
        assert all(relative(p.grad, expected[p]) < EXACT for p in names)
        assert set(engine.tiers().values()) == {1}


def test_groups_in_the_last_dimension():
    """Two losses for each of three groups, given by segments; groups are the last dimension."""
    model = mlp()
    ids = torch.tensor([2, 0, 0, 2, 1])
    each = model(batch(5, 4)).square().unflatten(1, (2, 3)).sum(2)
    losses = torch.stack([each[ids == k].sum(0) for k in range(3)], dim=1)
    assert_gramian(Engine(model, batch_dim=-1), losses, model, segments=ids)


@pytest.mark.parametrize("shape, batch_dim", [((3,), 1), ((3,), -2), ((3, 2), 2), ((3, 2), -3), ((1, 3, 2), 7)])
def test_a_dimension_that_the_losses_lack_is_refused(shape: tuple[int, ...], batch_dim: int):
    model = mlp()
    losses = model(batch(B, 4)).flatten()[: torch.Size(shape).numel()].view(shape)
    n = len(shape)
    with pytest.raises(
        ValueError, match=rf"batch_dim is {batch_dim}, .* the dimension of their instances, {-n} to {n - 1},"
    ):
        Engine(model, batch_dim=batch_dim).compute_gramian(losses)


@pytest.mark.parametrize(
    "shape",
    [
        (18,),
        (3, 6),
        (2, 3, 3),
        (9, 2, 1, 1),
        (1,),
        (),
    ],
)
def test_losses_without_instance_dimension(shape: tuple[int, ...]):
    model = mlp()
    losses = model(batch(B, 4)).flatten()
    losses = losses.sum().view(shape) if len(shape) < 2 and shape != (18,) else losses.view(shape)
    engine = Engine(model, batch_dim=None)
    assert_gramian(engine, losses, model)
    names = list(trainable(model))
    expected = brute_update(brute_rows(losses, names), torch.full_like(losses, 0.5))
    engine.accumulate_grad(torch.full_like(losses, 0.5))
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_losses_of_several_heads_on_one_batch():
    """[m, K]: different kinds of objectives for each instance."""
    model = mlp()

    def losses(step: int) -> Tensor:
        y = model(batch(B, 4, seed=step))
        return torch.stack([y.square().sum(1), y.sin().sum(1), y[:, 0]], dim=1)

    assert_engine_right(model, losses)


def test_an_instance_without_loss_has_a_row_of_zeros():
    model = mlp()
    losses = model(batch(B, 4)).square().sum(1) * torch.tensor([1.0, 0.0, 1.0])
    gramian = assert_gramian(Engine(model), losses, model)
    assert not gramian[1].any()


def test_one_objective():
    model = mlp()
    assert_engine_right(model, lambda step: model(batch(1, 4, seed=step)).square().sum(1))


def test_one_objective_first_then_many():
    """With one objective, no check can tell layouts apart, so its result must not be trusted afterwards."""
    model = mlp()
    engine = Engine(model)
    for size in (1, B, 1, 4):
        losses = model(batch(size, T, 4)).square().sum((1, 2))
        assert_gramian(engine, losses, model)


def test_one_objective_first_in_time_first_order():
    model = mlp()
    engine = Engine(model)
    for size in (1, T, B):
        losses = model(batch(T, size, 4)).square().sum((0, 2))
        assert_gramian(engine, losses, model)


def test_one_group_first_in_time_first_order():
    """As with one objective, no check can tell layouts apart if all instances belong to one group."""
    model = mlp()
    engine = Engine(model)
    for ids in ([0] * T, [0, 1, 1, 0, 0]):
        segments = torch.tensor(ids)
        each = model(batch(T, T, 4)).square().sum((0, 2))
        losses = torch.zeros(2).double().index_add(0, segments, each)
        assert_gramian(engine, losses, model, segments=segments)


def test_batches_of_changing_size_and_length():
    model = tiny_gpt2()
    engine = Engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for rows, length in ((3, 7), (5, 7), (7, 7), (2, 8), (4, 4), (1, 6), (3, 3), (6, 2)):
            assert_gramian(engine, lm_losses(model, token_ids(rows, length)), model)


def segment_losses(per_token: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sum [B, T] losses by id [B] or [B, T]."""
    ids = ids[:, None].expand_as(per_token) if ids.dim() == 1 else ids
    total = per_token.new_zeros(count + 1).index_add(0, ids.flatten() + 1, per_token.flatten())
    return total[1:]


@pytest.mark.parametrize("ids", [[0, 0, 1, 1], [1, 0, 1, 0], [1, -1, 0, 1], [0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 0, 0]])
def test_groups_of_instances(ids: list[int]):
    model = tiny_llama()
    count, group = max(ids) + 1, torch.tensor(ids)

    def losses(step: int) -> Tensor:
        tokens = token_ids(4, 7, seed=step)
        logits = model(input_ids=tokens).logits.double()
        each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return segment_losses(each, group, count)

    assert_engine_right(model, losses, segments=lambda step: group)


def test_a_group_is_not_the_outer_product_of_sums():
    """Rows of a group are sums of rows: sum(x) sum(g)^T instead has cross terms (relative error 1.15 elsewhere)."""
    model = mlp()
    x = batch(4, 4)
    each = model(x).square().sum(1)
    rows = brute_rows(each, list(trainable(model)))
    engine = Engine(model)
    group = torch.tensor([0, 1, 0, 1])
    jacobian = engine.compute_jacobian(segment_losses(each[:, None], group, 2), group)
    for p, r in rows.items():
        assert relative(jacobian.rows(p), torch.stack([r[0] + r[2], r[1] + r[3]])) < EXACT


@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_packed_documents_by_token(order: str, adapters: bool):
    """[1, total]: documents along the tokens; -1 is padding. position_ids keep attention within documents."""
    model = tiny_llama(attn_implementation="eager")
    model = with_lora(model, warm=True) if adapters else model
    lengths = [4, 3, 5, 2]
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    if order == "mixed":
        document = torch.tensor([2, 0, 3, 1])[document]
    document = torch.where(document == 3, -1, document)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def losses(step: int) -> Tensor:
        ids = token_ids(1, sum(lengths), seed=step)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.double()
        each = (logits - 0.3).square().mean(2)
        return segment_losses(each, document, 3)

    assert_engine_right(model, losses, segments=lambda step: document)


def test_packed_documents_in_several_rows():
    """[B, T] in which one document ends and another begins inside a row."""
    model = mlp()
    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 3, -1], [1, 1, 4, 4, 4]])

    def losses(step: int) -> Tensor:
        return segment_losses(model(batch(B, T, 4, seed=step)).square().sum(2), ids, 5)

    assert_engine_right(model, losses, segments=lambda step: ids)


def test_a_group_absent_from_the_batch_has_a_row_of_zeros():
    model = mlp()
    ids = torch.tensor([0, 2, 2])
    losses = segment_losses(model(batch(B, 4)).square().sum(1, keepdim=True), ids, 4)
    gramian = assert_gramian(Engine(model), losses, model, segments=ids)
    assert not gramian[1].any()
    assert not gramian[3].any()


def test_tokens_without_an_objective_count_for_none():
    segments = Segments(2, torch.tensor([[0, -1, 1], [1, 1, -1]]))
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])[..., None]
    assert segments.sum(values).flatten().tolist() == [1.0, 28.0]
    assert segments.outer(values, torch.ones_like(values)).flatten().tolist() == [1.0, 28.0]
    instances = Segments(2, torch.tensor([-1, 1]))
    assert instances.sum(values).flatten().tolist() == [0.0, 56.0]
    assert instances.reduce(values.squeeze(-1)).tolist() == [[0.0, 0.0, 0.0], [8.0, 16.0, 32.0]]
