"""What the engine refuses, and that errors leave nothing behind."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    perturb,
    trainable,
)
from tests.gramian.small import B, assert_gramian, batch, mlp


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
def test_bad_arguments_are_refused(build, message: str):
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
        (lambda model: freed(losses_of(model)), "freed the graph of these losses"),
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
def test_bad_losses_are_refused(losses, message: str):
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.compute_gramian(losses(model))


def test_a_model_without_trainable_parameters_is_refused():
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
def test_bad_segments_are_refused(segments: Tensor, message: str):
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.compute_gramian(losses_of(model), segments)


def test_segments_of_another_batch_are_refused():
    model = mlp()
    engine = Engine(model)
    with pytest.raises(ValueError, match="5 instances"):
        engine.compute_gramian(losses_of(model), torch.tensor([0, 1, 2, 0, 1]))


def test_segments_without_instance_dimension_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match="need a batch_dim"):
        Engine(model, batch_dim=None).compute_gramian(losses_of(model), torch.tensor([0, 1, 2]))


def test_accumulate_before_gramian_is_refused():
    with pytest.raises(ValueError, match="compute_gramian"):
        Engine(mlp()).accumulate_grad(torch.ones(B))


@pytest.mark.parametrize("weights", [torch.ones(B + 1), torch.ones(B, 1), torch.ones(())])
def test_weights_of_a_wrong_shape_are_refused(weights: Tensor):
    model = mlp()
    engine = Engine(model)
    engine.compute_gramian(losses_of(model))
    with pytest.raises(ValueError, match=r"weights have shape.*\[3\]"):
        engine.accumulate_grad(weights)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_accumulate_after_the_parameters_changed_is_refused(keep_rows: bool):
    model = mlp()
    engine = Engine(model, keep_rows=keep_rows)
    engine.compute_gramian(losses_of(model))
    perturb(list(trainable(model))[2:])
    with pytest.raises(ValueError, match=r"4 parameter\(s\) have changed.*2\.weight"):
        engine.accumulate_grad(torch.ones(B))


def test_an_error_leaves_nothing_behind():
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


def test_a_nonfinite_gradient_is_not_called_wrong():
    """Losses are finite, but a row isn't: the caller sees this in the Gramian."""
    model = mlp()
    engine = Engine(model)
    one, two, three = model(batch(B, 4)).square().sum(1)
    gramian = engine.compute_gramian(torch.stack([one, (two - two.detach()).sqrt(), three]))
    finite = gramian.diagonal().isfinite()
    assert finite.tolist() == [True, False, True]


def test_a_paused_engine_records_nothing_and_resumes():
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
