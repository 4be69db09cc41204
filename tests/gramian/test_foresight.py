"""A step's last backward frees the graph, but only if it is known to be the last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_jd.gramian import Engine
from tests.gramian.oracle import EXACT, SINGLE, brute_gramian, brute_rows, perturb, relative, trainable
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, with_lora

B, T, WIDTH = 3, 5, 8


def inputs(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def is_freed(losses: Tensor) -> bool:
    try:
        losses.sum().backward()
    except RuntimeError:
        return True
    return False


def steps(model: nn.Module, engine: Engine, losses_of, count: int = 4, tolerance: float = EXACT) -> list[bool]:
    """Take steps, each compared with brute force; return whether each one took a single pass that freed the graph."""
    names, freed, passes = trainable(model), [], []
    record = engine._passes._record
    engine._passes._record = lambda *args, **kwargs: passes.append(args) or record(*args, **kwargs)
    for step in range(count):
        passes.clear()
        losses = losses_of(step)
        expected = brute_gramian(brute_rows(losses, list(names)), losses.shape)
        gramian = engine.compute_gramian(losses, retain_graph=False)
        assert relative(gramian, expected) < tolerance, f"step {step}"
        freed.append(len(passes) == 1 and is_freed(losses))
    engine._passes._record = record
    return freed


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6)).double()


def test_the_graph_is_freed_once_rows_are_proved():
    model = mlp()
    losses_of = lambda step: model(inputs(step, B + step, 4)).square().sum(1)  # noqa: E731
    assert steps(model, Engine(model, keep_rows=True), losses_of) == [False, True, True, True]


@pytest.mark.parametrize("keep_rows", [True, False, "auto", 1])
def test_the_update_works_whether_the_graph_was_freed_or_not(keep_rows):
    model = mlp()
    engine, names = Engine(model, keep_rows=keep_rows), trainable(model)
    for step in range(3):
        losses = model(inputs(step, B, 4)).square().sum(1)
        expected = torch.autograd.grad(losses.sum(), list(names), retain_graph=True)
        engine.compute_gramian(losses, retain_graph=False)
        model.zero_grad()
        engine.accumulate_grad(torch.ones_like(losses))
        for p, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_the_graph_is_retained_by_default():
    model = mlp()
    engine = Engine(model, keep_rows=True)
    for step in range(3):
        losses = model(inputs(step, B, 4)).square().sum(1)
        engine.compute_gramian(losses)
        assert not is_freed(losses)


def test_activations_are_freed_while_the_losses_live():
    model = mlp()
    engine = Engine(model, keep_rows=True)
    for step in range(2):
        activation = model[1](model[0](inputs(step, B, 64, 4)))  # Long: rows are smaller than factors.
        watched = StorageWeakRef(activation.untyped_storage())
        losses = model[2](activation).square().sum((1, 2))
        del activation
        engine.compute_gramian(losses, retain_graph=False)
        assert watched.expired(), "also after a proof, whose last pass brings the rows"


class Heads(nn.Module):
    """Two heads, one of which each step uses; and a weight that some steps read without calling its module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, WIDTH).double()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2).double() for _ in range(2))

    def forward(self, x: Tensor, head: int, tied: bool = False) -> Tensor:
        x = torch.tanh(self.body(x))
        y = self.heads[head](x).square().sum(1)
        return y + (x @ self.heads[1 - head].weight.T).square().sum(1) if tied else y


def test_steps_may_alternate_between_heads():
    model = Heads()
    freed = steps(model, Engine(model, keep_rows=True), lambda step: model(inputs(step, B, 4), step % 2), count=6)
    assert (freed[0], freed[-1]) == (False, True)


@pytest.mark.filterwarnings("ignore:.*bring no rows in the")
def test_a_weight_suddenly_read_without_its_module_is_noticed():
    model = Heads()
    freed = steps(model, Engine(model, keep_rows=True), lambda s: model(inputs(s, B, 4), 0, tied=s in (3, 4)), count=6)
    assert freed[2:4] == [True, False]


def test_a_called_head_may_be_unused_by_the_loss():
    model = Heads()

    def losses_of(step: int) -> Tensor:
        x = torch.tanh(model.body(inputs(step, B, 4)))
        outputs = [head(x).square().sum(1) for head in model.heads]
        return outputs[0] if step in (1, 3) else outputs[0] + outputs[1]

    assert steps(model, Engine(model, keep_rows=True), losses_of)[1:] == [True, True, True]


def test_the_taps_of_another_engine_do_not_count():
    model = Heads()
    body, whole = Engine(model.body, keep_rows=True), Engine(model, keep_rows=True)
    for step in range(3):
        losses = model(inputs(step, B, 4), 0)
        expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
        assert relative(whole.compute_gramian(losses), expected) < EXACT
        expected = brute_gramian(brute_rows(losses, list(trainable(model.body))), losses.shape)
        assert relative(body.compute_gramian(losses, retain_graph=False), expected) < EXACT
    assert is_freed(losses)


def test_a_new_mode_or_trainable_parameter_needs_a_new_proof():
    model = mlp()
    engine = Engine(model, keep_rows=True)
    losses_of = lambda step: model(inputs(step, B, 4)).square().sum(1)  # noqa: E731
    assert steps(model, engine, losses_of, 2) == [False, True]
    model.eval()
    assert steps(model, engine, losses_of, 2) == [False, True]
    model[0].requires_grad_(False)
    assert steps(model, engine, losses_of, 2) == [True, True]
    model[0].requires_grad_(True)
    assert steps(model, engine, losses_of, 1) == [True]


@pytest.mark.parametrize("kind", ["full", "lora", "positions", "checkpointing", "reentrant"])
def test_language_models_free_the_graph(kind: str):
    model = tiny_gpt2() if kind == "positions" else tiny_llama()
    model = (with_lora(model) if kind == "lora" else model).double()
    perturb(trainable(model))  # lora_B is zero, and so is the gradient of lora_A.
    if kind in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    ids = torch.randint(3, VOCABULARY, (4, B, T), generator=torch.Generator().manual_seed(0))

    def losses_of(step: int) -> Tensor:
        logits = model(input_ids=ids[step]).logits
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[step], reduction="none").sum(1)

    freed = steps(model, Engine(model, keep_rows=True), losses_of, tolerance=SINGLE)
    # Positions without a batch dimension take their rows from the words' gradient, if it fits.
    assert (freed[0], freed[-1]) == (False, kind not in ("positions", "reentrant"))
