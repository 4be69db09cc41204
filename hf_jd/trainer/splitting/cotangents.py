"""Split any scalar loss by instance, through its cotangents at the model's outputs.

A loss L is a function of the model's outputs z (logits, log-probabilities, embeddings). Its cotangent c = dL/dz is
cheap: autograd walks only the loss's own part of the graph. Instances are independent inside the model, so the part of
the gradient through instance i is the pullback of c_i, the gradient of the surrogate s_i = <c_i, z_i>. The parts add up
to L's gradient exactly, even if the loss itself mixes instances (contrastive losses, pairs).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from hf_jd.gramian.taps import ModuleTap, NoTap


class Cotangent(NamedTuple):
    """An output of the model, and the gradient of the loss with respect to it.

    Attributes:
        output: z, with a graph.
        gradient: c, the same shape and dtype.
    """

    output: Tensor
    gradient: Tensor


class OutputObserver:
    """Hooks that store a model's outputs with a graph, for the loss that is computed from them.

    Args:
        modules: The model as its callers see it, and inner models that they may call directly (PEFT's base model).
        apart: Whether callers get copies of the outputs, so that hooks on the originals see no cotangent.
    """

    def __init__(self, modules: Sequence[nn.Module], apart: bool = False):
        self._apart = apart
        self.modules = list(modules)
        self._handles: list[RemovableHandle] = []
        self.begin(None)
        self.renew()

    def __reduce__(self) -> tuple:
        return NoTap, ()  # A copy of the model, made between two steps, has no trainer.

    def renew(self) -> None:
        """Move behind all other hooks of the modules, to see the same outputs as their callers."""
        self.remove()
        self._handles = [module.register_forward_hook(self, with_kwargs=True) for module in self.modules]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Store the outputs of one call."""
        if self._apart:
            output = pytree.tree_map_only(Tensor, lambda t: t.view_as(t) if t.requires_grad else t, output)
        if torch.compiler.is_compiling():
            torch.compiler.disable(self._keep)([args, kwargs], output)
        else:
            self._keep([args, kwargs], output)
        return output if self._apart else None

    def _keep(self, inputs: Any, output: Any) -> None:
        # A call during a backward is a recomputation by activation checkpointing.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        outputs = [t for t in _tensors(output) if t.is_floating_point() and t.dim() and t.grad_fn is not None]
        if not outputs:
            return
        self.last = output
        taken = [t for t in _tensors(inputs) if t.dim()]
        rows = {len(t) for t in taken}
        self._rows |= rows
        taken = [t.detach() for t in taken if t.dim() > 1]
        self._taken += taken
        self._calls.append(({id(t) for t in outputs}, taken))
        # Leading rows that match no input, and not the last output, are no examples: a router's logits are per token.
        rows.add(len(max(outputs, key=_order)))
        self._outputs += [t for t in outputs if len(t) in rows]

    def begin(self, batch: Any) -> None:
        """Forget earlier outputs, before the model is called with this batch."""
        self._outputs: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._calls: list[tuple[set[int], list[Tensor]]] = []
        self.last: Any = None
        self._rows: set[int] = set()
        self._collated = [t for t in _tensors(batch) if t.dim() > 1]
        self._stacked = {len(t) * t.shape[1] for t in self._collated if t.dim() > 2}

    def tells_order(self, rows: int, instances: int) -> bool:
        """Return whether the model's inputs suggest that several rows per example come in blocks of all examples.

        They don't if the model took no tensor with that many rows (tokens come before examples, or are flattened with
        them), if the batch holds [B, k, ...], which is flattened as B blocks of k, or if each example's rows follow one
        another (`stack(..., dim=1).flatten(0, 1)`, `repeat_interleave`, several generations per prompt).
        """
        if rows == instances or not self._rows:
            return True
        by_example = (t.unflatten(0, (instances, -1)) for t in self._taken if len(t) == rows)
        return rows in self._rows and rows not in self._stacked and not any(map(self._in_turn, by_example))

    def _in_turn(self, taken: Tensor) -> bool:
        """Return whether each column of an input [B, k, ...], but no block of it, begins like a tensor of the batch."""
        blocks = taken.flatten(0, 1).unflatten(0, (-1, len(taken)))
        return all(map(self._is_collated, taken.unbind(1))) and not all(map(self._is_collated, blocks))

    def _is_collated(self, column: Tensor, start: int = 0) -> bool:
        """Return whether a tensor [N, T, ...] begins as N examples of a tensor of the batch, from an index on."""
        for one in self._collated:
            rows = one[start : start + len(column)]
            if len(rows) == len(column) and rows.shape[2:] == column.shape[2:]:
                length = min(rows.shape[1], column.shape[1])
                if torch.equal(column[:, :length], rows[:, :length].to(column)):
                    return True
        return False

    def parts(self, outputs: Sequence[Tensor], instances: int) -> list[Tensor] | None:
        """Find the example of each leading row of outputs, if the model was called on parts of the batch.

        Args:
            outputs: Of any of the calls.
            instances: B, the number of examples in the batch.

        Returns:
            For each output [N, ...], [N] the indices of its examples; None if a call's inputs aren't consecutive rows
            of the batch, or if it is unclear which ones.
        """
        if any(len(t) != instances for t in self._collated):
            return None  # The rows of a packed batch aren't examples.
        starts: dict[int, int] = {}
        expected, certain, ordered = 0, True, True
        for returned, taken in self._calls:
            read = [output for output in outputs if id(output) in returned]
            if not read:
                continue
            rows = len(read[0])
            matches = [i for i in range(instances - rows + 1) if all(self._is_collated(t, i) for t in taken)]
            if not taken or (len(matches) != 1 and expected not in matches):
                return None
            start = matches[0] if len(matches) == 1 else expected
            certain, ordered = certain and len(matches) == 1, ordered and start == expected
            starts |= {id(output): start for output in read}
            expected = (start + rows) % instances
        # Equal examples can't be told apart, unless the calls go through all of the batch in its order.
        if len(starts) < len(outputs) or not (certain or (ordered and expected == 0)):
            return None
        return [starts[id(output)] + torch.arange(len(output), device=output.device) for output in outputs]

    def take(self, keep: bool = False) -> tuple[list[Tensor], Any]:
        """Return the outputs since the last time, and what the last call returned; `keep` them for a later call."""
        outputs, last = self._outputs, self.last
        if not keep:
            self._outputs, self.last = [], None
        return outputs, last

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def split(loss: Tensor, outputs: Sequence[Tensor], retain_graph: bool = False) -> tuple[list[Cotangent], Tensor | None]:
    """Split a loss at the outputs that it reads.

    Outputs may depend on each other (hidden states and logits). They are visited from the loss backwards, and each
    one's part is subtracted before the next, so that nothing counts twice.

    Args:
        loss: [] with a graph; its own part of the graph is freed, unless there is a rest.
        outputs: The model's outputs; the loss need not read all of them.
        retain_graph: Whether to retain the loss's own part, too.

    Returns:
        One cotangent per output that the loss reads; and the rest, which bypasses the outputs, [] with a graph: its
        gradient is the rest's, but not its value. None if there is no rest.

    Raises:
        ValueError: Reentrant activation checkpointing stands between two outputs.
    """
    read, has_rest, through_model = _read(loss, outputs) if loss.requires_grad else ([], False, False)
    cotangents, rest = [], loss
    # The path from one output to another goes through the model, whose graph is still needed.
    keep_graph = retain_graph or through_model or has_rest or len(read) > 1
    for i, (output, edge) in enumerate(read):
        with _without_hooks([output for output, _ in read]):
            gradient = _gradient(rest, edge, keep_graph)
        if gradient is None:
            continue
        gradient = gradient.to(output.dtype)
        cotangents.append(Cotangent(output, gradient))
        if has_rest or i + 1 < len(read):
            ids = torch.zeros(output.shape[:1], dtype=torch.int64, device=output.device)
            rest = rest - surrogates(cotangents[-1], ids, 1).sum().to(rest)
    return cotangents, rest if has_rest else None


@contextmanager
def _without_hooks(outputs: Sequence[Tensor]) -> Generator[None]:
    """Leave hooks on the outputs to the surrogates' backward, which would apply them a second time."""
    hooks = [output._backward_hooks for output in outputs if output._backward_hooks]
    before = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, restored in zip(hooks, before, strict=True):
            each.update(restored)


def _gradient(loss: Tensor, edge: GradientEdge, retain_graph: bool) -> Tensor | None:
    """Return the gradient of a loss at an edge of the graph; None if it doesn't depend on it."""
    try:
        return torch.autograd.grad(loss, [edge], retain_graph=retain_graph, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "The loss reads several outputs of the model that depend on each other (hidden states and logits), but "
            "reentrant activation checkpointing between them allows no gradient there: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or choose --jd_objectives batch."
        ) from error


def surrogates(cotangent: Cotangent, ids: Tensor, objectives: int) -> Tensor:
    """Return s [K], whose gradients are the objectives' parts of the loss's gradient; their values are 0.

    Args:
        cotangent: Of one output.
        ids: The objective of each leading row [N] of the output, or of each token [N, T]; -1 for none.
        objectives: K.
    """
    return _Surrogates.apply(cotangent.output, cotangent.gradient, ids, objectives)


class _Surrogates(torch.autograd.Function):
    """Surrogates whose backward sends r_k c to the entries of objective k, without a pass over all logits to read z."""

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
        return gradient * wide(weights, gradient), None, None, None


def wide(leading: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1, up to the number of another tensor's."""
    return leading.view(leading.shape + (1,) * (like.dim() - leading.dim()))


def _read(loss: Tensor, outputs: Sequence[Tensor]) -> tuple[list[tuple[Tensor, GradientEdge]], bool, bool]:
    """Find the outputs that a loss reads, the latest first, each with its edge in the graph.

    Returns:
        These, whether the loss also depends on parameters in other ways, and whether its graph has the tap of the model
        itself in it, through which the model's outputs pass, too.
    """
    places = dict(_places(outputs))
    returned = {node for node, _ in places}
    read: dict[int, tuple[Tensor, GradientEdge, int]] = {}
    has_rest = through_model = False
    stack: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr)]
    seen = set(stack)
    while stack:
        place = stack.pop()
        node, index = place
        if place in places:
            output, depth = places[place]
            # The gradient at the place before a cast includes that from behind it.
            if id(output) not in read or depth > read[id(output)][2]:
                read[id(output)] = (output, GradientEdge(node, index), depth)
            continue
        edges = node.next_functions
        tapped = _is_tap(node)
        if tapped and node in returned:
            through_model = True
            edges = edges[index + 1 : index + 2]  # the identity on all that the model returned
        elif tapped or node.name() == "CheckpointFunctionBackward":
            has_rest = True  # There may be an output behind it: a head that is called again reads one.
        if not edges and isinstance(getattr(node, "variable", None), nn.Parameter):
            has_rest = True
        if node.name() == "_DDPSinkBackward":
            edges = edges[index : index + 1]  # the identity on all outputs of the model
        for edge in edges:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    latest = sorted(read.values(), key=lambda found: found[1].node._sequence_nr(), reverse=True)
    return [(output, edge) for output, edge, _ in latest], has_rest, through_model


def _places(outputs: Sequence[Tensor]) -> Iterator[tuple[tuple[Any, int], tuple[Tensor, int]]]:
    """Yield each output's places in the graph, from the last to the first, with the output and the place's depth.

    The model's own loss reads its outputs before what wraps the model changes them: accelerate casts them with mixed
    precision, and the engine taps them if the model itself has parameters.
    """
    for output in outputs:
        node, index, depth = output.grad_fn, output.output_nr, 0
        while node is not None:
            yield (node, index), (output, depth)
            before = (index + 1) if _is_tap(node) else 0 if node.name() == "ToCopyBackward0" else None
            if before is None:
                break
            (node, index), depth = node.next_functions[before], depth + 1


def _is_tap(node: Any) -> bool:
    return isinstance(getattr(node, "tap", None), ModuleTap)


def _order(tensor: Tensor) -> int:
    """Return when autograd created the tensor's node."""
    assert tensor.grad_fn is not None
    return tensor.grad_fn._sequence_nr()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's inputs or outputs."""
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
