"""How the rows of a module are formed in a backward: in closed form, or by calling the module again.

Each `Method` takes what a tap has met and returns rows by name; `next` is what to try where it does not fit. A closed
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

from hf_jd.gramian.again import RepeatedCall
from hf_jd.gramian.layouts import Batch, DrawsError, Layout, UnmappedError, UnsupportedError, shared_features
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.rules import Rule, outer
from hf_jd.gramian.taps import TapEvent

# What no other method mends: memory, a layer that has no rows, and rows that can't be had from the module at all.
FINAL = (torch.OutOfMemoryError, UnsupportedError, UnmappedError, DrawsError)


class Tier(IntEnum):
    """By which way a parameter's rows came."""

    UNUSED = 0
    CLOSED = 1
    MODULE = 2
    OBJECTIVE = 3


class Method(ABC):
    """A way to form the rows of one module.

    Attributes:
        tier: Of the rows.
        next: The method to try where this one raises `mistakes`, or is proved wrong in each layout; None: tier 3.
        mistakes: The exceptions that mean that it does not fit.
    """

    tier = Tier.MODULE
    next: "Method | None" = None
    # A module may raise anything where it is called again with some of its instances, or traced by vmap.
    mistakes: tuple[type[Exception], ...] = (Exception,)

    @abstractmethod
    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        """The rows of the event's targets, by name; those that are left out come by `VECTORISED`.

        Args:
            event: What a tap met.
            layout: How its tensors hold the batch.
            batch: The instances and whose they are.
        """


class ClosedForm(Method):
    """Rows by a rule.

    Args:
        rule: The closed form.
        is_trusted: Whether it is a user's own: then its errors are the user's to see.
    """

    tier = Tier.CLOSED

    def __init__(self, rule: Rule, is_trusted: bool = False):
        self.rule = rule
        self.next = LINEAR_MAPS
        self.mistakes = () if is_trusted else (Exception,)

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        assert event.first is not None
        (g, *xs), segments = layout.arrange(batch, event.first, *(event.inputs or ()))
        found = self.rule(event.tap.module, xs[0] if len(xs) == 1 else xs, g, segments)
        for name, rows in found.items():
            if name in event.targets and not rows.fits(event.targets[name], segments.objectives):
                raise ValueError(
                    f"the rule of {type(event.tap.module).__name__} gives {name} {rows.objectives} rows of shape "
                    f"{list(rows.shape)}; needed are {segments.objectives} of {list(event.targets[name].shape)}."
                )
        return found


class Repeating(Method):
    """Rows by calling the module again: the vector-Jacobian product of its own forward, objective by objective.

    Args:
        vectorised: One `vmap` over instances, where each has a row; else a loop over objectives.
        following: The next method.
    """

    def __init__(self, vectorised: bool, following: Method | None):
        self._vectorised, self.next = vectorised, following

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        axis, tensors = layout.axis, list(event.inputs or ())
        given = [g for g in event.grad_outputs if g is not None]
        _, segments = layout.arrange(batch, given[0])
        batched = [t.dim() > axis and t.shape[axis] == given[0].shape[axis] for t in tensors]

        def one(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
            # Inside vmap each instance is a batch of one.
            inputs = [t.unsqueeze(axis) if b else t for t, b in zip(inputs, batched, strict=True)]
            return repeated.traced_row(inputs, [g.unsqueeze(axis) for g in gradients])

        def some(members: Tensor) -> dict[str, Tensor]:
            index = members.to(given[0].device)
            inputs = [t.index_select(axis, index) if b else t for t, b in zip(tensors, batched, strict=True)]
            return repeated.row(inputs, *([t.index_select(axis, index) for t in part] for part in (given, whole)))

        with RepeatedCall.of(event) as repeated, warnings.catch_warnings():
            # vmap loops inside where an operation has no batching rule, and says so: still one call of the module.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            # With the random numbers of the forward, a part of the batch must return its part of what the whole does.
            whole = repeated.outputs({}, tensors) if repeated.is_replayed else []
            if self._vectorised and not repeated.is_replayed and segments.ids is None and segments.block == 1:
                in_dims = ([axis if b else None for b in batched], [axis] * len(given))
                found = vmap(one, in_dims=in_dims)(tensors, given)
            else:
                each = [some(members) for members in segments.members()]
                found = {name: torch.stack([row[name] for row in each]) for name in event.targets}
        shaped = {name: (rows, event.targets[name]) for name, rows in found.items()}
        return {n: DenseRows(r.reshape(len(r), -1).to(p.dtype), p.shape) for n, (r, p) in shaped.items()}


class LinearMaps(Method):
    """Rows of modules that read weights as F.linear(x, W) themselves (routers): one more forward for all."""

    def rows(self, event: TapEvent, layout: Layout, batch: Batch) -> dict[str, Rows]:
        """Raises RuntimeError where a target is used in another way than in one such call."""
        targets, axis = event.targets, layout.axis
        with RepeatedCall.of(event) as repeated, torch.enable_grad(), _LinearCalls(list(targets.values())) as maps:
            outputs = repeated.all_outputs(list(event.inputs or ()))
        used = [weight for weight, _, _ in maps.met]
        if len(used) != len(targets) or {id(w) for w in used} != {id(p) for p in targets.values()}:
            raise RuntimeError("a parameter is not used as the weight of one linear map")
        pairs = [(o, g) for o, g in zip(outputs, event.grad_outputs, strict=True) if g is not None]
        _, segments = layout.arrange(batch, pairs[0][1])
        gradients = torch.autograd.grad([o for o, _ in pairs], [y for _, _, y in maps.met], [g for _, g in pairs])
        rows = {}
        for (weight, x, _), g in zip(maps.met, gradients, strict=True):
            x, g = shared_features(x.movedim(axis, 0)), shared_features(g.movedim(axis, 0))
            rows[id(weight)] = outer(g, x, segments, weight.shape)
        return {name: rows[id(parameter)] for name, parameter in targets.items()}


class _LinearCalls(TorchFunctionMode):
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


LOOPED = Repeating(vectorised=False, following=None)
VECTORISED = Repeating(vectorised=True, following=LOOPED)
LINEAR_MAPS = LinearMaps()
LINEAR_MAPS.next = VECTORISED
