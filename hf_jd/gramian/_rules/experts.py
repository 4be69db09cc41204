"""Rows of a mixture of experts: 3-D parameters [E, p, d], where each token goes to a few of the E experts.

The layer's routing indices say which expert saw which token. The experts are computed once more, for all tokens
together, to get the inputs and output gradients of their two linear maps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian.layouts import Segments
from hf_jd.gramian.rows import DenseRows, Rows, accumulation_dtype, inner

READ = 64  # multiplications in about the time of writing one number of a row and reading it twice


class RoutedRows(Rows):
    """Rows as factors: expert e's part of row i is the sum of g_t x_t^T over the tokens t of objective i sent to e.

    Args:
        grad_output: [n, p], tokens sorted by expert.
        input: [n, d], likewise.
        owners: The objective of each token [n].
        lengths: The number of tokens of each expert.
        objectives: R.
    """

    def __init__(self, grad_output: Tensor, input: Tensor, owners: Tensor, lengths: list[int], objectives: int):
        self.grad_output, self.input, self.owners, self.lengths = grad_output, input, owners, lengths
        self.objectives, self.device = objectives, input.device
        self.shape = torch.Size((len(lengths), grad_output.shape[1], input.shape[1]))

    def _experts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (g [n_e, p], x [n_e, d], owners [n_e]) for each expert."""
        parts = (self.grad_output, self.input, self.owners)
        return list(zip(*(part.split(self.lengths) for part in parts), strict=True))

    def block(self, first: int, last: int) -> Tensor:
        rows = self.input.new_zeros(self.objectives, last - first, *self.shape[1:])
        for e, expert in enumerate(self._experts()[first:last]):
            self._fill(rows[:, e], *expert)
        return rows.flatten(1)

    def _fill(self, rows: Tensor, g: Tensor, x: Tensor, owners: Tensor) -> None:
        """Fill in one expert's rows [R, p, d]: the product of its weight gradient, split by objective."""
        if bool((owners[1:] < owners[:-1]).any()):
            order = torch.argsort(owners, stable=True)
            g, x, owners = g[order], x[order], owners[order]
        lengths = torch.bincount(owners, minlength=self.objectives).tolist()
        for i, (g_i, x_i) in enumerate(zip(g.split(lengths), x.split(lengths), strict=True)):
            if len(g_i):
                torch.mm(g_i.T, x_i, out=rows[i])

    def gramian(self) -> Tensor:
        """Use, for each expert, the cheaper of the ghost form sum((x x^T) * (g g^T)) over token pairs and rows."""
        total = self.input.new_zeros(self.objectives, self.objectives, dtype=torch.float64)
        dtype = accumulation_dtype(self.input)
        for g, x, owners in self._experts():
            if self._ghost_cost(len(g)) > len(g) * g.shape[1] * x.shape[1] + self._rows_cost():
                rows = x.new_zeros(self.objectives, g.shape[1], x.shape[1])
                self._fill(rows, g, x, owners)
                flat = rows.flatten(1)
                total += inner(flat, flat)
                continue
            g, x = g.to(dtype), x.to(dtype)
            products = ((x @ x.T) * (g @ g.T)).double()
            member = torch.nn.functional.one_hot(owners, self.objectives).double()
            total += member.T @ products @ member
        return total

    def _ghost_cost(self, tokens: int) -> int:
        """Return the multiplications of one expert's Gramian from factors."""
        return tokens * tokens * (self.shape[1] + self.shape[2])

    def _rows_cost(self) -> int:
        """Return the same from formed rows, including the cost to write and read them."""
        return self.objectives * (self.objectives + READ) * self.shape[1] * self.shape[2]

    def compact(self, dtype: torch.dtype, materialise: bool) -> Rows:
        """Return dense rows if they may be formed and their Gramian is cheaper than that of the factors."""
        if materialise and sum(map(self._ghost_cost, self.lengths)) > len(self.lengths) * self._rows_cost():
            return DenseRows(self.dense().to(dtype), self.shape)
        return self

    def weighted_sum(self, weights: Tensor) -> Tensor:
        factors = weights.to(self.grad_output.dtype)[self.owners, None]
        return torch.stack(
            [(g * f).T @ x for (g, x, _), f in zip(self._experts(), factors.split(self.lengths), strict=True)]
        )

    def select(self, index: Tensor) -> Rows:
        position = torch.full((self.objectives,), -1, device=index.device)
        position[index] = torch.arange(len(index), device=index.device)
        owners = position[self.owners]
        selected = owners >= 0
        lengths = [int(part.sum()) for part in selected.split(self.lengths)]
        return RoutedRows(self.grad_output[selected], self.input[selected], owners[selected], lengths, len(index))

    def scaled(self, factors: Tensor) -> Rows:
        g = self.grad_output * factors.to(self.grad_output.dtype)[self.owners, None]
        return RoutedRows(g, self.input, self.owners, self.lengths, self.objectives)

    def __add__(self, other: Rows) -> Rows:
        if not isinstance(other, RoutedRows):
            return DenseRows(self.dense(), self.shape) + other
        return self._joined(other, other.owners, self.objectives)

    def below(self, other: Rows) -> Rows:
        if not isinstance(other, RoutedRows):
            return DenseRows(self.dense(), self.shape).below(other)
        return self._joined(other, other.owners + self.objectives, self.objectives + other.objectives)

    def _joined(self, other: "RoutedRows", owners: Tensor, objectives: int) -> "RoutedRows":
        def merged(a: Tensor, b: Tensor) -> Tensor:
            pairs = zip(a.split(self.lengths), b.split(other.lengths), strict=True)
            return torch.cat([part for pair in pairs for part in pair])

        lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        g, x = merged(self.grad_output, other.grad_output), merged(self.input, other.input)
        return RoutedRows(g, x, merged(self.owners, owners), lengths, objectives)

    @property
    def nbytes(self) -> int:
        return self.grad_output.nbytes + self.input.nbytes + self.owners.nbytes


