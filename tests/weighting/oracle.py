"""Independent answers: enumeration of active sets in rational arithmetic, for Jacobians with exact float entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from math import isqrt

from torch import Tensor

Vector = list[Fraction]
Matrix = list[Vector]


def rational(tensor: Tensor) -> Matrix:
    return [[Fraction(x) for x in row] for row in tensor.tolist()]


def rational_gramian(jacobian: Tensor) -> Matrix:
    rows = rational(jacobian)
    return [[dot(a, b) for b in rows] for a in rows]


def dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def times(matrix: Matrix, vector: Sequence[Fraction]) -> Vector:
    return [dot(row, vector) for row in matrix]


def solve(matrix: Matrix, right: Vector) -> Vector | None:
    """Solve a linear system by Gauss-Jordan elimination; None for a singular matrix."""
    rows = [[*row, r] for row, r in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = next((k for k in range(i, n) if rows[k][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(n):
            if k != i and rows[k][i]:
                factor = rows[k][i]
                rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def subsets(m: int) -> Iterator[tuple[int, ...]]:
    for size in range(m + 1):
        yield from combinations(range(m), size)


def projections(gramian: Matrix, target: Vector) -> list[Vector]:
    """Find all basic solutions v of projecting J^T u onto the dual cone: the vertices of the set of its weights."""
    m, solutions = len(gramian), []
    slopes = times(gramian, target)
    for support in subsets(m):
        part = solve([[gramian[i][j] for j in support] for i in support], [-slopes[i] for i in support])
        if part is None or any(x < 0 for x in part):
            continue
        weights = list(target)
        for i, x in zip(support, part, strict=True):
            weights[i] += x
        if all(s >= 0 for s in times(gramian, weights)):
            solutions.append(weights)
    assert solutions, "every closed convex cone has a projection"
    return solutions


def shortest_in_hull(gramian: Matrix) -> Vector:
    """Find a lambda on the simplex with the smallest |J^T lambda|."""
    m = len(gramian)
    for support in subsets(m):
        if not support:
            continue
        bordered = [[*(gramian[i][j] for j in support), Fraction(-1)] for i in support]
        bordered.append([*(Fraction(1) for _ in support), Fraction(0)])
        part = solve(bordered, [*(Fraction(0) for _ in support), Fraction(1)])
        if part is None or any(x < 0 for x in part[:-1]):
            continue
        weights = [Fraction(0)] * m
        for i, x in zip(support, part, strict=False):
            weights[i] = x
        if all(s >= part[-1] for s in times(gramian, weights)):
            return weights
    raise AssertionError("every hull has a shortest vector")


def length(gramian: Matrix, weights: Sequence[Fraction]) -> float:
    """Compute |J^T w|, with an exact square."""
    square = dot(weights, times(gramian, weights))
    return isqrt(int(square * 2**400)) / 2**200


def update_error(gramian: Matrix, weights: Tensor, exact: Vector) -> float:
    """Compute |J^T (w - w*)| / |J^T w*|; if J^T w* = 0, relative to the longest w*_i g_i instead."""
    difference = [Fraction(a) - b for a, b in zip(weights.tolist(), exact, strict=True)]
    size = length(gramian, exact) or max(float(w) * float(gramian[i][i]) ** 0.5 for i, w in enumerate(exact))
    return length(gramian, difference) / size if size else length(gramian, difference)
