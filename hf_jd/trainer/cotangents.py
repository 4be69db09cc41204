"""Any scalar loss, split by instance through its cotangents at the model's outputs.

A loss L is a function of what the model returned, z (logits, log-probabilities, embeddings). Its cotangent c = dL/dz is
cheap: autograd walks only the loss's own part of the graph. Instances are independent inside the model, so the part of
the gradient that comes through instance i is the pullback of c_i, the gradient of the surrogate s_i = <c_i, z_i>. The
parts add up to L's gradient exactly, also where the loss itself mixes instances (contrastive losses, pairs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from hf_jd.gramian.taps import ModuleTap


class Cotangent(NamedTuple):
    """A tensor that the model returned, and the gradient of the loss there.

    Attributes:
        output: z, with a graph.
        gradient: c, the same shape and dtype.
    """

    output: Tensor
    gradient: Tensor


class OutputObserver:
    """Keeps what a model returns with a graph, for the loss that is computed from it.

    Args:
        modules: The model as its callers see it, and those inside that they may call past it (PEFT's base model).
        apart: Whether callers get other tensors, equal to those returned: hooks of these then meet no cotangent.
    """

    def __init__(self, modules: Sequence[nn.Module], apart: bool = False):
        self._apart = apart
        self._outputs: list[Tensor] = []
        self.last: Any = None
        self._rows: set[int] = set()
        self._stacked: set[int] = set()
        self._modules = list(modules)
        self._handles: list[RemovableHandle] = []
        self.renew()

    def renew(self) -> None:
        """Comes after all other hooks that the modules have, so that it sees what their callers do."""
        self.remove()
        self._handles = [module.register_forward_hook(self, with_kwargs=True) for module in self._modules]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Keeps the tensors of one call."""
        if self._apart:
            output = pytree.tree_map_only(Tensor, lambda t: t.view_as(t) if t.requires_grad else t, output)
        if torch.compiler.is_compiling():
            torch.compiler.disable(self._keep)([args, kwargs], output)
        else:
            self._keep([args, kwargs], output)
        return output if self._apart else None

    def _keep(self, inputs: Any, output: Any) -> None:
        # A call inside a backward is a recomputation of activation checkpointing.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        outputs = [t for t in _tensors(output) if t.is_floating_point() and t.dim() and t.grad_fn is not None]
        if not outputs:
            return
        self.last = output
        rows = {len(t) for t in _tensors(inputs) if t.dim()}
        self._rows |= rows
        # Leading rows other than those of an input, or of the last one, are no examples: a router's logits are of
        # tokens.
        rows.add(len(max(outputs, key=_order)))
        self._outputs += [t for t in outputs if len(t) in rows]

    def begin(self, batch: Any) -> None:
        """Forgets what the model returned before it is called with this batch."""
        self._outputs, self._rows, self.last = [], set(), None
        self._stacked = {len(t) * t.shape[1] for t in _tensors(batch) if t.dim() > 2}

    def tells_order(self, rows: int, instances: int) -> bool:
        """Whether several rows per example come one block of all examples after the other, as far as shapes tell.

        They don't where the model took no tensor of so many rows (tokens before examples, or flattened with these), nor
        where the batch holds [B, k, ...], which are flattened as B blocks of k.
        """
        return rows == instances or not self._rows or (rows in self._rows and rows not in self._stacked)

    def take(self) -> tuple[list[Tensor], Any]:
        """The tensors since the last time, and all that the last call returned."""
        outputs, last = self._outputs, self.last
        self._outputs, self.last = [], None
        return outputs, last

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


class Split(NamedTuple):
    """A loss as its cotangents, and what of it does not come through the model's outputs.

    Attributes:
        cotangents: One for each tensor that the loss reads.
        rest: [] the rest of the loss, with a graph: its gradient is exact, its value is not the rest's. None: there is
            none.
    """

    cotangents: list[Cotangent]
    rest: Tensor | None


def split(loss: Tensor, outputs: Sequence[Tensor]) -> Split:
    """Splits a loss at the outputs that it reads.

    Outputs may depend on one another (hidden states and logits). They are taken from the loss backwards, and each one's
    part is taken off before the next, so that nothing counts twice.

    Args:
        loss: [] with a graph; its own part of the graph is freed, unless there is a rest.
        outputs: What the model returned; the loss need not read all of them.

    Raises:
        ValueError: Reentrant activation checkpointing stands between two outputs.
    """
    read, has_rest = _read(loss, outputs) if loss.requires_grad else ([], False)
    cotangents, rest = [], loss
    for i, (output, edge) in enumerate(read):
        last = i + 1 == len(read) and not has_rest
        # The way from one output to another leads through the model, whose graph is still needed.
        keep = has_rest or len(read) > 1
        gradient = _gradient(rest, edge, keep)
        if gradient is None:
            continue
        gradient = gradient.to(output.dtype)
        cotangents.append(Cotangent(output, gradient))
        if not last:
            ids = torch.zeros(output.shape[:1], dtype=torch.int64, device=output.device)
            rest = rest - surrogates(cotangents[-1], ids, 1).sum().to(rest)
    return Split(cotangents, rest if has_rest else None)


def _gradient(loss: Tensor, edge: GradientEdge, retain_graph: bool) -> Tensor | None:
    """The gradient of a loss at a place in the graph; None where it doesn't depend on it."""
    try:
        return torch.autograd.grad(loss, [edge], retain_graph=retain_graph, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "The loss reads several outputs of the model that depend on one another (hidden states and logits), and "
            "reentrant activation checkpointing between them allows no gradient there: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or choose --jd_objectives batch."
        ) from error


def surrogates(cotangent: Cotangent, ids: Tensor, objectives: int) -> Tensor:
    """s [K], whose gradients are the objectives' parts of the loss's; their values are 0.

    Args:
        cotangent: Of one output.
        ids: The objective of each leading row [N] of the output, or of each token [N, T]; -1 for none.
        objectives: K.
    """
    return _Surrogates.apply(cotangent.output, cotangent.gradient, ids, objectives)


class _Surrogates(torch.autograd.Function):
    """Sends r_k c back to the places of objective k. Reading z would cost a walk over all logits."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor, ids: Tensor, objectives: int) -> Tensor:
        ctx.save_for_backward(gradient, ids)
        dtype = torch.promote_types(output.dtype, torch.float32)
        return torch.zeros(objectives, dtype=dtype, device=output.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ids = ctx.saved_tensors
        weights = torch.cat([grad_outputs[0].new_zeros(1), grad_outputs[0]])[ids + 1].to(gradient.dtype)
        # Writing another tensor of all logits takes a tenth of a small model's step on a CPU.
        if weights.device.type == "cpu" and bool((weights == 1).all()):
            return gradient, None, None, None
        return gradient * weights.view(weights.shape + (1,) * (gradient.dim() - weights.dim())), None, None, None


def _read(loss: Tensor, outputs: Sequence[Tensor]) -> tuple[list[tuple[Tensor, GradientEdge]], bool]:
    """The outputs that a loss reads, the latest first, each with the place in the graph where it does.

    Returns:
        These, and whether the loss depends on the parameters in another way, too.
    """
    places = dict(_places(outputs))
    read: dict[int, tuple[Tensor, GradientEdge]] = {}
    has_rest = False
    stack: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr)]
    seen = set(stack)
    while stack:
        place = stack.pop()
        node, index = place
        if place in places:
            read.setdefault(id(places[place]), (places[place], GradientEdge(node, index)))
            continue
        edges = node.next_functions
        if isinstance(getattr(node, "tap", None), ModuleTap) or node.name() == "CheckpointFunctionBackward":
            has_rest = True  # And behind it may be an output: a head that is called again reads one.
        if not edges and isinstance(getattr(node, "variable", None), nn.Parameter):
            has_rest = True
        if node.name() == "_DDPSinkBackward":
            edges = edges[index : index + 1]  # An identity on all outputs of the model.
        for edge in edges:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    latest = sorted(read.values(), key=lambda found: found[1].node._sequence_nr(), reverse=True)
    return latest, has_rest


def _places(outputs: Sequence[Tensor]) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """Where in the graph each output stands; one that was cast, also before that.

    Under mixed precision accelerate casts what the model returns, whose own loss has read it before.
    """
    for output in outputs:
        node = output.grad_fn
        if node is None:
            continue
        yield (node, output.output_nr), output
        if node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
            yield node.next_functions[0], output


def _order(tensor: Tensor) -> int:
    """When its part of the graph was made."""
    assert tensor.grad_fn is not None
    return tensor.grad_fn._sequence_nr()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model took or returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))
