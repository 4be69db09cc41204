"""The bytes that a process sends per update. See `cases.py` for the symbols; f = (W - 1) / W."""

from __future__ import annotations

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.shapes import Shape

_GRAMIAN_BYTES = 8  # per number of G, float64


def gathered_bytes(shape: Shape, case: Case) -> float:
    """Count gathering sharded weights for each forward and each backward pass: f of all of them each time."""
    if not PARALLELISMS[case.parallelism].weights:
        return 0.0
    return case.leaving * 2 * case.accumulation * shape.parameters * case.number_bytes


def plain_bytes(shape: Shape, case: Case) -> float:
    """Count a plain step: the weights, and the gradient's sum.

    The sum is an all-reduce, 2 f b n; if weights are sharded, a reduce-scatter, f b n. ZeRO 1 and 2, by default,
    all-reduce the gradients, 2 f b n, and gather the weights that each process's optimizer has updated, f b n. (With a
    reduce-scatter, it would be 2 f b n; Rajbhandari et al., arXiv 1910.02054, section 7.)
    """
    kind = PARALLELISMS[case.parallelism]
    times = 1 if kind.weights else 3 if kind.owns_backward else 2
    return gathered_bytes(shape, case) + times * case.leaving * shape.trainable * case.trained_bytes


def step_bytes(shape: Shape, case: Case) -> float:
    """Count an update by Jacobian descent, as in `hf_jd.distributed.rows`.

    Instances: rows f b m n, Gramian 2 f 8 M^2, the update's sum 2 f b n (with shards: f b n). Groups: rows f b K n,
    Gramian 2 f 8 K^2, the update f b n (with shards: 0). Sharded weights are gathered as in a plain step. With two
    passes, the second one sends what a plain step sends, instead of the update. ZeRO 3's measuring pass gathers trained
    weights once, and holds them.
    """
    f, trained = case.leaving, shape.trainable * case.trained_bytes
    kind = PARALLELISMS[case.parallelism]
    gathered = gathered_bytes(shape, case)
    if kind.holds_trained:
        gathered = gathered * (1 - shape.trainable / shape.parameters) + f * trained
    measured = gathered + f * case.rows * trained + 2 * f * _GRAMIAN_BYTES * case.objectives**2
    if case.two_pass:
        return measured + plain_bytes(shape, case)
    sums = 1 if case.groups is not None else 2
    return measured + (sums - kind.weights) * f * trained