def is_experts(module: Any, inputs: Sequence[Tensor]) -> bool:
    """Return whether a module is transformers' layer of experts: 3-D projections, and routing among its inputs."""
    attributes = ("has_gate", "has_bias", "is_transposed", "down_proj")
    return (
        len(inputs) == 3
        and all(hasattr(module, name) for name in attributes)
        and isinstance(module.down_proj, nn.Parameter)
        and module.down_proj.dim() == 3
        and not getattr(module, "has_post_expert_norm", False)
    )


def experts(module: Any, inputs: Sequence[Tensor], grad_output: Tensor, segments: Segments) -> dict[str, Rows]:
    """Form the rows of U, D and their biases in y_t = sum_c r_tc D_e a(U_e x_t + b_e), over the experts e of token t.

    Args:
        module: The layer.
        inputs: Tokens [N, d], the experts of each token [N, k], and their routing weights [N, k].
        grad_output: [N, d].
        segments: The objectives of the N tokens.
    """
    index = next(t for t in inputs if not t.is_floating_point())
    hidden = next(t for t in inputs if t.is_floating_point() and t.shape != index.shape)
    routing = next(t for t in inputs if t is not hidden and t is not index)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name), module.down_proj
    owners = segments.token_ids((len(hidden), 1)).to(hidden.device).expand(*index.shape).flatten()
    used = ((owners >= 0) & (index.flatten() < len(up))).nonzero().squeeze(1)
    # Sort by expert, then by objective: rows are then products of neighbouring tokens.
    chosen = used[torch.argsort(index.flatten()[used] * segments.objectives + owners[used], stable=True)]
    expert, owners, tokens = index.flatten()[chosen], owners[chosen], chosen // index.shape[1]
    lengths = torch.bincount(expert, minlength=len(up)).tolist()

    def through(values: Tensor, weights: Tensor, transposed: bool) -> Tensor:
        parts = zip(values.split(lengths), weights, strict=True)
        return torch.cat([part @ (w if transposed else w.T).to(values.dtype) for part, w in parts])

    x = hidden[tokens]
    pre = through(x, up, module.is_transposed)
    if module.has_bias:
        pre = pre + getattr(module, up_name + "_bias")[expert].to(pre.dtype)
    with torch.enable_grad():
        pre.requires_grad_()
        activated = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    g_down = (grad_output[tokens] * routing.flatten()[chosen][:, None]).to(x.dtype)
    g_up = torch.autograd.grad(activated, pre, through(g_down, down, not module.is_transposed))[0]
    by_name: dict[str, Rows] = {}
    for name, g, value in (("down_proj", g_down, activated.detach()), (up_name, g_up, x)):
        g, value = (value, g) if module.is_transposed else (g, value)
        by_name[name] = RoutedRows(g, value, owners, lengths, segments.objectives)
    if module.has_bias:
        slots = owners * len(up) + expert
        for name, g in ((up_name + "_bias", g_up), ("down_proj_bias", g_down)):
            rows = g.new_zeros(segments.objectives * len(up), g.shape[1]).index_add_(0, slots, g)
            by_name[name] = DenseRows(rows.view(segments.objectives, -1), getattr(module, name).shape)
    return {name: rows for name, rows in by_name.items() if getattr(module, name).requires_grad}
