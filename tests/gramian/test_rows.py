"""The representations of rows, each compared with the dense matrix that it represents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_jd.gramian import rows as representations
from hf_jd.gramian._rules.experts import RoutedRows
from hf_jd.gramian.layouts import MAJOR, MINOR, Segments
from hf_jd.gramian.rows import CHUNK, DenseRows, OuterRows, Rows, SparseRows, inner
from tests.gramian.oracle import EXACT, relative

OBJECTIVES, SHAPE = 4, torch.Size((6, 5))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(seed: int = 0) -> Rows:
    return DenseRows(normal(OBJECTIVES, 30, seed=seed), SHAPE)


def transposed(seed: int = 0) -> Rows:
    return DenseRows(normal(OBJECTIVES, 30, seed=seed), SHAPE, transposed=True)


def outer(seed: int = 0) -> Rows:
    return OuterRows(normal(OBJECTIVES, 3, 6, seed=seed), normal(OBJECTIVES, 3, 5, seed=seed + 1), SHAPE)


def sparse(seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    owners, ids = (torch.randint(n, (9,), generator=generator) for n in (OBJECTIVES, SHAPE[0]))
    return SparseRows(owners, ids, normal(9, 5, seed=seed), OBJECTIVES, SHAPE)


def tied(seed: int = 0) -> Rows:
    return outer(seed) + sparse(seed)


KINDS = [dense, transposed, outer, sparse, tied]


def is_matrix(rows: Rows, matrix: Tensor) -> bool:
    weights = normal(len(matrix), seed=9)
    return (
        rows.objectives == len(matrix)
        and relative(rows.dense(), matrix) < EXACT
        and relative(rows.gramian(), matrix @ matrix.T) < EXACT
        and rows.weighted_sum(weights).shape == rows.shape
        and rows.weighted_sum(weights).is_contiguous()
        and relative(rows.weighted_sum(weights).flatten(), weights @ matrix) < EXACT
    )


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind):
    rows = kind()
    assert is_matrix(rows, rows.dense())
    assert is_matrix(rows.select(torch.tensor([3, 0])), rows.dense()[[3, 0]])
    factors = normal(OBJECTIVES, seed=5)
    assert is_matrix(rows.scaled(factors), rows.dense() * factors[:, None])


@pytest.mark.parametrize("one, two", list(itertools.product(KINDS, KINDS)))
def test_sums_and_stacks(one, two):
    a, b = one(seed=1), two(seed=4)
    assert is_matrix(a + b, a.dense() + b.dense())
    assert is_matrix(a.below(b), torch.cat([a.dense(), b.dense()]))


@pytest.mark.parametrize("materialise", [True, False])
@pytest.mark.parametrize("shape", [(70, 3), (3, 70), (70, 65), (5, 4)], ids=str)
def test_compact_chooses_the_representation(shape: tuple[int, int], materialise: bool):
    """Narrow products are formed transposed; with many tokens, rows are smaller than factors."""
    factors = OuterRows(normal(2, 90, shape[0]), normal(2, 90, shape[1], seed=1), torch.Size(shape))
    compact = factors.compact(torch.float64, materialise)
    if materialise:
        assert isinstance(compact, DenseRows)
        assert compact.transposed == (shape in ((70, 3), (5, 4)))
    assert is_matrix(compact, factors.dense())


@pytest.mark.parametrize("count", [31, 33, 70])
@pytest.mark.parametrize("columns", [50, CHUNK + 3])
def test_symmetric_blocks(count: int, columns: int):
    rows = normal(count, columns)
    assert relative(inner(rows, rows), rows @ rows.T) < EXACT


def routed(tokens: int, seed: int = 0, experts: int = 3, p: int = 4, d: int = 5) -> tuple[RoutedRows, Tensor]:
    """Return rows of experts, one of which sees no token, and the dense matrix."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(experts - 1, (tokens,), generator=generator).sort().values
    owners = torch.randint(OBJECTIVES - 1, (tokens,), generator=generator)
    g, x = normal(tokens, p, seed=seed), normal(tokens, d, seed=seed + 1)
    matrix = torch.zeros(OBJECTIVES, experts, p, d, dtype=torch.float64)
    for t in range(tokens):
        matrix[owners[t], expert[t]] += g[t].outer(x[t])
    lengths = torch.bincount(expert, minlength=experts).tolist()
    return RoutedRows(g, x, owners, lengths, OBJECTIVES), matrix.flatten(1)


