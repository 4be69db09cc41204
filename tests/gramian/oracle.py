"""Brute force: one backward per objective, and a comparison of an engine with it, parameter by parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hf_jd.gramian import Engine, Jacobian

EXACT, SINGLE = 1e-8, 3e-6  # relative; the second if a layer itself computes in float32
TIER_3 = ".*Freeze them if they matter little.*"

Rows = dict[nn.Parameter, Tensor | None]


def brute_rows(losses: Tensor, parameters: Sequence[nn.Parameter]) -> Rows:
    """Compute d loss / d parameter, with one plain backward per objective; restore `.grad`.

    Args:
        losses: Of any shape; rows follow `losses.flatten()`.
        parameters: The parameters; one that no loss depends on gets None.
    """
    saved = {p: p.grad for p in parameters}
    collected: dict[nn.Parameter, list[Tensor | None]] = {p: [] for p in parameters}
    for loss in losses.flatten():
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        for p in parameters:
            gradient = None if p.grad is None else p.grad.detach().clone()
            collected[p].append(gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient)
    for p, gradient in saved.items():
        p.grad = gradient
    rows: Rows = {}
    for p, column in collected.items():
        rows[p] = None
        if any(g is not None for g in column):
            dense = [torch.zeros_like(p) if g is None else g for g in column]
            rows[p] = torch.stack(dense).reshape(len(column), -1)
    return rows


def brute_gramian(rows: Rows, shape: Sequence[int]) -> Tensor:
    """Compute the generalised Gramian, shape + reversed(shape), of rows in the order of `losses.flatten()`."""
    total = sum(r.double() @ r.double().T for r in rows.values() if r is not None)
    n = len(shape)
    return total.view([*shape, *shape]).permute([*range(n), *reversed(range(n, 2 * n))])


def brute_update(rows: Rows, weights: Tensor) -> Rows:
    """Compute J^T w by parameter, shaped like it."""
    flat = weights.flatten()
    return {p: None if r is None else (flat.to(r) @ r).view(p.shape) for p, r in rows.items()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Compute the norm of the difference, relative to the larger norm."""
    ours, theirs = ours.double(), theirs.double()
    scale = max(float(ours.norm()), float(theirs.norm()))
    return float((ours - theirs).norm()) / scale if scale else 0.0


def wrong_parameters(
    names: dict[nn.Parameter, str], ours: Rows, theirs: Rows, tolerance: float, scale: Rows | None = None
) -> list[str]:
    """Return one line per wrong parameter: its name, shape and error.

    Errors are relative to the parameter's own rows (`scale`: also if they cancel in an update), or, if those are
    rounding noise (the bias of a key, which softmax cancels), to 1e-5 of the largest parameter's rows.
    """
    scale = theirs if scale is None else scale
    largest = max((float(t.norm()) for t in scale.values() if t is not None), default=0.0)
    errors = []
    for p, name in names.items():
        mine, other = ours.get(p), theirs.get(p)
        if mine is None and other is None:
            continue
        mine = torch.zeros_like(other) if mine is None else mine.to_dense()
        other = torch.zeros_like(mine) if other is None else other
        error = float((mine.double() - other.double()).norm())
        own = float(other.norm()) if scale.get(p) is None else float(scale[p].norm())
        if not error <= tolerance * max(own, 1e-5 * largest):
            errors.append(f"{name} {list(p.shape)}: error {error:.1e} of {float(other.norm()):.1e}")
    return errors


class SinglePrecision(TorchFunctionMode):
    """Detects whether a forward computes in less than float64 on the way to its outputs."""

    def __init__(self):
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.seen:
            leaves = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point():
                    self.seen = self.seen or leaf.dtype != torch.float64
        return result


def trainable(*modules: nn.Module) -> dict[nn.Parameter, str]:
    """Return the trainable parameters and their names."""
    names: dict[nn.Parameter, str] = {}
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad:
                names.setdefault(p, name)
    return names


def perturb(parameters: Iterable[nn.Parameter], size: float = 0.05) -> None:
    """Change every parameter, including zeros, like an optimizer's step."""
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn_like(p))


def jacobian_rows(jacobian: Jacobian, losses: Tensor, batch_dim: int | None = 0) -> Rows:
    """Return the engine's rows, in the order of `losses.flatten()`."""
    used = set(jacobian.used)
    rows: Rows = {p: jacobian.rows(p) if p in used else None for p in jacobian.parameters}
    if batch_dim == 0 and losses.dim() > 1:
        order = torch.arange(losses.numel()).view(losses[0].numel(), len(losses)).T.flatten()
        rows = {p: None if r is None else r[order] for p, r in rows.items()}
    return rows


