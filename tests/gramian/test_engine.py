"""What the engine promises: losses and Gramians of any shape, segments, modes, steps in any order, errors."""

from __future__ import annotations

import copy
import gc
import io
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from hf_jd.gramian import Engine, Jacobian
from hf_jd.gramian.layouts import Segments
from tests.gramian.oracle import (
    EXACT,
    SINGLE,
    TIER_3,
    assert_engine_right,
    brute_gramian,
    brute_rows,
    brute_update,
    check_step,
    perturb,
    relative,
    trainable,
)
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, with_lora

B, T, WIDTH = 3, 5, 8


def mlp(*, seed: int = 0, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)).double()


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def lm_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over each instance [B]."""
    logits = model(input_ids=ids).logits.double()
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def assert_gramian(engine: Engine, losses: Tensor, *modules: nn.Module, tolerance: float = EXACT, **kwargs) -> Tensor:
    expected = brute_gramian(brute_rows(losses, list(trainable(*modules))), losses.shape)
    gramian = engine.compute_gramian(losses, **kwargs)
    assert gramian.shape == expected.shape
    assert relative(gramian, expected) < tolerance
    return gramian


# Losses and their shapes.


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
    """The Gramian and the weights are those of the losses as they are given."""
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
    """Two losses of each of three groups, the groups last: segments name them."""
    model = mlp()
    ids = torch.tensor([2, 0, 0, 2, 1])
    each = model(batch(5, 4)).square().unflatten(1, (2, 3)).sum(2)
    losses = torch.stack([each[ids == k].sum(0) for k in range(3)], dim=1)
    assert_gramian(Engine(model, batch_dim=-1), losses, model, segments=ids)


@pytest.mark.parametrize("shape, batch_dim", [((3,), 1), ((3,), -2), ((3, 2), 2), ((3, 2), -3), ((1, 3, 2), 7)])
def test_a_dimension_that_the_losses_do_not_have(shape: tuple[int, ...], batch_dim: int):
    model = mlp()
    losses = model(batch(B, 4)).flatten()[: torch.Size(shape).numel()].view(shape)
    n = len(shape)
    with pytest.raises(ValueError, match=rf"batch_dim is {batch_dim}, .* allowed are {-n} to {n - 1}"):
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
    """[m, K]: objectives of different natures for each instance."""
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
    """With one objective no check can tell layouts apart: what it learnt must not be trusted afterwards."""
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
    """As with one objective: no check can tell layouts apart where all instances belong to one group."""
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


# Segments.


def segment_losses(per_token: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sums of [B, T] losses by id [B] or [B, T]."""
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
    """[1, total]: documents along the tokens; -1 is padding. Attention is kept inside a document by position_ids."""
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
    """[B, T] where one document ends and another begins inside a row."""
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


def test_tokens_of_no_objective_count_for_none():
    segments = Segments(2, torch.tensor([[0, -1, 1], [1, 1, -1]]))
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])[..., None]
    assert segments.sum(values).flatten().tolist() == [1.0, 28.0]
    assert segments.outer(values, torch.ones_like(values)).flatten().tolist() == [1.0, 28.0]
    instances = Segments(2, torch.tensor([-1, 1]))
    assert instances.sum(values).flatten().tolist() == [0.0, 56.0]
    assert instances.reduce(values.squeeze(-1)).tolist() == [[0.0, 0.0, 0.0], [8.0, 16.0, 32.0]]


# Rows kept or not.