@pytest.mark.parametrize("tokens", [5, 60])
def test_routed_rows(tokens: int):
    """Few tokens: ghost form; many tokens: rows, one expert at a time; owners in any order."""
    rows, matrix = routed(tokens)
    assert is_matrix(rows, matrix)
    compact = rows.compact(torch.float64, materialise=True)
    assert isinstance(compact, DenseRows) == (tokens > 5)
    assert is_matrix(compact, matrix)
    assert rows.compact(torch.float64, materialise=False) is rows
    index = torch.tensor([2, 0])
    assert is_matrix(rows.select(index), matrix[index])
    other, theirs = routed(tokens + 1, seed=7)
    assert is_matrix(rows + other, matrix + theirs)
    assert is_matrix(rows.below(other), torch.cat([matrix, theirs]))
    assert is_matrix(compact.below(other), torch.cat([matrix, theirs]))


@pytest.mark.parametrize("kind", [*KINDS, lambda: routed(60)[0]], ids=lambda kind: kind.__name__)
def test_columns(kind):
    """Columns may begin and end within an entry of the first dimension."""
    rows = kind()
    for start, stop in itertools.combinations(range(rows.shape.numel() + 1), 2):
        actual = rows.columns(start, stop)
        assert actual.shape == (OBJECTIVES, stop - start)
        assert torch.equal(actual, rows.dense()[:, start:stop]) or relative(actual, rows.dense()[:, start:stop]) < EXACT


@pytest.mark.parametrize("ids", ["sorted", "mixed", "uneven", "none", "one", "by token"])
@pytest.mark.parametrize("p, d, tokens", [(2, 3, 50), (40, 30, 1), (40, 30, 6), (3, 40, 6)])
def test_outer_products_of_segments(ids: str, p: int, d: int, tokens: int):
    """Summing rows of instances, runs of neighbours, or sorted entries gives the same rows."""
    n = 8
    segments = {
        "sorted": torch.arange(n) // 2,
        "mixed": torch.arange(n) % OBJECTIVES,
        "uneven": torch.tensor([0, 2, 2, 0, 2, 3, 0, 2]),
        "none": torch.tensor([-1, 2, -1, 0, 2, 1, 0, -1]),
        "one": torch.zeros(n, dtype=torch.long),
        "by token": torch.randint(-1, OBJECTIVES, (n, tokens), generator=torch.Generator().manual_seed(0)),
    }[ids]
    by_token = segments if segments.dim() == 2 else segments[:, None].expand(n, tokens)
    grouped = Segments(OBJECTIVES, segments)
    g, x, other = normal(n, tokens, p), normal(n, tokens, d, seed=1), normal(n, tokens, d, seed=2)
    member = torch.nn.functional.one_hot(by_token + 1, OBJECTIVES + 1)[..., 1:].double()
    for value in (x, x, other, x):  # Sorts an input that layers share only once.
        expected = torch.einsum("ntk,ntp,ntd->kpd", member, g, value)
        assert relative(grouped.outer(g, value), expected) < EXACT


def test_blocks_of_instances_repeated():
    """[k * B] leading entries, whose objectives are blocks of instances."""
    blocks = Segments(2, block=3)
    expected = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(blocks.repeated(MINOR, 2, torch.device("cpu")).token_ids((12, 1))[:, 0], expected.repeat(2))
    major = blocks.repeated(MAJOR, 2, torch.device("cpu")).token_ids((12, 1))[:, 0]
    assert torch.equal(major, expected.repeat_interleave(2))


def test_only_the_number_of_columns_makes_a_product_narrow():
    assert representations.narrow(torch.Size((128, 8)))
    assert not representations.narrow(torch.Size((8, 128)))
    assert not representations.narrow(torch.Size((256, 128)))
