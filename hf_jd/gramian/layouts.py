"""Map the leading rows of a module's tensors to objectives.

The batch need not be a tensor's first dimension: OPT flattens it to [B*T, d], preference trainers stack [2B, T, d],
XLNet puts time first. `candidates` lists, from shapes alone, every way in which a tensor can hold B instances; the
self-check decides between them; `Layout.arrange` brings the tensor to [N, ...], with `Segments` that give the objective
of each row.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

NARROW = 4  # form rows per instance and add them up if they are this many times smaller than the layer's tensors
SCATTERED = 0.5  # sort tensors if adding up the products of extra runs would touch more than this share of their size


class UnsupportedError(ValueError):
    """The layer can't have rows; the message says what to do."""


class UnmappedError(Exception):
    """A tensor's leading rows can't be assigned to objectives; the caller tries the next tier."""


class DrawsError(UnmappedError):
    """A module draws random numbers when called again, and its forward's numbers are unknown."""


@dataclass(eq=False)
class Segments:
    """The objective of each leading row.

    Args:
        objectives: The number of objectives R.
        ids: The objective of each leading row [N], or of each token [N, S]; in 0..R-1, or -1 for none. `None`: the rows
            are R blocks of `block` rows, in order.
        block: Leading rows per objective, if `ids` is None.
    """

    objectives: int
    ids: Tensor | None = None
    block: int = 1
    _repeated: dict[tuple["Layout", int], "Segments"] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[int, "Segments"] = field(default_factory=dict, init=False, repr=False)
    _last: tuple[tuple, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _neighbours: list[tuple[int, int, int]] | None = field(default=None, init=False, repr=False)

    @property
    def by_token(self) -> bool:
        """Whether tokens of the same leading row may belong to different objectives."""
        return self.ids is not None and self.ids.dim() == 2

    @cached_property
    def distinguish(self) -> bool:
        """Whether there are several objectives, so that a wrong order would show."""
        return self.objectives > 1 if self.ids is None else len(self.ids.unique()) > 1

    @cached_property
    def _sorted(self) -> tuple[Tensor | None, list[int]]:
        """The order that makes objectives contiguous (None: they are already), and the number of entries of each."""
        assert self.ids is not None
        ids = self.ids.flatten()
        # Counts start at id -1: the first count is of entries without an objective, which the sort puts first.
        none, *lengths = torch.bincount(ids + 1, minlength=self.objectives + 1).tolist()
        if none == 0 and bool((ids[1:] >= ids[:-1]).all()):
            return None, lengths
        return torch.argsort(ids, stable=True)[none:], lengths

    def members(self) -> list[Tensor]:
        """Return the leading rows of each objective, R index tensors. Raise UnmappedError if by token."""
        if self.by_token:
            raise UnmappedError
        if self.ids is None:
            return list(torch.arange(self.objectives * self.block).split(self.block))
        order, lengths = self._sorted
        index = torch.arange(len(self.ids), device=self.ids.device) if order is None else order
        return list(index.split(lengths))

    def contiguous(self, tensor: Tensor) -> tuple[Tensor, list[int]]:
        """Sort a tensor [N, S, f] by objective; return its tokens [n, f], and the number of tokens per objective."""
        order, lengths = self._sorted
        if self.by_token:
            tensor = tensor.flatten(0, 1)
        else:
            lengths = [n * tensor.shape[1] for n in lengths]
        if order is not None:
            tensor = tensor.index_select(0, order)
        return tensor if self.by_token else tensor.flatten(0, 1), lengths

    def _shared(self, input: Tensor) -> Tensor:
        # Query, key and value share an input, and are recorded one after another: sort it once.
        key = (input.data_ptr(), input.shape, input._version)
        if self._last is None or self._last[0] != key:
            self._last = key, input, self.contiguous(input)[0]
        return self._last[2]

    def outer(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """Compute the rows [R, p, d] of a linear map: the sum of g_t x_t^T over the tokens of each objective.

        Args:
            grad_output: [N, S, p].
            input: [N, S, d], of the same dtype.
        """
        p, d = grad_output.shape[-1], input.shape[-1]
        if self.ids is None:  # equal blocks: one batched product
            g, x = grad_output.reshape(self.objectives, -1, p), input.reshape(self.objectives, -1, d)
            return torch.bmm(g.transpose(1, 2), x)
        if not self.by_token and NARROW * p * d <= input.shape[1] * (p + d):
            # The rows of instances are far smaller than the layer's tensors (LoRA): adding up rows beats sorting.
            return self.reduce(torch.bmm(grad_output.transpose(1, 2), input))
        # Otherwise one product per run of neighbouring tokens with the same objective; many runs are sorted into R.
        runs = self._runs(grad_output.shape[1])
        g, x = grad_output.flatten(0, 1), input.flatten(0, 1)
        if (len(runs) - self.objectives) * p * d > SCATTERED * len(x) * (p + d):
            g, lengths = self.contiguous(grad_output)
            x = self._shared(input)
            stops = list(itertools.accumulate(lengths))
            runs = [(stop - n, stop, k) for k, (n, stop) in enumerate(zip(lengths, stops, strict=True)) if n]
        # Runs of equal length, in order, are again one batched product.
        even, rest = divmod(len(x), self.objectives)
        if rest == 0 and runs == [(k * even, (k + 1) * even, k) for k in range(self.objectives)]:
            return torch.bmm(g.view(self.objectives, even, p).transpose(1, 2), x.view(self.objectives, even, d))
        rows, begun = g.new_empty(self.objectives, p, d), set()
        for start, stop, k in runs:
            if k in begun:
                rows[k].addmm_(g[start:stop].T, x[start:stop])
            else:
                torch.mm(g[start:stop].T, x[start:stop], out=rows[k])
            begun.add(k)
        for k in set(range(self.objectives)) - begun:
            rows[k].zero_()
        return rows

    def _runs(self, tokens: int) -> list[tuple[int, int, int]]:
        """Return (first token, last + 1, objective) of each run of neighbours, with `tokens` per leading row."""
        if self._neighbours is None:
            assert self.ids is not None
            ids, counts = torch.unique_consecutive(self.ids.flatten(), return_counts=True)
            stops = counts.cumsum(0).tolist()
            self._neighbours = [
                (stop - n, stop, k) for k, n, stop in zip(ids.tolist(), counts.tolist(), stops, strict=True) if k >= 0
            ]
        scale = 1 if self.by_token else tokens
        return [(start * scale, stop * scale, k) for start, stop, k in self._neighbours]

    def sum(self, values: Tensor) -> Tensor:
        """Sum values [N, S, f] over the tokens of each objective: [R, f]."""
        if self.ids is None:
            return values.reshape(self.objectives, -1, values.shape[-1]).sum(1)
        if self.by_token:
            return self._index_add(self.ids.flatten(), values.flatten(0, 1))
        return self._index_add(self.ids, values.sum(1))

    def reduce(self, rows: Tensor) -> Tensor:
        """Sum per-row values [N, ...] to objectives [R, ...]. Raise UnmappedError if segments are by token."""
        if self.by_token:
            raise UnmappedError
        if self.ids is not None:
            return self._index_add(self.ids, rows)
        return rows if self.block == 1 else rows.unflatten(0, (self.objectives, self.block)).sum(1)

    def token_ids(self, shape: Sequence[int]) -> Tensor:
        """Return the objective of each token of a tensor of leading shape [N, S]: int64 [N, S]."""
        if self.ids is None:
            return torch.arange(self.objectives).repeat_interleave(self.block)[:, None].expand(*shape)
        return self.ids if self.by_token else self.ids[:, None].expand(*shape)

    def spread(self, weights: Tensor, tensor: Tensor) -> Tensor:
        """Put each objective's weight, from weights [R], at its rows or tokens in a tensor [N, ...]; 0 for none."""
        # The id -1 picks the appended zero.
        ids = self.token_ids(tensor.shape[:2] if self.by_token else (len(tensor), 1)).to(weights.device)
        spread = torch.cat([weights, weights.new_zeros(1)])[ids]
        return spread.view([*ids.shape, *[1] * tensor.dim()][: tensor.dim()])

    def repeated(self, layout: "Layout", factor: int, device: torch.device) -> "Segments":
        """Return the segments of `factor` times as many leading rows (`MAJOR` or `MINOR`), built once per step."""
        if (layout, factor) not in self._repeated:
            self._repeated[layout, factor] = self._repeat(layout, factor, device)
        return self._repeated[layout, factor]

    def in_layers(self, layers: int) -> "Segments":
        """Return the segments of L layers' concatenated tensors: objective i of layer l is l * R + i; -1 stays -1.

        Built once per step.
        """
        if layers not in self._layers:
            ids = None
            if self.ids is not None:
                first = torch.arange(layers, device=self.ids.device).view(-1, *[1] * self.ids.dim()) * self.objectives
                ids = torch.where(self.ids < 0, -1, self.ids + first).flatten(0, 1)
            self._layers[layers] = Segments(self.objectives * layers, ids, self.block)
        return self._layers[layers]

    def _repeat(self, layout: "Layout", factor: int, device: torch.device) -> "Segments":
        if self.ids is None and layout is MAJOR:
            return Segments(self.objectives, block=self.block * factor)
        ids = self.ids
        if ids is None:
            ids = torch.arange(self.objectives, device=device).repeat_interleave(self.block)
        if layout is MINOR:
            return Segments(self.objectives, ids.repeat(factor, *[1] * (ids.dim() - 1)))
        if not self.by_token:
            return Segments(self.objectives, ids.repeat_interleave(factor))
        if factor % ids.shape[1]:  # the rows of an instance can't be split evenly among its tokens
            raise UnmappedError
        return Segments(self.objectives, ids.flatten().repeat_interleave(factor // ids.shape[1]))

    def _index_add(self, ids: Tensor, values: Tensor) -> Tensor:
        # Entries without an objective (-1) land in an extra first row, which is dropped.
        total = values.new_zeros(self.objectives + 1, *values.shape[1:])
        return total.index_add_(0, ids + 1, values)[1:]


@dataclass
class Batch:
    """The instances of a step and their objectives.

    Attributes:
        instances: B.
        segments: The objectives of the B instances, or of their tokens.
    """

    instances: int
    segments: Segments


@dataclass(frozen=True, eq=False)
class Layout:
    """How a tensor holds the B instances of a batch; one of `AXES`, `MAJOR` and `MINOR`.

    Attributes:
        axis: The dimension of the instances.
        is_repeated: Whether its size is a multiple of B, with several entries per instance.
    """

    axis: int = 0
    is_repeated: bool = False

    def arrange(self, batch: Batch, *tensors: Tensor) -> tuple[list[Tensor], Segments]:
        """Bring tensors to [N, ...], batch first, and return them with the segments of their leading rows.

        Args:
            batch: The instances; their segments are the identity, [B] or [B, T].
            tensors: Tensors with common leading dimensions.

        Raises:
            UnmappedError: Segments by token don't fit the tensors' second dimension.
        """
        base = batch.segments
        if self.is_repeated:
            return list(tensors), base.repeated(self, tensors[0].shape[0] // batch.instances, tensors[0].device)
        moved = [t.movedim(self.axis, 0) for t in tensors] if self.axis else list(tensors)
        if base.ids is not None and base.by_token and moved[0].shape[1:2] != base.ids.shape[1:]:
            raise UnmappedError
        return moved, base


AXES = [Layout(axis) for axis in range(64)]
MAJOR = Layout(is_repeated=True)  # [B*k, ...]: the k rows of an instance are neighbours
MINOR = Layout(is_repeated=True)  # [k*B, ...]: k blocks of B instances


def candidates(lead: Sequence[int], instances: int) -> list[Layout]:
    """Return the layouts in which a tensor of leading shape `lead` can hold B instances, the most common first.

    The list is empty if no dimension fits: the input has no batch dimension.
    """
    layouts = [axis for axis, size in zip(AXES, lead, strict=False) if size == instances]
    if lead and lead[0] > instances and lead[0] % instances == 0:
        layouts += [MAJOR] if instances == 1 else [MAJOR, MINOR]
    return layouts


def shared_features(tensor: Tensor, features: int = 1) -> Tensor:
    """Reshape [N, *shared, *features] to [N, S, f], the format in which all rules are written."""
    if tensor.dim() == 3 and features == 1:
        return tensor
    lead = tensor.shape[1 : tensor.dim() - features]
    return tensor.reshape(tensor.shape[0], math.prod(lead), -1)