@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
def test_all_modes_give_the_same_gramian_and_update(adapters: bool):
    model = tiny_llama()
    model = with_lora(model, warm=True) if adapters else model
    names = list(trainable(model))
    modes = [True, False, "auto", 0, 20_000, 100_000, 10**9]
    found = []
    for mode in modes:
        engine = Engine(model, keep_rows=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            gramian = engine.compute_gramian(lm_losses(model, token_ids(4, 6)))
        model.zero_grad()
        engine.accumulate_grad(gramian.sum(1))
        found.append((gramian, [p.grad.clone() for p in names]))
        engine.detach()
    for gramian, update in found[1:]:
        assert relative(gramian, found[0][0]) < SINGLE
        assert all(relative(a, b) < SINGLE for a, b in zip(update, found[0][1], strict=True))


class ReadOutside(nn.Module):
    """A layer, and a large matrix that the loss reads: tier 3."""

    def __init__(self):
        super().__init__()
        self.layer, self.matrix = nn.Linear(4, 4), nn.Parameter(torch.randn(30, 40))

    def losses(self, step: int) -> Tensor:
        scale = self.matrix.sin().sum() + torch.arange(B)
        return self.layer(batch(B, 4, seed=step)).square().sum(1) * scale


@pytest.mark.parametrize("budget", [0, 1_000, 3_000, 10_000, 20_000, 40_000, 100_000, 1_000_000])
@pytest.mark.parametrize("kind", ["read outside", "llama"])
def test_what_is_kept_is_within_the_budget(kind: str, budget: int):
    """Rows, factors or nothing; never more bytes than were allowed, whichever tier they came by."""
    torch.manual_seed(0)
    model = ReadOutside().double() if kind == "read outside" else tiny_llama()
    engine = Engine(model, keep_rows=budget)
    for step in range(2):  # The first step learns by which tier the rows come.
        losses = model.losses(step) if kind == "read outside" else lm_losses(model, token_ids(3, 5, seed=step))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert_gramian(engine, losses, model, tolerance=SINGLE)
        assert engine._step is not None
        kept = engine._step.kept
        assert isinstance(kept, Tensor) or kept.nbytes <= budget


def test_accumulate_several_times():
    model = mlp()
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    names = list(trainable(model))
    weights = [torch.rand(B, dtype=torch.float64) for _ in range(3)]
    expected = brute_update(brute_rows(losses, names), sum(weights))
    for w in weights:
        engine.accumulate_grad(w)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_a_parameter_met_with_and_without_a_batch_counts_once():
    """DeBERTa's projections see tokens and relative positions."""
    layer, table = nn.Linear(4, 4).double(), batch(2 * T + 1, 4)
    engine = Engine(layer, keep_rows=False)
    x = batch(B, T, 4)
    losses = (layer(x) @ layer(table).T).square().sum((1, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIER_3)
        for _ in range(2):  # The second time, no forward says how often the layer is used.
            assert_gramian(engine, losses, layer)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_losses_backward_afterwards(keep_rows: bool):
    """TorchJD's way: the graph is kept, and hooks of the engine look away."""
    model = mlp()
    engine = Engine(model, keep_rows=keep_rows)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    weights = torch.rand(B, dtype=torch.float64)
    names = list(trainable(model))
    expected = brute_update(brute_rows(losses, names), weights)
    losses.backward(weights)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_gradients_and_their_hooks_are_left_alone_by_the_gramian():
    model = mlp()
    engine = Engine(model)
    met = []
    first, *rest = model.parameters()
    handles = [first.register_hook(lambda g: met.append("hook"))]
    handles.append(first.register_post_accumulate_grad_hook(lambda p: met.append("accumulated")))
    kept = torch.ones_like(first)
    first.grad = kept
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    assert first.grad is kept
    assert all(p.grad is None for p in rest)
    del met[:]  # The self-check of the first step is a plain gradient.
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    assert met == []
    assert bool((first.grad == 1).all())
    for handle in handles:
        handle.remove()


def test_global_random_state_is_left_alone():
    model = mlp()
    losses = model(batch(B, 4)).square().sum(1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Engine(model).compute_gramian(losses)
    assert torch.equal(torch.rand(1), expected)


# Steps in any order.


def test_two_forwards_then_two_backwards():
    model = mlp()
    engine = Engine(model)
    first = model(batch(B, 4, seed=1)).square().sum(1)
    second = model(batch(4, 4, seed=2)).square().sum(1)
    for losses in (first, second):
        assert_gramian(engine, losses, model)


def test_two_forwards_then_two_backwards_in_reverse():
    model = mlp()
    engine = Engine(model, keep_rows=False)
    first = model(batch(B, 4, seed=1)).square().sum(1)
    second = model(batch(B, 4, seed=2)).square().sum(1)
    for losses in (second, first):
        assert_gramian(engine, losses, model)


def test_losses_of_two_forwards_in_one_vector():
    """A module called twice by the user: rows of both calls add."""
    model = mlp()
    assert_engine_right(
        model, lambda step: (model(batch(B, 4, seed=step)) - model(batch(B, 4, seed=step + 9))).square().sum(1)
    )


def test_two_models_in_one_engine():
    encoder, decoder = mlp(seed=0), mlp(seed=1, inputs=6)
    losses = lambda step: decoder(encoder(batch(B, 4, seed=step))).square().sum(1)  # noqa: E731
    tiers = assert_engine_right([encoder, decoder], losses)
    assert len(tiers) == 12


def test_submodule_gives_the_partial_gramian():
    model = mlp()
    tiers = assert_engine_right(model[3], lambda step: model(batch(B, 4, seed=step)).square().sum(1))
    assert list(tiers) == ["weight", "bias"]


def test_two_pass_reaches_parameters_outside_the_engine():
    model = mlp()
    engine = Engine(model[3], keep_rows=False)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    weights = torch.rand(B, dtype=torch.float64)
    names = list(trainable(model))
    expected = brute_update(brute_rows(losses, names), weights)
    engine.accumulate_grad(weights)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_two_engines_on_one_model():
    model = mlp()
    whole, part = Engine(model), Engine(model[0])
    losses = model(batch(B, 4)).square().sum(1)
    assert_gramian(whole, losses, model)
    assert_gramian(part, losses, model[0])


def test_a_second_engine_looks_away_while_the_first_calls_a_module_again():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.PReLU(), nn.ConvTranspose1d(WIDTH, 2, 1)).double()
    engines = [Engine(model), Engine(model)]
    for engine in engines:
        losses = model[2](model[:2](batch(B, T, 4)).transpose(1, 2)).square().sum((1, 2))
        assert_gramian(engine, losses, model)
        assert set(engine.tiers().values()) == {1, 2}


def test_memory_stays_flat_over_forwards_without_backward():
    model = mlp()
    engine = Engine(model)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)
    for _ in range(10):
        model(batch(B, 4))
    before = tensors()
    for i in range(1000):
        with torch.set_grad_enabled(i % 2 == 0):
            model(batch(B, 4))
    assert tensors() <= before + 2
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_forwards_of_other_kinds_between_steps():
    model = tiny_llama()
    engine = Engine(model)
    for step in range(3):
        losses = lm_losses(model.train(), token_ids(B, 6, seed=step))
        assert_gramian(engine, losses, model, tolerance=SINGLE)
        model.eval()
        with torch.no_grad():
            model(token_ids(2, 4))
        with torch.inference_mode():
            model(token_ids(5, 3))
        model(token_ids(2, 6))


def test_no_grad_forward_between_forward_and_backward():
    model = mlp()
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    with torch.no_grad():
        model(batch(7, 4))
    model(batch(2, 4))  # Never differentiated.
    assert_gramian(engine, losses, model)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_dropout(keep_rows: bool):
    """One forward serves engine and oracle: rows follow the masks that were drawn."""
    model = with_lora(tiny_gpt2(dropout=0.3), dropout=0.3, warm=True).train()
    engine = Engine(model, keep_rows=keep_rows)
    for step in range(3):
        losses = lm_losses(model, token_ids(B, 6, seed=step))
        found = check_step(engine, trainable(model), losses, keep_rows=[keep_rows])
        assert not found


def test_train_and_eval():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Dropout(0.4), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    engine = Engine(model)
    for mode in (True, False, True):
        model.train(mode)
        assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


# Checkpointing.


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing(reentrant: bool, adapters: bool, dropout: float):
    model = tiny_gpt2(dropout=dropout)
    if adapters:
        model = with_lora(model, dropout=dropout, warm=True)
        model.enable_input_require_grads()
    base = model.get_base_model() if adapters else model
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()

    def losses(step: int) -> Tensor:
        return lm_losses(model, token_ids(B, 6, seed=step))

    assert_engine_right(model, losses)


class Blocks(nn.Module):
    """Three blocks; those named are checkpointed."""

    def __init__(self, checkpointed: dict[int, bool]):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i in self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.checkpointed[i])
            else:
                x = block(x)
        return self.last(x)


