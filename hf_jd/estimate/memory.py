"""Bytes that a process holds: rows, and what a plain step needs, too. The letters are those of `cases.py`."""

from __future__ import annotations

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.shapes import Matrix, Shape, Table

_READ = 64  # multiplications in the time of writing a row's number and reading it twice (`hf_jd.gramian.routed`)
_ID_BYTES = 16  # of an embedding's owner and token, int64 each


def kept_as(matrix: Matrix, case: Case) -> str:
    """How the rows of a map are held, as the engine decides: "dense", or as their factors, input and output gradient.

    "factors", by `OuterRows.compact`, for instances of S = T tokens, R = batch of them in a backward pass: where
    R S (p + d) < 2 p d and so the ghost form is cheaper too, or, where rows need not be formed, S (p + d) < p d.
    "routed": those of E experts, unless (`RoutedRows.compact`) N^2 / E (p + d) pairs of tokens cost more than rows.
    """
    if matrix.count > 1:
        return "dense" if case.materialise and pairs_cost_more(matrix, case) else "routed"
    p, d, s = matrix.outputs, matrix.inputs, case.tokens
    smaller = case.batch * s * (p + d) < 2 * p * d or (not case.materialise and s * (p + d) < p * d)
    return "factors" if case.groups is None and smaller else "dense"


def pairs_cost_more(matrix: Matrix, case: Case, forming: float = 0.0) -> bool:
    """Whether an expert's Gramian costs more from pairs of its tokens than from rows, which take `forming`."""
    tokens, rows = matrix.tokens(case.batch * case.tokens) / matrix.count, case.groups or case.batch
    p, d = matrix.outputs, matrix.inputs
    return tokens**2 * (p + d) > forming + rows * (rows + _READ) * p * d


def row_bytes(shape: Shape, case: Case) -> float:
    """Bytes of the rows of an update on one process.

    R p d b for dense rows, N (p + d) numbers for factors, and of a table the entries that were looked up: counted as if
    no objective met a token twice.
    """
    total: float = case.rows * shape.vectors * case.trained_bytes
    for matrix in shape.trained:
        p, d, form = matrix.outputs, matrix.inputs, kept_as(matrix, case)
        if form == "dense":
            total += case.rows * matrix.elements * case.trained_bytes
        else:
            tokens = matrix.tokens(case.all_tokens)
            total += tokens * (p + d) * case.number_bytes + (tokens * _ID_BYTES / 2 if form == "routed" else 0)
    for table in shape.tables:
        if table.head is None or kept_as(table.head, case) != "dense":  # A head's dense rows have its table's in them.
            total += looked_up(table, case) * (table.width * case.trained_bytes + _ID_BYTES)
    return total


def looked_up(table: Table, case: Case) -> int:
    """Entries in the rows of a table: of an objective each token once, or each position, if these are all different."""
    if table.positions:
        return case.rows * min(case.tokens, table.entries)
    return min(case.all_tokens, case.rows * table.entries)


def memory(shape: Shape, case: Case) -> dict[str, float]:
    """Bytes that a process needs besides rows, with Adam's two numbers (float32) for each trained one.

    Under ZeRO 3, what is trained is whole while rows are measured. Activations: 34 N h bytes a block in 16 bits
    (Korthikanti et al., arXiv 2205.05198, equation 2, of attention that keeps no T x T); with checkpointing 2 N h a
    block, and one block's. The head's outputs and their gradient: float32.
    """
    kind, w, n = PARALLELISMS[case.parallelism], case.processes, shape.trainable
    measured = n * case.trained_bytes if kind.holds_trained else 0
    frozen = (shape.parameters - n) * case.number_bytes
    tokens, size = case.batch * case.tokens, case.number_bytes / 2
    block = 34 * tokens * shape.hidden * size
    blocks = shape.layers * 2 * tokens * shape.hidden * size + block if case.checkpointing else shape.layers * block
    return {
        "weights": (frozen + n * case.trained_bytes) / (w if kind.weights else 1) + measured,
        "gradients": n * case.trained_bytes / (w if kind.gradients else 1),
        "optimizer": 8 * n / (w if kind.optimizer else 1),
        "activations": blocks + 8 * tokens * shape.vocabulary,
    }
