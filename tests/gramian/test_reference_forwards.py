"""Forwards between a policy's forward and its backward: of a reference model, of another adapter, in another mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_jd.gramian import Engine
from tests.gramian.oracle import EXACT, TIER_3, brute_gramian, brute_rows, check_step, perturb, relative, trainable
from tests.models import VOCABULARY, tiny_gpt2, with_lora

B, T = 3, 6
CHECKPOINTING = {"kept": None, "reentrant": True, "non-reentrant": False}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{TIER_3}"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # Reentrant, without a gradient.
]


def token_ids(step: int = 0, rows: int = B) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(step))


def policy(checkpointing: str, dropout: float = 0.0) -> nn.Module:
    """Build a GPT-2 with two adapters, of which "default" is active."""
    model = with_lora(tiny_gpt2(dropout=dropout), dropout=dropout, warm=True)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model.add_adapter("second", config)
    if checkpointing != "kept":
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    return model.double().train()


def log_likelihoods(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def without_adapters(model: nn.Module) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=token_ids(9))


def without_adapters_but_with_gradient(model: nn.Module) -> None:
    with model.disable_adapter():
        model(input_ids=token_ids(9))


def with_another_adapter(model: nn.Module) -> None:
    model.set_adapter("second")
    with torch.no_grad():
        model(input_ids=token_ids(9))
    model.set_adapter("default")


def with_another_adapter_and_gradient(model: nn.Module) -> None:
    model.set_adapter("second")
    model(input_ids=token_ids(9))
    model.set_adapter("default")


def with_some_parameters_frozen(model: nn.Module) -> None:
    some = list(trainable(model))[::3]
    for p in some:
        p.requires_grad_(False)
    model(input_ids=token_ids(9))
    for p in some:
        p.requires_grad_(True)


def with_the_base_unfrozen(model: nn.Module) -> None:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    model(input_ids=token_ids(9))
    for p in frozen:
        p.requires_grad_(False)


def in_evaluation_mode(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(input_ids=token_ids(9, rows=2))
    model.train()


def generating(model: nn.Module) -> None:
    model.eval()
    model.generate(input_ids=token_ids(9, rows=1)[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()


def of_a_copy(model: nn.Module) -> None:
    without_adapters(copy.deepcopy(model).eval())


def of_a_model_that_shares_modules(model: nn.Module) -> None:
    base = model.get_base_model()
    with model.disable_adapter():
        nn.Sequential(base.transformer.wte, base.transformer.h[0].mlp, base.lm_head)(token_ids(9))


def of_all_these_kinds(model: nn.Module) -> None:
    for between in BETWEEN[:-1]:
        between(model)


BETWEEN: list[Callable[[nn.Module], None]] = [
    without_adapters,
    without_adapters_but_with_gradient,
    with_another_adapter,
    with_another_adapter_and_gradient,
    with_some_parameters_frozen,
    with_the_base_unfrozen,
    in_evaluation_mode,
    generating,
    of_a_copy,
    of_a_model_that_shares_modules,
    of_all_these_kinds,
]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_a_forward_between_a_forward_and_its_backward(between, checkpointing: str):
    """Rows equal those of a model without an engine's hooks and without other forwards."""
    untouched, model = (policy(checkpointing, dropout=0.2) for _ in range(2))
    engine = Engine(model)
    for step in range(2):
        torch.manual_seed(step)
        expected = brute_rows(log_likelihoods(untouched, token_ids(step)), list(trainable(untouched)))
        expected = dict(zip(trainable(model), expected.values(), strict=True))
        torch.manual_seed(step)
        losses = log_likelihoods(model, token_ids(step))
        between(model)
        assert not check_step(engine, trainable(model), losses, expected=expected)
        assert set(engine.tiers().values()) == {1}
        for each in (untouched, model):
            torch.manual_seed(step)
            perturb(trainable(each))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("order", ["before", "between", "after", "around"])
def test_preferences_against_a_reference(order: str, checkpointing: str):
    """DPO's loss of each pair: chosen and rejected in one batch [2B] or two forwards, and a reference's forward."""
    model = policy(checkpointing)
    engine = Engine(model)

    def reference(ids: Tensor) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            return log_likelihoods(model, ids)

    for step in range(2):
        chosen, rejected = token_ids(2 * step), token_ids(2 * step + 1)
        known = reference(torch.cat([chosen, rejected])) if order in ("before", "around") else None
        if order == "between":
            better = log_likelihoods(model, chosen)
            known = reference(torch.cat([chosen, rejected]))
            worse = log_likelihoods(model, rejected)
        else:
            better, worse = log_likelihoods(model, torch.cat([chosen, rejected])).chunk(2)
            known = known if order == "before" else reference(torch.cat([chosen, rejected]))
        margins = better - worse - known[:B] + known[B:]
        assert not check_step(engine, trainable(model), -F.logsigmoid(0.1 * margins))
        assert set(engine.tiers().values()) == {1}
        perturb(trainable(model))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("late", [False, True], ids=["one by one", "forwards first"])