@pytest.mark.parametrize(
    "checkpointed", [{1: True}, {1: False}, {0: True, 2: False}, {0: True, 1: True, 2: True}, {0: False, 1: False}]
)
def test_checkpointing_of_some_layers(checkpointed: dict[int, bool]):
    model = Blocks(checkpointed)
    assert_engine_right(model, lambda step: model(batch(B, 4, seed=step)).square().sum(1), steps=3)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_reentrant_checkpointing_leaves_gradients_alone(keep_rows: bool):
    """There a plain backward runs, and `.grad` is put back: of parameters outside the engine and of inputs too."""
    model = Blocks({1: True})
    engine = Engine(model.blocks, keep_rows=keep_rows)
    kept = {p: torch.ones_like(p) if i % 2 else None for i, p in enumerate(model.parameters())}
    for p, gradient in kept.items():
        p.grad = gradient
    x = batch(B, 4).requires_grad_()
    for _ in range(2):
        engine.compute_gramian(model(x).square().sum(1))
        assert x.grad is None
        for p, gradient in kept.items():
            assert p.grad is gradient
            assert gradient is None or bool((gradient == 1).all())


def test_checkpointed_layer_whose_part_is_never_called():
    """A tap set for the parent between two Gramians of one forward would change what its recomputation saves."""
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 5, dropout=0.0, batch_first=True)]
    ).double()
    for p in (model[1].self_attn.in_proj_weight, model[1].self_attn.in_proj_bias):
        p.requires_grad_(False)

    def losses(step: int) -> Tensor:
        y = checkpoint(model[1], model[0](batch(B, T, 4, seed=step)), use_reentrant=False)
        return (y - torch.arange(4).sin()).square().sum((1, 2))

    assert_engine_right(model, losses, steps=3)


