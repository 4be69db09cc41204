"""Small layers whose rows are formed together, and graphs that are recognised instead of walked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from hf_jd.gramian._passes import foresight, recording
from hf_jd.gramian._rules import stacks
from tests.gramian.oracle import EXACT, SINGLE, brute_gramian, brute_rows, perturb, relative, trainable
from tests.gramian.small import batch, lm_losses, token_ids
from tests.models import tiny_llama, with_lora

B, T = 4, 5
SEGMENTS = {
    "instances": None,
    "mixed": torch.tensor([1, 0, 1, -1]),
    "sorted": torch.tensor([0, 0, 1, 1]),
    "by token": torch.tensor([0, 1, 1, 0, -1]).expand(B, T).roll(1, 0),
}


class Tower(nn.Module):
    """Narrow layers of the same shape; some are used twice, and some have a bias."""

    def __init__(self, depth: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=i % 2 == 0).double() for i in range(depth))

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        for layer in [*self.layers, *(self.layers[:2] if twice else [])]:
            x = torch.tanh(layer(x)) + x
        return x


def group_losses(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """Sum values [B, T] by group: [R]."""
    if ids is None:
        return tokens.sum(1)
    ids = ids if ids.dim() == 2 else ids[:, None].expand_as(tokens)
    return torch.stack([tokens[ids == k].sum() for k in range(2)])


def assert_right(engine: Engine, model: nn.Module, losses: Tensor, ids: Tensor | None = None) -> bool:
    """Assert that rows and Gramian equal brute force; return whether some rows are in stacks."""
    names = list(trainable(model))
    rows = brute_rows(losses, names)
    jacobian = engine.compute_jacobian(losses, ids)
    for p in names:
        assert relative(jacobian.rows(p), rows[p].reshape(len(losses), -1)) < EXACT
    assert relative(jacobian.gramian(), brute_gramian(rows, losses.shape)) < EXACT
    return bool(jacobian._stacks())


@pytest.mark.parametrize("waiting", [stacks.WAITING, 40, 0])
def test_rows_in_stacks(waiting: int, monkeypatch):
    """For several kinds of objectives in turn, and however few tensors may wait."""
    monkeypatch.setattr(stacks, "WAITING", waiting)
    model = Tower()
    engine = Engine(model)
    for step, (kind, ids) in enumerate([*SEGMENTS.items(), *reversed(SEGMENTS.items())]):
        tokens = model(batch(B, T, 4, seed=step)).square().sum(2)
        assert assert_right(engine, model, group_losses(tokens, ids), ids), kind


def test_layers_may_be_used_twice_in_some_steps():
    model = Tower()
    engine = Engine(model)
    for step in range(5):
        losses = model(batch(B, T, 4, seed=step), twice=step in (1, 3)).square().sum((1, 2))
        assert_right(engine, model, losses)


def test_factors_smaller_than_rows_are_not_stacked():
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False).double() for _ in range(3)))
    engine = Engine(model)
    for ids in (torch.tensor([1, 0, 1, 0]), None, torch.tensor([0, 0, 1, 1])):
        losses = group_losses(model(batch(B, 2, 40)).square().sum(2), ids)
        assert assert_right(engine, model, losses, ids) is (ids is not None)


@pytest.fixture
def walks(monkeypatch) -> list[Tensor]:
    walked: list[Tensor] = []
    monkeypatch.setattr(foresight, "walk", lambda losses, walk=foresight.walk: walked.append(losses) or walk(losses))
    return walked


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_graph_is_walked_once(retain_graph: bool, walks: list[Tensor]):
    """It is not walked again if only batch size and length change, or the program takes an earlier path again."""
    model = with_lora(tiny_llama()).double()
    perturb(trainable(model))
    engine = Engine(model)
    for step in range(8):
        model.train(step not in (3, 4, 6))
        del walks[:]
        losses = lm_losses(model, token_ids(B + step % 2, T + step, seed=step))
        expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
        assert relative(engine.compute_gramian(losses, retain_graph=retain_graph), expected) < SINGLE
        if step in (2, 6, 7):  # The proof in step 3 may have changed what was settled.
            assert not walks


def test_freezing_a_parameter_walks_the_graph_again(walks: list[Tensor]):
    model = Tower()
    engine = Engine(model)
    for step in range(6):
        model.layers[2].requires_grad_(step < 3)
        del walks[:]
        losses = model(batch(B, T, 4, seed=step)).square().sum((1, 2))
        expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
        assert relative(engine.compute_gramian(losses, retain_graph=False), expected) < EXACT
        assert bool(walks) is (step in (0, 1, 3))


@pytest.mark.parametrize("ids", SEGMENTS.values(), ids=SEGMENTS)
def test_a_repeated_step_decides_nothing_again(ids: Tensor | None, monkeypatch):
    """Until a parameter is used twice, frozen or of another shape, or the objectives change."""
    decided = []

    def counted(*arguments):
        decided.append(1)
        return kind_of(*arguments)

    kind_of = stacks.kind_of
    monkeypatch.setattr(recording, "kind_of", counted)
    model = Tower()
    engine, x = Engine(model), torch.randn(B, T, 4, dtype=torch.float64)

    def decisions(ids: Tensor | None, twice: bool = False) -> int:
        decided.clear()
        perturb(model.parameters())
        assert assert_right(engine, model, group_losses(model(x, twice).square().sum(-1), ids), ids)
        return len(decided)

    assert decisions(ids) > 0
    while decisions(ids):
        pass
    assert decisions(ids) == 0
    model.layers[0].weight.requires_grad_(False)
    assert decisions(ids) == 1
    assert decisions(None if ids is not None else SEGMENTS["sorted"]) > 0
    assert decisions(ids, twice=True) > 0
    model.layers[0].weight.requires_grad_(True)
    assert decisions(ids) > 0
