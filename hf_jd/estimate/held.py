"""Bytes that a process holds: rows, and what a plain step needs, too. The letters are those of `cases.py`."""

from __future__ import annotations

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.shapes import Matrix, Shape

_ID_BYTES = 16  # of an embedding's owner and token, int64 each


def as_factors(matrix: Matrix, case: Case) -> bool:
    """Whether rows of a map stay factors, as `OuterRows.settled` decides.

    Of S = T tokens for each of R = batch instances: R S (p + d) < 2 p d, where the ghost form is cheaper too; or
    S (p + d) < p d, where rows need not be formed.
    """
    if case.groups is not None or matrix.routed:
        return False
    p, d, s = matrix.outputs, matrix.inputs, case.tokens
    return case.batch * s * (p + d) < 2 * p * d or (not case.materialise and s * (p + d) < p * d)


def row_bytes(shape: Shape, case: Case) -> int:
    """Bytes of the rows of an update on one process: R n b, factors R T (p + d), and of a table only what was looked up.

    A table's rows are counted as if no objective met a token twice.
    """
    total = case.rows * shape.vectors * case.trained_bytes
    factors = False
    for matrix in shape.trained:
        if as_factors(matrix, case):
            factors = True
            total += case.rows * case.tokens * (matrix.outputs + matrix.inputs) * case.number_bytes
        else:
            total += case.rows * matrix.elements * case.trained_bytes
    for table in shape.tables:
        if not table.tied or factors:  # Dense rows of a tied head have the table's in them.
            entries = min(case.all_tokens, case.rows * table.entries)
            total += entries * (table.width * case.trained_bytes + _ID_BYTES)
    return total


def memory(shape: Shape, case: Case) -> dict[str, float]:
    """Bytes that a process needs besides rows, with Adam's two numbers (float32) for each trained one.

    Activations: 34 N h bytes a block in 16 bits (Korthikanti et al., arXiv 2205.05198, equation 2, of attention that
    keeps no T x T); with checkpointing 2 N h a block, and one block's. The head's outputs and their gradient: float32.
    """
    kind, w, n = PARALLELISMS[case.parallelism], case.processes, shape.trainable
    frozen = (shape.parameters - n) * case.number_bytes
    tokens, size = case.batch * case.tokens, case.number_bytes / 2
    block = 34 * tokens * shape.hidden * size
    blocks = shape.layers * 2 * tokens * shape.hidden * size + block if case.checkpointing else shape.layers * block
    return {
        "weights": (frozen + n * case.trained_bytes) / (w if kind.weights else 1),
        "gradients": n * case.trained_bytes / (w if kind.gradients else 1),
        "optimizer": 8 * n / (w if kind.optimizer else 1),
        "activations": blocks + 8 * tokens * shape.vocabulary,
    }
