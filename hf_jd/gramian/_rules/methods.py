"""Form the rows of a module in a backward: in closed form, or by calling the module again.

Each `Method` takes a tap's event and returns rows by name; `next` is the method to try if it does not fit. A closed
form is tier 1; calling the module again, through its linear maps, by `vmap` or in a loop over objectives, is tier 2.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_jd.gramian._rules.rule import Rule, outer
from hf_jd.gramian.functional_call import RepeatedCall
from hf_jd.gramian.layouts import Batch, DrawsError, Layout, UnmappedError, UnsupportedError, shared_features
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.taps import TapEvent

# Errors that no other method avoids: out of memory, a layer without rows, and rows that the module can't give.
FINAL = (torch.OutOfMemoryError, UnsupportedError, UnmappedError, DrawsError)


class Tier(IntEnum):
    """How a parameter's rows were formed."""

    UNUSED = 0
    CLOSED = 1
    MODULE = 2
    OBJECTIVE = 3


class Method(ABC):
    """A way to form the rows of one module.

    Attributes:
        tier: The rows' tier.
        next: The method to try if this one raises `mistakes`, or is proved wrong in each layout; None: tier 3.
        mistakes: The exceptions which mean that it does not fit.
    """

    tier = Tier.MODULE
    next: "Method | None" = None
    # A module may raise anything when it is called with some of its instances, or traced by vmap.
    mistakes: tuple[type[Exception], ...] = (Exception,)

    @abstractmethod
    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        """Form the rows of the event's targets, by name; `VECTORISED` forms those that it leaves out.

        Args:
            event: From the module's tap.
            layout: How its tensors hold the batch.
            batch: The instances and their objectives.
        """


class ClosedForm(Method):
    """Rows from a rule.

    Args:
        rule: The closed form.
        is_trusted: Whether it is the user's rule, whose errors the user has to see.
    """

    tier = Tier.CLOSED

    def __init__(self, rule: Rule, is_trusted: bool = False):
        self.rule = rule
        self.next = LINEAR_MAPS
        self.mistakes = () if is_trusted else (Exception,)

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        assert event.first is not None
        (g, *xs), segments = layout.arrange(batch, event.first, *(event.inputs or ()))
        by_name = self.rule(event.tap.module, xs[0] if len(xs) == 1 else xs, g, segments)
        for name, rows in by_name.items():
            if name in event.targets and not rows.fits(event.targets[name], segments.objectives):
                raise ValueError(
                    f"the rule of {type(event.tap.module).__name__} gives {name} {rows.objectives} rows of shape "
                    f"{list(rows.shape)}; it has to give {segments.objectives} of {list(event.targets[name].shape)}."
                )
        return by_name


class Repeating(Method):
    """Rows from calling the module again: the vector-Jacobian products of its forward.

    Args:
        vectorised: Whether to use one `vmap` over instances, if each is an objective, or a loop over objectives.
        following: The next method.
    """

    def __init__(self, vectorised: bool, following: Method | None):
        self._vectorised, self.next = vectorised, following

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        axis, tensors = layout.axis, list(event.inputs or ())
        grads = [g for g in event.grad_outputs if g is not None]
        _, segments = layout.arrange(batch, grads[0])
        batched = [t.dim() > axis and t.shape[axis] == grads[0].shape[axis] for t in tensors]

        def one(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
            # Inside vmap each instance is a batch of one.
            inputs = [t.unsqueeze(axis) if b else t for t, b in zip(inputs, batched, strict=True)]
            return repeated.traced_row(inputs, [g.unsqueeze(axis) for g in gradients])

        def some(members: Tensor) -> dict[str, Tensor]:
            index = members.to(grads[0].device)
            inputs = [t.index_select(axis, index) if b else t for t, b in zip(tensors, batched, strict=True)]
            return repeated.row(inputs, *([t.index_select(axis, index) for t in part] for part in (grads, whole)))

        with RepeatedCall.of(event) as repeated, warnings.catch_warnings():
            # Without a batching rule for an operation, vmap loops over it and warns; the module is still called once.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            # With the forward's random numbers, part of the batch has to return its part of the whole batch's outputs.
            whole = repeated.outputs({}, tensors) if repeated.is_replayed else []
            if self._vectorised and not repeated.is_replayed and segments.ids is None and segments.block == 1:
                in_dims = ([axis if b else None for b in batched], [axis] * len(grads))
                by_name = vmap(one, in_dims=in_dims)(tensors, grads)
            else:
                each = [some(members) for members in segments.members()]
                by_name = {name: torch.stack([row[name] for row in each]) for name in event.targets}
        shaped = {name: (rows, event.targets[name]) for name, rows in by_name.items()}
        return {n: DenseRows(r.reshape(len(r), -1).to(p.dtype), p.shape) for n, (r, p) in shaped.items()}


class LinearMaps(Method):
    """Rows of modules that call F.linear(x, W) themselves (routers): one extra forward for all objectives."""

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        """Raise RuntimeError if a target is not used in exactly one such call."""
        targets, axis = event.targets, layout.axis
        with RepeatedCall.of(event) as repeated, torch.enable_grad(), _LinearCalls(list(targets.values())) as maps:
            outputs = repeated.all_outputs(list(event.inputs or ()))
        used = [weight for weight, _, _ in maps.calls]
        if len(used) != len(targets) or {id(w) for w in used} != {id(p) for p in targets.values()}:
            raise RuntimeError("a parameter is not used as the weight of one linear map")
        pairs = [(o, g) for o, g in zip(outputs, event.grad_outputs, strict=True) if g is not None]
        _, segments = layout.arrange(batch, pairs[0][1])
        gradients = torch.autograd.grad([o for o, _ in pairs], [y for _, _, y in maps.calls], [g for _, g in pairs])
        rows = {}
        for (weight, x, _), g in zip(maps.calls, gradients, strict=True):
            x, g = shared_features(x.movedim(axis, 0)), shared_features(g.movedim(axis, 0))
            rows[id(weight)] = outer(g, x, segments, weight.shape)
        return {name: rows[id(parameter)] for name, parameter in targets.items()}


class _LinearCalls(TorchFunctionMode):
    """A mode that cuts the graph at each F.linear with one of the weights, and stores (weight, input, output)."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        super().__init__()
        self.calls: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2 and any(args[1] is weight for weight in self._weights):
            rest = [None if t is None else t.detach() for t in args[2:]]
            output = func(args[0].detach(), args[1].detach(), *rest, **(kwargs or {})).requires_grad_()
            self.calls.append((args[1], args[0].detach(), output))
            return output
        return func(*args, **(kwargs or {}))


LOOPED = Repeating(vectorised=False, following=None)
VECTORISED = Repeating(vectorised=True, following=LOOPED)
LINEAR_MAPS = LinearMaps()
LINEAR_MAPS.next = VECTORISED
