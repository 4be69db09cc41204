"""The memory of a process: rows, and everything that a plain step needs, too. See `cases.py` for the symbols."""

from __future__ import annotations

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.shapes import Matrix, Shape, Table

_READ = 64  # multiplications in the time it takes to write a row's number and read it twice (`gramian._rules.experts`)
_ID_BYTES = 16  # bytes of an entry's owner and token, int64 each


def storage(matrix: Matrix, case: Case) -> str:
    """Say how the engine stores the rows of a map: "dense", or as their factors, input and output gradient.

    "factors" (`OuterRows.compact`), for R = batch instances of S = T tokens in a backward pass: if
    R S (p + d) < 2 p d, so that the ghost form is cheaper, too, or, if rows need not be formed, S (p + d) < p d.
    "routed", for E experts, unless (`RoutedRows.compact`) N^2 / E (p + d) for pairs of tokens costs more than rows.
    """
    if matrix.count > 1:
        return "dense" if case.materialise and pairs_cost_more(matrix, case) else "routed"
    p, d, s = matrix.outputs, matrix.inputs, case.tokens
    smaller = case.batch * s * (p + d) < 2 * p * d or (not case.materialise and s * (p + d) < p * d)
    return "factors" if case.groups is None and smaller else "dense"


def pairs_cost_more(matrix: Matrix, case: Case, forming: float = 0.0) -> bool:
    """Return whether an expert's Gramian costs more from token pairs than from rows, including `forming` them."""
    tokens, rows = matrix.tokens(case.batch * case.tokens) / matrix.count, case.groups or case.batch
    p, d = matrix.outputs, matrix.inputs
    return tokens**2 * (p + d) > forming + rows * (rows + _READ) * p * d


def row_bytes(shape: Shape, case: Case) -> float:
    """Compute the bytes of the rows of an update on one process.

    R p d b for dense rows, N (p + d) numbers for factors, and for a table the entries looked up, as if no objective had
    a token twice.
    """
    total: float = case.rows * shape.vectors * case.trained_bytes
    for matrix in shape.trained:
        p, d, form = matrix.outputs, matrix.inputs, storage(matrix, case)
        if form == "dense":
            total += case.rows * matrix.elements * case.trained_bytes
        else:
            tokens = matrix.tokens(case.all_tokens)
            total += tokens * (p + d) * case.number_bytes + (tokens * _ID_BYTES / 2 if form == "routed" else 0)
    for table in shape.tables:
        if table.head is None or storage(table.head, case) != "dense":  # a head's dense rows include its table's
            total += looked_up(table, case) * (table.width * case.trained_bytes + _ID_BYTES)
    return total


def looked_up(table: Table, case: Case) -> int:
    """Count the entries in a table's rows: each objective's tokens, or positions, assuming they are all different."""
    if table.positions:
        return case.rows * min(case.tokens, table.entries)
    return min(case.all_tokens, case.rows * table.entries)


def memory(shape: Shape, case: Case) -> dict[str, float]:
    """Compute the bytes that a process needs besides rows, with Adam's two float32 numbers per trained one.

    Under ZeRO 3, trained weights are whole while rows are measured. Activations: 34 N h bytes per block in 16 bits
    (Korthikanti et al., arXiv 2205.05198, equation 2, for attention that stores no T x T); with checkpointing 2 N h per
    block, plus one whole block. The head's outputs and their gradient: float32.
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
