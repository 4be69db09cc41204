"""The self-check: what it must catch, and what must not be a false alarm."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import RULES, Engine
from hf_jd.gramian.rows import DenseRows
from tests.gramian.oracle import EXACT, TIER_3, assert_engine_right, brute_gramian, brute_rows, relative, trainable
from tests.models import tiny_llama, with_lora

B, T, WIDTH = 3, 5, 8


def mlp(*middle: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, WIDTH), *middle, nn.Tanh(), nn.Linear(WIDTH, 2)).double()


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: {"weight": rows["weight"].scaled(torch.tensor([1.0, 2.0, 1.0])), "bias": rows["bias"]},
        lambda rows: {"weight": rows["weight"].select(torch.tensor([1, 0, 2])), "bias": rows["bias"]},
        lambda rows: {"weight": rows["weight"], "bias": rows["bias"].scaled(torch.tensor([0.0, 1.0, 1.0]))},
    ],
    ids=["one row doubled", "rows exchanged", "a bias's row lost"],
)
def test_wrong_rule_is_caught_and_another_tier_is_right(spoil):
    def wrong(module, input, grad_output, segments):
        return spoil(RULES[nn.Linear](module, input, grad_output, segments))

    model = mlp()
    tiers = assert_engine_right(model, lambda step: model(batch(B, 4)).square().sum(1), rules={nn.Linear: wrong})
    assert max(tiers.values()) > 1


def test_errors_in_a_users_rule_are_raised():
    def broken(module, input, grad_output, segments):
        raise RuntimeError("no such layer")

    def narrow(module, input, grad_output, segments):
        return {"weight": DenseRows(torch.zeros(B, 3, dtype=torch.float64), torch.Size([3]))}

    model = mlp()
    for rule, says in ((broken, "no such layer"), (narrow, r"rule of Linear gives weight 3 rows of shape \[3\]")):
        engine = Engine(model, rules={nn.Linear: rule})
        with pytest.raises((RuntimeError, ValueError), match=says):
            engine.compute_gramian(model(batch(B, 4)).square().sum(1))
        engine.detach()


def test_parameters_that_a_rule_leaves_out_go_to_the_next_tier():
    model = mlp()
    rules = {nn.Linear: lambda *seen: {}}
    tiers = assert_engine_right(model, lambda step: model(batch(B, 4)).square().sum(1), rules=rules)
    assert set(tiers.values()) == {2}


def test_batch_norm_in_training_is_named():
    model = mlp(nn.BatchNorm1d(WIDTH))
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    with pytest.raises(ValueError, match=r"BatchNorm1d.*GroupNorm.*eval"):
        engine.compute_gramian(losses)


def test_batch_norm_without_parameters_is_named():
    model = mlp(nn.BatchNorm1d(WIDTH, affine=False))
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    with pytest.raises(ValueError, match=r"mix.*BatchNorm"):
        engine.compute_gramian(losses)


def test_batch_norm_in_evaluation_is_right():
    model = mlp(nn.BatchNorm1d(WIDTH))
    model(batch(B, 4))
    model.eval()
    assert_engine_right(model, lambda step: model(batch(B, 4)).square().sum(1))


class Balanced(nn.Module):
    """A layer of experts whose outputs are each tiny; its balancing loss is over the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList([nn.Linear(4, 2) for _ in range(3)])
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        y = sum(gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
        return y, gates.mean(0).square().sum()


def test_balancing_loss_over_the_batch_is_named():
    model = Balanced()
    y, balance = model(batch(B, 4))
    engine = Engine(model)
    y, balance = model(batch(B, 4))
    with pytest.raises(ValueError, match=r"mix.*balancing loss"):
        engine.compute_gramian(y.square().sum(1) + 0.1 * balance)


def test_in_batch_negatives_are_named():
    model = mlp()
    engine = Engine(model)
    y = model(batch(B, 4))
    losses = nn.functional.cross_entropy(y @ y.T, torch.arange(B), reduction="none")
    with pytest.raises(ValueError, match=r"mix.*in-batch negatives"):
        engine.compute_gramian(losses)


def test_mixing_is_noticed_beside_a_much_larger_gradient():
    model = nn.ModuleList([mlp(), nn.Linear(4, 4, dtype=torch.float64)])
    engine = Engine(model)
    y = model[0](batch(B, 4))
    losses = nn.functional.cross_entropy(y @ y.T, torch.arange(B), reduction="none")
    with pytest.raises(ValueError, match="mix"):
        engine.compute_gramian(losses + 1e12 * model[1](batch(B, 4)).sum(1))


@pytest.mark.parametrize("reader, read", [(1, 0), (2, 0), (0, 2), (2, 1)])
def test_one_instance_that_reads_another_is_noticed(reader: int, read: int):
    """All other instances are isolated: a check of `losses[0]` alone would miss most of these."""
    model = mlp()
    engine = Engine(model)
    y = model[:2](batch(B, 4))
    mixing = torch.eye(B, dtype=torch.float64)
    mixing[reader, read] = 0.5
    losses = model[2](mixing @ y).square().sum(1)
    with pytest.raises(ValueError, match="mix"):
        engine.compute_gramian(losses)


def test_mixing_is_accepted_without_an_instance_dimension():
    model = mlp(nn.BatchNorm1d(WIDTH))
    engine = Engine(model, batch_dim=None)
    losses = model(batch(B, 4)).square().sum(1)
    expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
    assert relative(engine.compute_gramian(losses), expected) < EXACT


class Positions(nn.Module):
    """A table that is looked up without a batch dimension: [T], [1, T], or [T, T]."""

    def __init__(self, form: str):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.table, self.head = form, nn.Embedding(2 * T, WIDTH), nn.Linear(WIDTH, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        if self.form == "[T]":
            return self.head(x * self.table(ids))
        if self.form == "[1, T]":
            return self.head(x * self.table(ids[None]))
        bias = self.table((ids[:, None] - ids[None]) % (2 * T))
        return self.head(torch.einsum("btd,tsd->bsd", x, bias))


@pytest.mark.parametrize("size", [T, 2, 3], ids=["B==T", "B=2", "B=3"])
@pytest.mark.parametrize("form", ["[T]", "[1, T]", "[T, T]"])
def test_table_without_batch_dimension(form: str, size: int):
    """With B == T, the sum of the rows in a wrong layout IS autograd's gradient, and the Gramian is wrong by 100 %."""
    model = Positions(form)
    tiers = assert_engine_right(model, lambda step: model(batch(size, T, WIDTH)).square().mean((1, 2)))
    assert tiers["table.weight"] > 0
    assert tiers["head.weight"] == 1


def test_check_can_be_turned_off():
    calls = []

    def counted(module, input, grad_output, segments):
        calls.append(module)
        return RULES[nn.Linear](module, input, grad_output, segments)

    model = mlp()
    for check in (True, False):
        engine = Engine(model, rules={nn.Linear: counted}, check=check)
        for expected in (4, 2) if check else (2, 2):
            calls.clear()
            engine.compute_gramian(model(batch(B, 4)).square().sum(1))
            assert len(calls) == expected
        engine.detach()


def test_proof_is_not_repeated_at_each_new_length():
    calls = []

    def counted(module, input, grad_output, segments):
        calls.append(module)
        return RULES[nn.Linear](module, input, grad_output, segments)

    model = mlp()
    engine = Engine(model, rules={nn.Linear: counted})
    for length in (5, 6, 7, 9):
        calls.clear()
        engine.compute_gramian(model(batch(B, length, 4)).square().sum((1, 2)))
        assert len(calls) == (4 if length == 5 else 2)


def test_proof_is_repeated_for_a_new_rank():
    """[B, d], then [T, B, d] with the batch second: a proof for one says nothing about the other."""
    model = mlp()
    engine = Engine(model)
    names = list(trainable(model))
    for x, rows in ((batch(B, 4), lambda y: y.sum(1)), (batch(T, B, 4), lambda y: y.sum((0, 2)))):
        losses = rows(model(x).square())
        expected = brute_gramian(brute_rows(losses, names), losses.shape)
        assert relative(engine.compute_gramian(losses), expected) < EXACT


def test_change_of_batch_axis_at_one_rank_is_noticed():
    """[B, T, d] first, then [T, B, d] with the same leading dimension, B."""
    model = mlp()
    engine = Engine(model)
    names = list(trainable(model))
    for x, rows in ((batch(B, T, 4), lambda y: y.sum((1, 2))), (batch(T, B, 4), lambda y: y.sum((0, 2)))):
        losses = rows(model(x).square())
        expected = brute_gramian(brute_rows(losses, names), losses.shape)
        assert relative(engine.compute_gramian(losses), expected) < EXACT


@pytest.mark.parametrize("before", [1, 2, 3, 6])
@pytest.mark.parametrize("keep_rows", [True, False])
def test_rows_that_were_zero_are_proved_as_soon_as_they_are_not(before: int, keep_rows: bool):
    """lora_A has no gradient while lora_B is zero: its wrong rule must be caught in the first step with a gradient."""

    class Adapter(nn.Linear):
        pass

    def wrong_for_a(module, input, grad_output, segments):
        rows = RULES[nn.Linear](module, input, grad_output, segments)
        return {name: r.scaled(torch.tensor([1.0, 2.0, 3.0])) for name, r in rows.items()}

    torch.manual_seed(0)
    a, b = Adapter(4, 2, bias=False).double(), nn.Linear(2, WIDTH, bias=False).double()
    nn.init.zeros_(b.weight)
    model = nn.Sequential(a, b, nn.Tanh(), nn.Linear(WIDTH, 2).double())
    names, target = trainable(model), batch(B, 2)
    engine = Engine(model, rules={**RULES, Adapter: wrong_for_a}, keep_rows=keep_rows)
    for step in range(before + 2):
        if step == before:
            nn.init.normal_(b.weight)
        losses = (model(batch(B, 4)) - target).square().sum(1)
        expected = brute_gramian(brute_rows(losses, list(names)), losses.shape)
        assert relative(engine.compute_gramian(losses, retain_graph=False), expected) < EXACT
    assert engine.tiers()["0.weight"] > 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_no_false_alarm_in_bfloat16(seed: int, adapters: bool, autocast: bool):
    """In bfloat16, padding alone changes rows by 5e-3: no parameter may lose its rule, and no model be called mixed."""
    model = tiny_llama(seed)
    model = with_lora(model, seed, warm=True) if adapters else model
    model = model.float() if autocast else model.bfloat16()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 37, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 6, 4, 2])[:, None]).long()
    engine = Engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(input_ids=ids, attention_mask=mask).logits
            token = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
            losses = (token * mask[:, 1:]).sum(1)
            gramian = engine.compute_gramian(losses)
    assert set(engine.tiers().values()) <= {0, 1}
    expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
    assert gramian.dtype == torch.float32
    assert relative(gramian, expected) < 0.05


def test_warning_names_parameters_and_cost():
    model = Positions("[T]")
    engine = Engine(model)
    losses = model(batch(B, T, WIDTH)).square().mean((1, 2))
    with pytest.warns(UserWarning, match=r"table\.weight.*3 further passes"):
        engine.compute_gramian(losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Warns only once.
        engine.compute_gramian(model(batch(B, T, WIDTH)).square().mean((1, 2)))


def test_tier_3_filter_matches_the_warning():
    model = Positions("[T]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", TIER_3)
        Engine(model).compute_gramian(model(batch(B, T, WIDTH)).square().mean((1, 2)))