def test_checkpointing_switched_on_and_off():
    model = Blocks({})
    engine = Engine(model)
    for checkpointed in ({}, {1: True}, {0: False}, {}, {0: True, 1: True, 2: True}):
        model.checkpointed = checkpointed
        found = check_step(engine, trainable(model), model(batch(B, 4)).square().sum(1))
        assert not found


# Precision.


def test_autocast_bfloat16():
    model = with_lora(tiny_llama(), warm=True).float()
    engine = Engine(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = lm_losses(model, token_ids(4, 6))
    expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
    gramian = engine.compute_gramian(losses)
    assert gramian.dtype == torch.float32
    assert relative(gramian, expected) < 0.05
    engine.accumulate_grad(torch.ones(4))
    assert all(p.grad.dtype == torch.float32 for p in trainable(model))


def test_gramian_inside_autocast():
    """Rows are formed in the dtypes of the backward, also where the caller forgot to leave autocast."""
    model = mlp().float()
    engine = Engine(model)
    losses = model(batch(B, 4).float()).square().sum(1)
    outside = engine.compute_gramian(losses)
    with torch.autocast("cpu", torch.bfloat16):
        inside = engine.compute_gramian(losses)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_float16_with_loss_scaling():
    """Scaled losses have a scaled Gramian: the caller undoes the scale; rows of float32 parameters stay finite."""
    model = mlp().float()
    engine = Engine(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = batch(B, 4).float()
    plain = engine.compute_gramian(model(x).square().sum(1))
    with torch.autocast("cpu", torch.float16):
        losses = model(x).square().float().sum(1)
    gramian = engine.compute_gramian(scaler.scale(losses))
    assert relative(gramian / scaler.get_scale() ** 2, plain) < 0.02
    engine.accumulate_grad(torch.ones(B))
    scaler.unscale_(optimizer)
    names = list(trainable(model))
    expected = brute_update(brute_rows(model(x).square().sum(1), names), torch.ones(B))
    assert all(relative(p.grad, expected[p]) < 0.02 for p in names)
    scaler.step(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype: torch.dtype):
    model = mlp().to(dtype)
    engine = Engine(model)
    losses = model(batch(B, 4).to(dtype)).float().square().sum(1)
    gramian = engine.compute_gramian(losses)
    assert gramian.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    engine.accumulate_grad(torch.ones(B))
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_long_rows_in_float32():
    """Ten million columns: one float32 product of them is wrong by 1.7e-3."""
    torch.manual_seed(0)
    model = nn.Linear(3200, 3200, bias=False)
    engine = Engine(model, check=False)
    x, target = torch.randn(2, 40, 3200) + 1.0, torch.randn(2, 40, 3200)
    y = model(x)
    gramian = engine.compute_gramian((y * target).sum((1, 2)))
    products = (x.flatten(0, 1).double() @ x.flatten(0, 1).double().T) * (
        target.flatten(0, 1).double() @ target.flatten(0, 1).double().T
    )
    expected = products.view(2, 40, 2, 40).sum((1, 3))
    assert float(((gramian - expected) / expected.diagonal().min()).abs().max()) < 1e-5


def test_gramian_is_symmetric_and_scales_with_the_losses():
    model = mlp()
    engine = Engine(model)
    one = engine.compute_gramian(model(batch(5, 4)).square().sum(1))
    assert torch.equal(one, one.T)
    small = engine.compute_gramian(1e-8 * model(batch(5, 4)).square().sum(1))
    assert relative(small * 1e16, one) < EXACT


# The model changes.


def test_detach_leaves_the_model_as_it_was():
    model = mlp()
    before = [list(m._forward_hooks) for m in model.modules()]
    engine = Engine(model)
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    engine.detach()
    assert [list(m._forward_hooks) for m in model.modules()] == before
    assert "Tap" not in type(model(batch(B, 4)).grad_fn).__name__
    with pytest.raises(ValueError, match="compute_gramian"):
        engine.accumulate_grad(torch.ones(B))


def test_an_engine_that_is_gone_lets_the_model_be():
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
    found = check_step(engine, trainable(model), lm_losses(model, token_ids(B, 6)), tolerance=SINGLE)
    assert not found


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
    """A reference model is the same model with its adapters off, which freezes them meanwhile."""
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
def test_what_was_compiled_without_the_engine_is_compiled_anew(alike: bool):
    torch._dynamo.reset()
    model = mlp()
    before = torch.compile(copy.deepcopy(model) if alike else model, backend="aot_eager")
    with dynamo_config.patch(skip_nnmodule_hook_guards=False), functorch_config.patch(donated_buffer=False):
        before(batch(B, 4)).sum().backward()
        engine, compiled = Engine(model), torch.compile(model, backend="aot_eager")
        assert_gramian(engine, compiled(batch(B, 4)).square().sum(1), model)
    assert set(engine.tiers().values()) == {1}
    torch._dynamo.reset()


# The Jacobian as an object.


@pytest.fixture
def jacobians() -> tuple[list[Jacobian], list[Tensor], list[nn.Parameter]]:
    """Jacobians of a tied GPT-2 over three batches, beside dense matrices; rows dense, sparse and outer."""
    model = tiny_gpt2()
    names = list(trainable(model))
    engine = Engine(model)
    found, dense = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step, (rows, length) in enumerate(((3, 4), (3, 2), (2, 7))):
            losses = lm_losses(model, token_ids(rows, length, seed=step))
            found.append(engine.compute_jacobian(losses, materialise=step == 0))
            brute = brute_rows(losses, names)
            dense.append(torch.cat([torch.zeros(rows, p.numel()) if brute[p] is None else brute[p] for p in names], 1))
    return found, dense, names


def close(jacobian: Jacobian, dense: Tensor) -> bool:
    weights = torch.rand(len(dense), dtype=torch.float64)
    update = jacobian.weighted_sum(weights)
    flat = torch.cat([update.get(p, torch.zeros_like(p)).flatten() for p in jacobian.parameters])
    return (
        len(jacobian) == len(dense)
        and relative(jacobian.dense(), dense) < EXACT
        and relative(jacobian.gramian(), dense @ dense.T) < EXACT
        and relative(flat, weights @ dense) < EXACT
    )


def test_jacobian_is_brute_force(jacobians):
    for jacobian, dense in zip(*jacobians[:2], strict=True):
        assert close(jacobian, dense)


def test_jacobian_cat(jacobians):
    found, dense, _ = jacobians
    assert close(Jacobian.cat(found), torch.cat(dense))
    assert close(Jacobian.cat([found[2]]), dense[2])


def test_jacobian_add(jacobians):
    found, dense, _ = jacobians
    assert close(found[0] + found[1], dense[0] + dense[1])


@pytest.mark.parametrize("index", [[0, 2], [2, 0], [1], [0, 1, 2]])
def test_jacobian_select(jacobians, index: list[int]):
    found, dense, _ = jacobians
    for jacobian, matrix in zip(found[:2], dense[:2], strict=True):
        assert close(jacobian.select(torch.tensor(index)), matrix[index])


def test_jacobian_select_after_cat(jacobians):
    found, dense, _ = jacobians
    index = torch.tensor([7, 0, 4])
    assert close(Jacobian.cat(found).select(index), torch.cat(dense)[index])


def test_jacobian_select_drops_what_is_not_finite(jacobians):
    found, dense, _ = jacobians
    spoilt = found[1].scaled(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64))
    assert close(spoilt.select(torch.tensor([0, 2])), dense[1][[0, 2]])


def test_jacobian_scaled(jacobians):
    found, dense, _ = jacobians
    factors = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    for jacobian, matrix in zip(found[:2], dense[:2], strict=True):
        assert close(jacobian.scaled(factors), factors[:, None] * matrix)


def test_jacobian_of_unused_parameters(jacobians):
    model = nn.ModuleList([mlp(seed=0), mlp(seed=1)])
    engine = Engine(model)
    one = engine.compute_jacobian(model[0](batch(B, 4)).square().sum(1))
    two = engine.compute_jacobian(model[1](batch(B, 4)).square().sum(1))
    n = one.dense().shape[1]
    assert len(one.used) == len(two.used) == 6
    assert len(one.parameters) == 12
    assert close(Jacobian.cat([one, two]), torch.cat([one.dense(), two.dense()]))
    assert close(one + two, one.dense() + two.dense())
    assert one.dense()[:, n // 2 :].abs().sum() == 0


def test_jacobian_bytes(jacobians):
    found, dense, _ = jacobians
    assert 0 < found[2].nbytes < dense[2].nbytes


# Errors.


def freed(losses: Tensor) -> Tensor:
    losses.sum().backward()
    return losses


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script")
        return torch.jit.script(model)


def losses_of(model: nn.Module) -> Tensor:
    return model(batch(B, 4)).square().sum(1)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Engine(), "one or more"),
        (lambda: Engine("model"), "one or more"),
        (lambda: Engine(scripted(mlp())), "scripted module"),
        (lambda: Engine(nn.ParameterList([torch.zeros(2, dtype=torch.complex128)])), "0 is complex.*view_as_real"),
        (lambda: Engine(mlp(), batch_dim=1.0), "batch_dim is 1.0"),
        (lambda: Engine(mlp(), batch_dim=True), "batch_dim is True"),
        (lambda: Engine(mlp(), keep_rows="always"), "keep_rows is 'always'"),
    ],
)
def test_bad_engine(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "losses, message",
    [
        (lambda model: losses_of(model).sum(), "scalar"),
        (lambda model: losses_of(model).detach(), "depend on no trainable parameter"),
        (lambda model: batch(B).requires_grad_() * 2, "depend on no"),
        (lambda model: losses_of(model)[:0], r"\[0\].*no objective"),
        (lambda model: losses_of(model) / torch.tensor([1.0, 0.0, 1.0]), r"not finite at \[1\]"),
        (lambda model: losses_of(model) * float("nan"), "not finite"),
        (lambda model: losses_of(model).sum().expand(4), "4 instances"),
        (lambda model: losses_of(model)[:2], "2 instances"),
        (lambda model: torch.cat([losses_of(model), losses_of(model)]), "6 instances.*separate forwards"),
        (lambda model: freed(losses_of(model)), "graph of these losses was freed"),
    ],
    ids=[
        "scalar",
        "detached",
        "another's",
        "empty",
        "infinite",
        "nan",
        "of no instance",
        "too few",
        "too many",
        "freed",
    ],
)
def test_bad_losses(losses, message: str):
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.compute_gramian(losses(model))


