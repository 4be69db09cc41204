"""Tiers 2 and 3: rows of what no closed form covers."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from hf_jd.gramian.graph import Differentiator
from hf_jd.gramian.layouts import Segments
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.taps import Call


def module_rows(
    module: nn.Module,
    targets: Mapping[str, nn.Parameter],
    call: Call,
    tensors: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    segments: Segments,
    vectorised: bool,
) -> dict[str, Rows]:
    """Tier 2: the vector-Jacobian product of one module's own forward, repeated objective by objective.

    Args:
        module: The module, called again with the inputs of its call.
        targets: The parameters below it whose rows are wanted, by name.
        call: How it was called.
        tensors: The tensors it was called with; those that share the N leading rows of the output gradients are split.
        grad_outputs: Gradients of its outputs, batch first.
        segments: Whose each leading row is; not by token.
        vectorised: One `vmap` over instances, where each has a row; else a loop over objectives.
    """
    lead = next(len(g) for g in grad_outputs if g is not None)
    batched = [t.dim() > 0 and len(t) == lead for t in tensors]

    def outputs(parameters: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = call.arguments(inputs)
        result = call.float_outputs(functional_call(module, parameters, args, kwargs))
        return tuple(o for o, g in zip(result, grad_outputs, strict=True) if g is not None)

    def row(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        product = vjp(lambda parameters: outputs(parameters, inputs), {n: p.detach() for n, p in targets.items()})[1]
        return product(tuple(gradients))[0]

    given = [g for g in grad_outputs if g is not None]
    with call.context(), warnings.catch_warnings():
        # vmap loops inside where an operation has no batching rule, and says so: still one call of the module.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if vectorised and segments.ids is None and segments.block == 1:
            # Inside vmap each instance is a batch of one.
            one = vmap(
                lambda inputs, gradients: row(
                    [t[None] if b else t for t, b in zip(inputs, batched, strict=True)], [g[None] for g in gradients]
                ),
                in_dims=([0 if b else None for b in batched], [0] * len(given)),
            )
            rows = one(list(tensors), given)
        else:
            each = [
                row([t[i] if b else t for t, b in zip(tensors, batched, strict=True)], [g[i] for g in given])
                for i in segments.members()
            ]
            rows = {name: torch.stack([r[name] for r in each]) for name in targets}
    return {name: DenseRows(r.flatten(1).to(targets[name].dtype), targets[name].shape) for name, r in rows.items()}


def individual_rows(
    differentiator: Differentiator, losses: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Rows | None]:
    """Tier 3: one differentiation an objective, for these parameters only; always right, and slow.

    Args:
        differentiator: Of the step's graph.
        losses: [R].
        parameters: The parameters; those that no objective depends on get None.
    """
    gradients = [differentiator.gradients(loss, parameters) for loss in losses]
    rows: dict[nn.Parameter, Rows | None] = {}
    for parameter, column in zip(parameters, zip(*gradients, strict=True), strict=True):
        rows[parameter] = None
        if any(g is not None for g in column):
            dense = [torch.zeros_like(parameter) if g is None else g.to_dense() if g.is_sparse else g for g in column]
            rows[parameter] = DenseRows(torch.stack(dense).flatten(1), parameter.shape)
    return rows