def test_two_adapters_trained_in_turn(late: bool, checkpointing: str):
    model = policy(checkpointing)
    engine = Engine(model)
    for step in range(2):
        forwards = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            forwards[name] = log_likelihoods(model, token_ids(step))
            if not late:
                assert not check_step(engine, trainable(model), forwards[name])
        for name, losses in forwards.items() if late else ():
            model.set_adapter(name)
            assert not check_step(engine, trainable(model), losses)
            assert {n for n in engine.tiers() if name not in n} == set()
        perturb(trainable(model))


def test_losses_of_two_adapters():
    """Both are trainable in the backward, though each forward used only one."""
    model = policy("kept")
    engine = Engine(model)
    losses = log_likelihoods(model, token_ids())
    model.set_adapter("second")
    losses = losses + log_likelihoods(model, token_ids(1))
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    assert not check_step(engine, trainable(model), losses)
    assert len(engine.tiers()) == 2 * 2 * 2 * 2


class Half(nn.Module):
    """A stem, then a block that may be checkpointed."""

    def __init__(self, checkpointing: str = "kept"):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = CHECKPOINTING[checkpointing]
        self.stem = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.3), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)

    def losses(self, seed: int = 0) -> Tensor:
        return self(torch.randn(B, 4, generator=torch.Generator().manual_seed(seed)).double()).square().sum(1)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_later_tap_does_not_change_a_recomputation(checkpointing: str):
    """A layer that was never trained is unfrozen for a forward in between, then frozen again."""
    model = Half(checkpointing)
    model.block[0].requires_grad_(False)
    engine = Engine(model)
    for step in range(2):
        losses = model.losses(step)
        model.block[0].requires_grad_(True)
        model.losses(2)
        model.block[0].requires_grad_(False)
        assert not check_step(engine, trainable(model), losses)


@pytest.mark.parametrize("first", [True, False], ids=["frozen", "unfrozen"])
def test_parameters_that_are_frozen_or_unfrozen_before_the_backward(first: bool):
    """Rows are those of autograd: parameters that are trainable in the forward and in the backward."""
    model = Half()
    engine = Engine(model)
    assert not check_step(engine, trainable(model), model.losses())
    model.block[0].requires_grad_(first)
    losses = model.losses()
    model.block[0].requires_grad_(not first)
    expected = brute_rows(losses, list(model.parameters()))
    assert expected[model.block[0].weight] is None
    assert not check_step(engine, trainable(model), losses, expected=expected)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(5), nn.MultiheadAttention(5, 1, dropout=0.3, batch_first=True)])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_forward_and_its_backward_in_two_modes(layer: nn.Module, mode: bool):
    """Each module is in the mode of its forward: a norm with stored statistics, and a module that is called again."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(5, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x) if norm else self.layer(x, x, x)[0])

    torch.manual_seed(0)
    norm = isinstance(layer, nn.BatchNorm1d)
    model = Model()
    engine = Engine(model)
    x = torch.randn(B, *[5] if norm else [4, 5]).double()
    model.eval()
    for _ in range(3):  # Finds the holder of a parameter that other modules read, and verifies it in this mode.
        engine.compute_gramian(model(x).square().flatten(1).sum(1))
    model.train(mode)
    losses = model(x).square().flatten(1).sum(1)
    model.train(not mode)
    if norm and mode:
        with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
            engine.compute_gramian(losses)
        return
    assert not check_step(engine, trainable(model), losses)
    assert [m.training for m in model.modules()] == [not mode] * len(list(model.modules()))


def test_a_gramian_without_adapters_needs_trainable_parameters():
    """A forward without trained parameters is refused, and taps are set for the next one."""
    model = policy("kept")
    engine = Engine(model)
    with model.disable_adapter():
        losses = log_likelihoods(model, token_ids())
        with pytest.raises(ValueError, match="no trainable parameter"):
            engine.compute_gramian(losses)
    losses = log_likelihoods(model, token_ids())
    expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(engine.compute_gramian(losses), expected) < EXACT
