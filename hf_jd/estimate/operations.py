"""Floating-point operations of an update on one process. The letters are those of `cases.py`.

They are counted as `torch.utils.flop_counter` does, 2 for a multiplication and an addition, and only those of products.
"""

from __future__ import annotations

import math

from hf_jd.estimate.cases import Case
from hf_jd.estimate.memory import kept_as, pairs_cost_more
from hf_jd.estimate.shapes import Matrix, Shape, Table

_CHUNK = 65_536  # columns that the engine multiplies at once (`hf_jd.gramian.rows`)
_BLOCK = 64  # objectives up to which it does not cut a Gramian into blocks


def product_flops(matrix: Matrix, case: Case) -> float:
    """2 N p d: a map's forward pass, its input's gradient, or its weight's (Kaplan et al., arXiv 2001.08361, 2.1)."""
    return 2 * matrix.tokens(case.all_tokens) * matrix.outputs * matrix.inputs


def attention_flops(shape: Shape, case: Case) -> float:
    """4 N T h for the two products of each attention, of h the width of its heads; the causal half is not left out."""
    return 4 * case.all_tokens * case.tokens * shape.attention


def forward_flops(shape: Shape, case: Case) -> float:
    """Of all maps and attentions."""
    return sum(product_flops(matrix, case) for matrix in shape.matrices) + attention_flops(shape, case)


def backward_flops(shape: Shape, case: Case) -> float:
    """To the layers' inputs: as many as forward, an attention's twice; with checkpointing, forward once more.

    Those of the first layer's maps are counted, too, which autograd leaves out where nothing below is trained.
    """
    again = forward_flops(shape, case) if case.checkpointing else 0
    return again + forward_flops(shape, case) + attention_flops(shape, case)


def plain_flops(shape: Shape, case: Case) -> float:
    """Forward, backward, and the trained weights' gradients."""
    weights = sum(product_flops(matrix, case) for matrix in shape.trained)
    return forward_flops(shape, case) + backward_flops(shape, case) + weights


def row_flops(shape: Shape, case: Case) -> float:
    """Return the rows' own, in place of the weights' gradients: 2 N p d where they are dense, nothing for factors.

    An expert's two maps are computed once more, forward or backward; adapters fused with experts take one backward pass
    an objective. For other processes, all rows are made dense.
    """
    sent = {"factors", "routed"} if case.processes > 1 else set()
    total = case.rows * backward_flops(shape, case) / case.accumulation if shape.fused else 0.0
    for matrix in shape.trained:
        form = kept_as(matrix, case)
        total += product_flops(matrix, case) * ((matrix.count > 1) + (form == "dense" or form in sent))
    return total


def squared(r: int) -> int:
    """Multiplications for each column of r rows: r^2; of large Gramians, which `inner` cuts, only one half's blocks."""
    half = r // 2
    return r * r if r <= _BLOCK else squared(half) + squared(r - half) + half * (r - half)


def gramian_flops(shape: Shape, case: Case) -> float:
    """2 R^2 for each column of J; of W processes, each takes M rows of 1 / W of the columns, 2 M^2 n / W.

    Less for R > 64 (`squared`). Of factors on one process the cheaper of 2 N^2 (p + d) and 2 N p d + 2 R^2 p d; of E
    experts, to which tokens go evenly, of 2 (p + d + R) for each pair of tokens of one of them and the same.
    """
    if case.processes > 1:
        return 2 * squared(case.objectives) * shape.trainable / case.processes
    r, total = case.rows, 2.0 * squared(case.rows) * shape.vectors
    for matrix in shape.trained:
        p, d, form = matrix.outputs, matrix.inputs, kept_as(matrix, case)
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
    """2 R^2 for each number of the entries that were looked up, in chunks; and of those with a tied head's factors."""
    if table.head is not None and kept_as(table.head, case) == "dense":
        return 0.0  # They are in the head's.
    step = max(1, _CHUNK // table.width)
    used = min(case.tokens if table.positions else case.all_tokens, table.entries)
    cross = 0 if table.head is None else 2 * case.all_tokens**2 * table.width
    return 2.0 * squared(case.rows) * math.ceil(used / step) * step * table.width + cross


def update_flops(shape: Shape, case: Case) -> float:
    """J^T w: 2 for each number of dense rows, 2 N p d of factors. Each process weighs 1 / W of groups' sums."""
    total = 2.0 * case.rows * shape.vectors
    for matrix in shape.trained:
        dense = kept_as(matrix, case) == "dense" or (case.processes > 1 and case.groups is not None)
        total += 2 * case.rows * matrix.elements if dense else product_flops(matrix, case)
    return total / case.processes if case.groups is not None else total


def formed_flops(shape: Shape, case: Case) -> float:
    """Those of the Gramian and the update that multiply factors, in the layers' own dtype, as rows are formed."""
    if case.processes > 1 and case.groups is not None:
        return 0.0
    update = sum(product_flops(matrix, case) for matrix in shape.trained if kept_as(matrix, case) != "dense")
    if case.processes > 1:
        return update
    return update + sum(product_flops(matrix, case) for matrix in shape.trained if _formed(matrix, case))


def _formed(matrix: Matrix, case: Case) -> bool:
    """Whether factors are multiplied out for the Gramian, as `OuterRows.gramian` and `RoutedRows.gramian` decide."""
    if matrix.count > 1:
        forming = matrix.tokens(case.batch * case.tokens) / matrix.count * matrix.outputs * matrix.inputs
        return kept_as(matrix, case) == "routed" and pairs_cost_more(matrix, case, forming)
    r, s, p, d = case.rows, case.tokens, matrix.outputs, matrix.inputs
    return kept_as(matrix, case) == "factors" and r * s * (p + d) > (2 + r / s) * p * d


def step_flops(shape: Shape, case: Case) -> float:
    """Forward, backward, rows, Gramian and update; or, in two passes, a plain step's backward instead of that update.

    The second pass starts from a new forward pass, unless there is one micro-batch only, whose graph is kept.
    """
    first = (
        forward_flops(shape, case) + backward_flops(shape, case) + row_flops(shape, case) + gramian_flops(shape, case)
    )
    if not case.two_pass:
        return first + update_flops(shape, case)
    spared = forward_flops(shape, case) if case.accumulation == 1 else 0
    return first + plain_flops(shape, case) - spared
