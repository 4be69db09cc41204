"""Floating-point operations of an update on one process. The letters are those of `cases.py`.

They are counted as `torch.utils.flop_counter` does, 2 for a multiplication and an addition, and only those of products.
"""

from __future__ import annotations

import math

from hf_jd.estimate.cases import Case
from hf_jd.estimate.held import as_factors
from hf_jd.estimate.shapes import Matrix, Shape

_CHUNK = 65_536  # columns that the engine multiplies at once (`hf_jd.gramian.rows`)


def _product(matrix: Matrix, tokens: float) -> float:
    """2 N p d: a map's forward pass, its input's gradient, or its weight's (Kaplan et al., arXiv 2001.08361, 2.1)."""
    return 2 * tokens * matrix.share * matrix.elements


def forward_flops(shape: Shape, case: Case) -> float:
    """2 N p d for each map, and for each attention 4 N T h of its two products, of h the width of all heads."""
    maps = sum(_product(matrix, case.all_tokens) for matrix in shape.matrices)
    return maps + 4 * case.all_tokens * case.tokens * shape.attention * shape.layers


def weight_flops(shape: Shape, case: Case) -> float:
    """2 N p d for each trained map. Rows take these operations too, in place of the weights' gradients."""
    return sum(_product(matrix, case.all_tokens) for matrix in shape.trained)


def plain_flops(shape: Shape, case: Case) -> float:
    """Forward; the inputs' gradients, which cost what the forward pass costs (an attention's twice); the weights'."""
    forward = forward_flops(shape, case)
    attention = 4 * case.all_tokens * case.tokens * shape.attention * shape.layers
    again = forward if case.checkpointing else 0
    return forward + again + forward + attention + weight_flops(shape, case)


def gramian_flops(shape: Shape, case: Case) -> float:
    """2 R^2 for each column of J; of W processes, each takes M rows of 1 / W of the columns, 2 M^2 n / W.

    Of factors on one process the cheaper of 2 R^2 T^2 (p + d) and 2 R T p d + 2 R^2 p d, and R = m.
    """
    if case.processes > 1:
        formed = sum(_product(matrix, case.all_tokens) for matrix in shape.trained if as_factors(matrix, case))
        return 2 * case.objectives**2 * shape.trainable / case.processes + formed
    r, s = case.rows, case.tokens
    total = 2.0 * r * r * shape.vectors
    for matrix in shape.trained:
        p, d = matrix.outputs, matrix.inputs
        if not as_factors(matrix, case):
            total += 2 * r * r * matrix.elements
        elif r * s * (p + d) <= (2 + r / s) * p * d:
            total += 2 * (r * s) ** 2 * (p + d)
        else:
            total += _product(matrix, case.all_tokens) + 2 * r * r * p * d
    return total + sum(_table_flops(shape, case))


def _table_flops(shape: Shape, case: Case) -> list[float]:
    """2 R^2 for each number of the entries that were looked up, in chunks; and a tied head's product with them."""
    found = []
    for table in shape.tables:
        tied = next((m for m in shape.trained if table.tied and m.outputs == table.entries), None)
        if tied is not None and not as_factors(tied, case):
            continue  # The table's rows are in the head's.
        step = max(1, _CHUNK // table.width)
        used = min(case.all_tokens, table.entries)
        found.append(2.0 * case.rows**2 * math.ceil(used / step) * step * table.width)
        if tied is not None:
            found.append(2.0 * case.all_tokens**2 * table.width)
    return found


def update_flops(shape: Shape, case: Case) -> float:
    """2 for each number that is held of J: J^T w. Factors take 2 N p d; groups' sums are weighed by 1 / W each."""
    total = 0.0
    for matrix in shape.trained:
        total += _product(matrix, case.all_tokens) if as_factors(matrix, case) else 2 * case.rows * matrix.elements
    total += 2 * case.rows * shape.vectors
    return total / case.processes if case.groups is not None else total


def step_flops(shape: Shape, case: Case) -> float:
    """Of one pass, a plain step's with the Gramian and the update; of two, a second backward instead of that update.

    The second pass starts from a new forward pass, unless there is one micro-batch only, whose graph is kept.
    """
    measured = plain_flops(shape, case) + gramian_flops(shape, case)
    if not case.two_pass:
        return measured + update_flops(shape, case)
    kept = forward_flops(shape, case) if case.accumulation == 1 else 0
    return measured + plain_flops(shape, case) - kept
