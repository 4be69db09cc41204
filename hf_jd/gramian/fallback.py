"""Tiers 2 and 3: rows of what no closed form covers."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_jd.gramian.again import call_again, without_traces
from hf_jd.gramian.graph import Differentiator
from hf_jd.gramian.layouts import Segments, UnmappedError, shared_features
from hf_jd.gramian.random_streams import unchanged_streams
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
    given = [g for g in grad_outputs if g is not None]
    batched = [t.dim() > axis and t.shape[axis] == given[0].shape[axis] for t in tensors]
    device, replayed = given[0].device, call.random_state is not None

    def one(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        # Inside vmap each instance is a batch of one.
        inputs = [t.unsqueeze(axis) if b else t for t, b in zip(inputs, batched, strict=True)]
        return repeated.traced_row(inputs, [g.unsqueeze(axis) for g in gradients])

    def some(members: Tensor) -> dict[str, Tensor]:
        index = members.to(device)
        inputs = [t.index_select(axis, index) if b else t for t, b in zip(tensors, batched, strict=True)]
        return repeated.row(inputs, *([t.index_select(axis, index) for t in part] for part in (given, whole)))

    with call.context(), warnings.catch_warnings(), without_traces(module, device, replayed) as buffers:
        repeated = _Repeated(module, targets, call, [g is not None for g in grad_outputs], buffers)
        # vmap loops inside where an operation has no batching rule, and says so: still one call of the module.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # With the random numbers of the forward, a part of the batch must return its part of what the whole returns.
        whole = repeated.outputs({}, tensors) if replayed else []
        if vectorised and not replayed and segments.ids is None and segments.block == 1:
            in_dims = ([axis if b else None for b in batched], [axis] * len(given))
            rows = vmap(one, in_dims=in_dims)(list(tensors), given)
        else:
            each = [some(members) for members in segments.members()]
            rows = {name: torch.stack([row[name] for row in each]) for name in targets}
    return {n: DenseRows(r.reshape(len(r), -1).to(targets[n].dtype), targets[n].shape) for n, r in rows.items()}


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
    device = grad_output.device
    with unchanged_streams(device), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        wanted = [copies[name].requires_grad_() for name in targets]
        args, kwargs = call.arguments([single(t) for t in inputs])
        output = call.float_outputs(call_again(module, copies, args, kwargs))[0]
        gradients = torch.autograd.grad(output, wanted, grad_output.to(output.dtype))
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(targets, gradients, strict=True)}


class _Repeated:
    """A module that is called again to differentiate it.

    Args:
        module: The module.
        targets: The parameters of interest, by name below it.
        call: How it was called.
        used: Which of its outputs have a gradient.
        buffers: Those to call it with.
    """

    def __init__(
        self,
        module: nn.Module,
        targets: Mapping[str, nn.Parameter],
        call: Call,
        used: Sequence[bool],
        buffers: Mapping[str, Tensor],
    ):
        self._module, self._call, self._used, self._buffers = module, call, used, buffers
        self._device = next(iter(targets.values())).device
        self._parameters = {name: p.detach() for name, p in targets.items()}

    def traced_row(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """The vector-Jacobian product for output gradients, by parameter; inside `vmap`."""
        return vjp(lambda parameters: self.outputs(parameters, inputs), self._parameters)[1](tuple(gradients))[0]

    def row(self, inputs: list[Tensor], gradients: list[Tensor], expected: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same by plain autograd, which knows any custom function; UnmappedError if not for `expected` outputs."""
        with torch.enable_grad():
            parameters = {name: p.clone().requires_grad_() for name, p in self._parameters.items()}
            outputs = self.outputs(parameters, inputs)
        if not all(_alike(output, wanted) for output, wanted in zip(outputs, expected, strict=False)):
            raise UnmappedError
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

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of interest, with `parameters` in the place of the module's own."""
        args, kwargs = self._call.arguments(list(inputs))
        self._call.replay(self._device)
        result = call_again(self._module, {**parameters, **self._buffers}, args, kwargs)
        return tuple(o for o, used in zip(self._call.float_outputs(result), self._used, strict=True) if used)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are those of the same random numbers, which differ by far more than rounding otherwise."""
    return bool((a - b).norm() <= math.sqrt(torch.finfo(b.dtype).eps) * b.norm())


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
    (args, kwargs), maps = call.arguments(list(tensors)), _LinearMaps(list(targets.values()))
    device = next(g.device for g in grad_outputs if g is not None)
    replayed = call.random_state is not None
    with without_traces(module, device, replayed) as buffers, call.context(), torch.enable_grad(), maps:
        call.replay(device)
        outputs = call.float_outputs(call_again(module, buffers, args, kwargs))
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