def check_step(
    engine: Engine,
    names: dict[nn.Parameter, str],
    losses: Tensor,
    segments: Tensor | None = None,
    tolerance: float = EXACT,
    keep_rows: Sequence[bool | str | int] = (True, False),
    expected: Rows | None = None,
) -> list[str]:
    """Return what is wrong in one step of an engine, one line each: rows, Gramian and update, in each mode.

    Args:
        engine: The engine.
        names: The parameters that count.
        losses: The losses, with a graph, which may be freed.
        segments: For the engine.
        tolerance: Relative.
        keep_rows: The modes to go through.
        expected: The expected rows; by default, brute force on the same graph.
    """
    expected = brute_rows(losses, list(names)) if expected is None else expected
    errors = []
    jacobian = engine.compute_jacobian(losses, segments)
    errors += [f"rows: {w}" for w in wrong_parameters(names, jacobian_rows(jacobian, losses), expected, tolerance)]
    factors = engine.compute_jacobian(losses, segments, materialise=False)
    errors += [f"factors: {w}" for w in wrong_parameters(names, jacobian_rows(factors, losses), expected, tolerance)]
    gramian = brute_gramian(expected, losses.shape)
    flat = factors.gramian()
    if relative(flat, jacobian.gramian()) > tolerance:
        errors.append(f"Gramian of factors: error {relative(flat, jacobian.gramian()):.1e}")
    configured = engine.keep_rows
    for mode in keep_rows:
        engine.keep_rows = mode
        weights = torch.rand(losses.shape, dtype=torch.float64) + 0.5
        ours = engine.compute_gramian(losses, segments)
        if ours.shape != gramian.shape:
            errors.append(f"keep_rows={mode}: Gramian of shape {list(ours.shape)}, not {list(gramian.shape)}")
        elif not relative(ours, gramian) <= tolerance:
            errors.append(f"keep_rows={mode}: Gramian's error {relative(ours, gramian):.1e}")
        for i, p in enumerate(names):  # Some parameters already have a gradient.
            p.grad = torch.ones_like(p) if i % 2 else None
        engine.accumulate_grad(weights.to(losses))
        update = brute_update(expected, weights.to(losses))
        mine: Rows = {p: p.grad if not i % 2 else p.grad - 1 for i, p in enumerate(names)}
        update = {p: torch.zeros_like(p) if u is None and i % 2 else u for i, (p, u) in enumerate(update.items())}
        errors += [f"keep_rows={mode}: update: {w}" for w in wrong_parameters(names, mine, update, tolerance, expected)]
        for p in names:
            p.grad = None
    engine.keep_rows = configured
    freed = engine.compute_jacobian(losses, segments, retain_graph=False)
    errors += [f"graph freed: {w}" for w in wrong_parameters(names, jacobian_rows(freed, losses), expected, tolerance)]
    return errors


def assert_engine_right(
    modules: nn.Module | Sequence[nn.Module],
    losses_fn: Callable[[int], Tensor],
    *,
    steps: int = 2,
    segments: Callable[[int], Tensor] | None = None,
    tolerance: float | None = None,
    engine: Engine | None = None,
    keep_rows: Sequence[bool | str | int] = (True, False),
    own_graph: bool = True,
    vacuous: bool = False,
    **options: Any,
) -> dict[str, int]:
    """Run an engine for some steps and compare all its results with brute force.

    Args:
        modules: The engine's modules.
        losses_fn: Computes the losses of a step, from a new forward. Called once before the engine exists, for the rows
            of the first step, after the same seed.
        steps: The number of steps; parameters change between them.
        segments: The segments of each step.
        tolerance: The relative tolerance; None: from the dtypes that the forward computes in.
        engine: An existing engine.
        keep_rows: The modes to go through.
        vacuous: Whether a step may have no gradient at all.
        own_graph: Whether the rows of the first step are also taken from a forward without the engine's hooks.
        options: Further arguments of `Engine`.

    Returns:
        The tiers of the last step.
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    names = trainable(*modules)
    untouched = None
    if own_graph and engine is None:
        torch.manual_seed(0)
        with SinglePrecision() as precision:
            losses = losses_fn(0)
        if tolerance is None:
            tolerance = SINGLE if precision.seen else EXACT
        untouched = brute_rows(losses, list(names))
        assert all(bool(r.isfinite().all()) for r in untouched.values() if r is not None), "the model's own gradient"
    tolerance = EXACT if tolerance is None else tolerance
    engine = Engine(*modules, **options) if engine is None else engine
    errors = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIER_3)
        for step in range(steps):
            torch.manual_seed(step)
            losses = losses_fn(step)
            ids = segments(step) if segments is not None else None
            expected = brute_rows(losses, list(names))
            if step == 0 and untouched is not None:
                with_hooks = wrong_parameters(names, expected, untouched, tolerance)
                errors += [f"step 0: hooks change the gradient: {w}" for w in with_hooks]
            proves = vacuous or any(bool(r.any()) for r in expected.values() if r is not None)
            assert proves, f"step {step}: all gradients are zero, so the case proves nothing"
            wrong = check_step(engine, names, losses, ids, tolerance, keep_rows, expected)
            errors += [f"step {step}: {w}" for w in wrong]
            perturb(names)
    tiers = engine.tiers()
    assert not errors, f"{len(errors)} wrong (tiers: {tiers_line(tiers)}):\n" + "\n".join(errors[:60])
    return tiers


def tiers_line(tiers: dict[str, int]) -> str:
    """Say how many parameters each tier covers, and name those beyond the first tier."""
    counts = {tier: sum(1 for t in tiers.values() if t == tier) for tier in sorted(set(tiers.values()))}
    beyond = [f"{name}:{tier}" for name, tier in tiers.items() if tier > 1]
    return f"{counts} {' '.join(beyond[:12])}"


def closed_share(modules: nn.Module, tiers: dict[str, int]) -> float:
    """Compute the share of trainable elements, among those that losses depend on, whose rows have closed forms."""
    elements = {name: p.numel() for p, name in trainable(modules).items() if tiers[name]}
    closed = sum(n for name, n in elements.items() if tiers[name] == 1)
    return closed / sum(elements.values())
