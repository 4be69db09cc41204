"""Tiers 2 and 3: rows of what no closed form covers."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_jd.gramian.again import call_again, check_buffers, copied_buffers
from hf_jd.gramian.graph import Differentiator
from hf_jd.gramian.layouts import Segments, shared_features
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.rules import outer
from hf_jd.gramian.taps import Call


def module_rows(
    module: nn.Module,
    targets: Mapping[str, nn.Parameter],
    call: Call,
    tensors: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    segments: Segments,
    axis: int,
    vectorised: bool,
) -> dict[str, Rows]:
    """Tier 2: the vector-Jacobian product of one module's own forward, repeated objective by objective.

    Args:
        module: The module, called again with the inputs of its call.
        targets: The parameters below it whose rows are wanted, by name.
        call: How it was called.
        tensors: The tensors it was called with; those that share the N rows of the output gradients are split.
        grad_outputs: Gradients of its outputs.
        segments: Whose each of the N rows is; not by token.
        axis: The dimension that holds the N rows.
        vectorised: One `vmap` over instances, where each has a row; else a loop over objectives.
    """
    lead = next(g.shape[axis] for g in grad_outputs if g is not None)
    batched = [t.dim() > axis and t.shape[axis] == lead for t in tensors]
    given = [g for g in grad_outputs if g is not None]
    again = _Repeated(module, targets, call, [g is not None for g in grad_outputs])

    def one(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        # Inside vmap each instance is a batch of one.
        inputs = [t.unsqueeze(axis) if b else t for t, b in zip(inputs, batched, strict=True)]
        return again.traced_row(inputs, [g.unsqueeze(axis) for g in gradients])

    def some(members: Tensor) -> dict[str, Tensor]:
        index = members.to(given[0].device)
        inputs = [t.index_select(axis, index) if b else t for t, b in zip(tensors, batched, strict=True)]
        return again.row(inputs, [g.index_select(axis, index) for g in given])

    with call.context(), warnings.catch_warnings():
        # vmap loops inside where an operation has no batching rule, and says so: still one call of the module.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if vectorised and segments.ids is None and segments.block == 1:
            in_dims = ([axis if b else None for b in batched], [axis] * len(given))
            rows = vmap(one, in_dims=in_dims)(list(tensors), given)
        else:
            each = [some(members) for members in segments.members()]
            rows = {name: torch.stack([row[name] for row in each]) for name in targets}
    check_buffers(module, again.buffers)
    return {
        name: DenseRows(r.reshape(len(r), -1).to(targets[name].dtype), targets[name].shape) for name, r in rows.items()
    }


def single_precision_gradients(
    module: nn.Module,
    targets: Mapping[str, nn.Parameter],
    call: Call,
    inputs: Sequence[Tensor],
    grad_output: Tensor,
) -> dict[str, Tensor]:
    """The vector-Jacobian product of a copy of a module in float32, by parameter; its first output counts.

    Args:
        module: The module.
        targets: The parameters of interest, by name below it.
        call: How it was called.
        inputs: The tensors to call it with.
        grad_output: Gradient of its output.
    """

    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().float() if tensor.is_floating_point() else tensor

    copies = {name: single(t).clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    with torch.enable_grad(), torch.autocast(grad_output.device.type, enabled=False):
        wanted = [copies[name].requires_grad_() for name in targets]
        args, kwargs = call.arguments([single(t) for t in inputs])
        output = call.float_outputs(call_again(module, copies, args, kwargs))[0]
        gradients = torch.autograd.grad(output, wanted, grad_output.to(output.dtype))
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(targets, gradients, strict=True)}


class _Repeated:
    """A module that is called again, on copies of its buffers, to differentiate it.

    Args:
        module: The module.
        targets: The parameters of interest, by name below it.
        call: How it was called.
        used: Which of its outputs have a gradient.
    """

    def __init__(self, module: nn.Module, targets: Mapping[str, nn.Parameter], call: Call, used: Sequence[bool]):
        self.buffers = copied_buffers(module)
        self._module, self._call, self._used = module, call, used
        self._parameters = {name: p.detach() for name, p in targets.items()}

    def traced_row(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """The vector-Jacobian product for output gradients, by parameter; inside `vmap`."""
        return vjp(lambda parameters: self._outputs(parameters, inputs), self._parameters)[1](tuple(gradients))[0]

    def row(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """The same by plain autograd, which knows any custom function."""
        with torch.enable_grad():
            parameters = {name: p.clone().requires_grad_() for name, p in self._parameters.items()}
            outputs = self._outputs(parameters, inputs)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and o.numel()]
        if not pairs:
            return {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(parameters.values()),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        return {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, found, strict=True)}

    def _outputs(self, parameters: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = self._call.arguments(inputs)
        result = call_again(self._module, {**parameters, **self.buffers}, args, kwargs)
        return tuple(o for o, used in zip(self._call.float_outputs(result), self._used, strict=True) if used)


class _LinearMaps(TorchFunctionMode):
    """While a module runs, cuts the graph at each F.linear by one of its weights, and keeps (weight, input, output)."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        super().__init__()
        self.met: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2 and any(args[1] is weight for weight in self._weights):
            rest = [None if t is None else t.detach() for t in args[2:]]
            output = func(args[0].detach(), args[1].detach(), *rest, **(kwargs or {})).requires_grad_()
            self.met.append((args[1], args[0].detach(), output))
            return output
        return func(*args, **(kwargs or {}))


def linear_rows(
    module: nn.Module,
    targets: Mapping[str, nn.Parameter],
    call: Call,
    tensors: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    segments: Segments,
    axis: int,
) -> dict[str, Rows]:
    """Tier 2 for modules that read weights as F.linear(x, W) themselves (routers): one more forward for all.

    Args:
        module: The module.
        targets: The weights [p, d] below it whose rows are wanted; each must be met in exactly one such call.
        call: How it was called.
        tensors: The tensors it was called with.
        grad_outputs: Gradients of its outputs.
        segments: Whose each of the N rows is.
        axis: The dimension that holds the N rows.

    Raises:
        RuntimeError: A target that is used in another way; the caller passes on.
    """
    with call.context(), torch.enable_grad(), _LinearMaps(list(targets.values())) as maps:
        args, kwargs = call.arguments(list(tensors))
        buffers = copied_buffers(module)
        outputs = call.float_outputs(call_again(module, buffers, args, kwargs))
    check_buffers(module, buffers)
    used = [weight for weight, _, _ in maps.met]
    if len(used) != len(targets) or {id(w) for w in used} != {id(p) for p in targets.values()}:
        raise RuntimeError("a parameter is not used as the weight of one linear map")
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
    gradients = torch.autograd.grad([o for o, _ in pairs], [y for _, _, y in maps.met], [g for _, g in pairs])
    rows = {
        id(weight): outer(
            shared_features(g.movedim(axis, 0)), shared_features(x.movedim(axis, 0)), segments, weight.shape
        )
        for (weight, x, _), g in zip(maps.met, gradients, strict=True)
    }
    return {name: rows[id(parameter)] for name, parameter in targets.items()}


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
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            dense = [zeros if g is None else g.to_dense() if g.is_sparse else g for g in column]
            rows[parameter] = DenseRows(torch.stack(dense).reshape(len(losses), -1), parameter.shape)
    return rows
