"""Floating-point operations of an update on one process. See `cases.py` for the symbols.

Counted like `torch.utils.flop_counter`: 2 for a multiplication and an addition, and only in products.
"""

from __future__ import annotations

import math

from hf_jd.estimate.cases import Case
from hf_jd.estimate.memory import pairs_cost_more, storage
from hf_jd.estimate.shapes import Matrix, Shape, Table

_CHUNK = 65_536  # columns that the engine multiplies at once (`hf_jd.gramian.rows`)
_BLOCK = 64  # objectives up to which it does not split a Gramian into blocks


def product_flops(matrix: Matrix, case: Case) -> float:
    """Count 2 N p d for a map's forward pass, its input's gradient, or its weight's (arXiv 2001.08361, 2.1)."""
    return 2 * matrix.tokens(case.all_tokens) * matrix.outputs * matrix.inputs


def attention_flops(shape: Shape, case: Case) -> float:
    """Count 4 N T h for each attention's two products, with h the width of its heads; include both causal halves."""
    return 4 * case.all_tokens * case.tokens * shape.attention


def forward_flops(shape: Shape, case: Case) -> float:
    """Count the forward pass: all maps and attentions."""
    return sum(product_flops(matrix, case) for matrix in shape.matrices) + attention_flops(shape, case)


def backward_flops(shape: Shape, case: Case) -> float:
    """Count the backward to layers' inputs: like the forward, attentions twice; with checkpointing, plus a forward.

    This includes the first layer's maps, which autograd skips if nothing below is trained.
    """
    again = forward_flops(shape, case) if case.checkpointing else 0
    return again + forward_flops(shape, case) + attention_flops(shape, case)


def plain_flops(shape: Shape, case: Case) -> float:
    """Count a plain step: forward, backward, and the trained weights' gradients."""
    weights = sum(product_flops(matrix, case) for matrix in shape.trained)
    return forward_flops(shape, case) + backward_flops(shape, case) + weights


def row_flops(shape: Shape, case: Case) -> float:
    """Count the rows, which replace the weights' gradients: 2 N p d if they are dense, nothing for factors.

    An expert's two maps are computed once more, forward or backward; adapters fused with experts take one backward pass
    per objective. Rows for other processes are all dense.
    """
    sent = {"factors", "routed"} if case.processes > 1 else set()
    total = case.rows * backward_flops(shape, case) / case.accumulation if shape.fused else 0.0
    for matrix in shape.trained:
        form = storage(matrix, case)
        total += product_flops(matrix, case) * ((matrix.count > 1) + (form == "dense" or form in sent))
    return total


def squared(r: int) -> int:
    """Count multiplications per column of r rows: r^2; for large Gramians, which `inner` splits, half the blocks."""
    half = r // 2
    return r * r if r <= _BLOCK else squared(half) + squared(r - half) + half * (r - half)


def gramian_flops(shape: Shape, case: Case) -> float:
    """Count 2 R^2 per column of J; with W processes, each takes M rows of 1 / W of the columns, 2 M^2 n / W.

    Fewer for R > 64 (`squared`). For factors on one process, the cheaper of 2 N^2 (p + d) and 2 N p d + 2 R^2 p d; for
    E experts with evenly spread tokens, the cheaper of 2 (p + d + R) per pair of an expert's tokens and the same.
    """
    if case.processes > 1:
        return 2 * squared(case.objectives) * shape.trainable / case.processes
    r, total = case.rows, 2.0 * squared(case.rows) * shape.vectors
    for matrix in shape.trained:
        p, d, form = matrix.outputs, matrix.inputs, storage(matrix, case)
        tokens = matrix.tokens(case.all_tokens)
        if form == "dense":
            total += 2 * squared(r) * matrix.elements
        elif form == "routed" and not _formed(matrix, case):
            total += 2 * tokens**2 / matrix.count * (p + d + r) + 2 * r * r * tokens
        elif _formed(matrix, case):
            total += product_flops(matrix, case) + 2 * squared(r) * matrix.elements
        else:
            total += 2 * tokens**2 * (p + d)
    return total + sum(_table_flops(table, case) for table in shape.tables)


def _table_flops(table: Table, case: Case) -> float:
    """Count 2 R^2 per number of the entries looked up, in chunks, and the products with a tied head's factors."""
    if table.head is not None and storage(table.head, case) == "dense":
        return 0.0  # included in the head's
    step = max(1, _CHUNK // table.width)
    used = min(case.tokens if table.positions else case.all_tokens, table.entries)
    cross = 0 if table.head is None else 2 * case.all_tokens**2 * table.width
    return 2.0 * squared(case.rows) * math.ceil(used / step) * step * table.width + cross


def update_flops(shape: Shape, case: Case) -> float:
    """Count J^T w: 2 per number of dense rows, 2 N p d for factors. Each process weighs 1 / W of the groups' sums."""
    total = 2.0 * case.rows * shape.vectors
    for matrix in shape.trained:
        dense = storage(matrix, case) == "dense" or (case.processes > 1 and case.groups is not None)
        total += 2 * case.rows * matrix.elements if dense else product_flops(matrix, case)
    return total / case.processes if case.groups is not None else total


def formed_flops(shape: Shape, case: Case) -> float:
    """Count the part of the Gramian and the update that multiplies factors, in the layers' dtype."""
    if case.processes > 1 and case.groups is not None:
        return 0.0
    update = sum(product_flops(matrix, case) for matrix in shape.trained if storage(matrix, case) != "dense")
    if case.processes > 1:
        return update
    return update + sum(product_flops(matrix, case) for matrix in shape.trained if _formed(matrix, case))


def _formed(matrix: Matrix, case: Case) -> bool:
    """Return whether factors are multiplied out for the Gramian (`OuterRows.gramian`, `RoutedRows.gramian`)."""
    if matrix.count > 1:
        forming = matrix.tokens(case.batch * case.tokens) / matrix.count * matrix.outputs * matrix.inputs
        return storage(matrix, case) == "routed" and pairs_cost_more(matrix, case, forming)
    r, s, p, d = case.rows, case.tokens, matrix.outputs, matrix.inputs
    return storage(matrix, case) == "factors" and r * s * (p + d) > (2 + r / s) * p * d


def step_flops(shape: Shape, case: Case) -> float:
    """Count forward, backward, rows, Gramian and update; with two passes, a plain backward replaces that update.

    The second pass starts with a new forward pass, unless there is only one micro-batch, whose graph is retained.
    """
    first = (
        forward_flops(shape, case) + backward_flops(shape, case) + row_flops(shape, case) + gramian_flops(shape, case)
    )
    if not case.two_pass:
        return first + update_flops(shape, case)
    saved = forward_flops(shape, case) if case.accumulation == 1 else 0
    return first + plain_flops(shape, case) - saved