def test_no_trainable_parameter():
    model = mlp().requires_grad_(False)
    engine = Engine(model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        engine.compute_gramian(batch(B).requires_grad_())


@pytest.mark.parametrize(
    "segments, message",
    [
        (torch.tensor([0, 1, 3]), "ids from 0 to 3"),
        (torch.tensor([0, -2, 1]), "ids from -2 to 1"),
        (torch.tensor([0.0, 1.0, 2.0]), "float"),
        (torch.tensor([True, False, True]), "bool"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "shape"),
        (torch.tensor(0), "shape"),
        (torch.zeros(0, dtype=torch.long), r"\[0\].*no instance"),
    ],
)
def test_bad_segments(segments: Tensor, message: str):
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.compute_gramian(losses_of(model), segments)


def test_segments_of_another_batch():
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match="5 instances"):
        engine.compute_gramian(losses_of(model), torch.tensor([0, 1, 2, 0, 1]))


def test_segments_without_instance_dimension():
    model = mlp()
    with pytest.raises(ValueError, match="need a batch_dim"):
        Engine(model, batch_dim=None).compute_gramian(losses_of(model), torch.tensor([0, 1, 2]))


def test_accumulate_before_gramian():
    with pytest.raises(ValueError, match="compute_gramian"):
        Engine(mlp()).accumulate_grad(torch.ones(B))


@pytest.mark.parametrize("weights", [torch.ones(B + 1), torch.ones(B, 1), torch.ones(())])
def test_weights_of_a_wrong_shape(weights: Tensor):
    model = mlp()
    engine = Engine(model)
    engine.compute_gramian(losses_of(model))
    with pytest.raises(ValueError, match=r"weights have shape.*\[3\]"):
        engine.accumulate_grad(weights)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_accumulate_after_the_parameters_changed(keep_rows: bool):
    model = mlp()
    engine = Engine(model, keep_rows=keep_rows)
    engine.compute_gramian(losses_of(model))
    perturb(list(trainable(model))[2:])
    with pytest.raises(ValueError, match=r"4 parameter\(s\) have changed.*2\.weight"):
        engine.accumulate_grad(torch.ones(B))


def test_nothing_is_left_behind_by_an_error():
    """After any of the errors, the next step is right."""
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match="not finite"):
        engine.compute_gramian(losses_of(model) * float("nan"))
    with pytest.raises(ValueError, match="compute_gramian"):
        engine.accumulate_grad(torch.ones(B))
    assert_gramian(engine, losses_of(model), model)


def test_a_forward_that_raises_leaves_nothing_behind():
    model = mlp()
    engine = Engine(model)
    with pytest.raises(RuntimeError):
        model(batch(B, 5))
    assert_gramian(engine, losses_of(model), model)


def test_a_gradient_that_is_not_finite_is_not_called_wrong():
    """losses are finite, a row is not: the caller sees it in the Gramian."""
    model = mlp()
    engine = Engine(model)
    one, two, three = model(batch(B, 4)).square().sum(1)
    gramian = engine.compute_gramian(torch.stack([one, (two - two.detach()).sqrt(), three]))
    finite = gramian.diagonal().isfinite()
    assert finite.tolist() == [True, False, True]


def test_a_paused_engine_meets_nothing_and_goes_on_afterwards():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    engine = Engine(model)
    expected = engine.compute_gramian(model(x).squeeze(1))
    with engine.paused():
        losses = model(x).squeeze(1)
        assert "Tap" not in str(losses.grad_fn.next_functions)
        losses.sum().backward()
    with pytest.raises(RuntimeError), engine.paused():
        raise RuntimeError
    assert torch.equal(engine.compute_gramian(model(x).squeeze(1)), expected)
