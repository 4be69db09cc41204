"""Solve many non-negative least squares problems with one low-rank matrix together.

Where most rows depend on others, exchanges wander between many supports that are nearly right. Operator splitting heads
for the right one, at the cost of one matrix product per step for all problems. Once a support stops changing, it is
tried: it is right, or wrong in a few rows, which exchanges correct, and its Cholesky factor gives the exact solution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import EPSILON

_RELAXATION = 1.95  # of the steps: they converge below 2, and longer steps mean fewer of them
_PENALTIES = (0.03, 0.1, 0.01, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6)  # the likeliest first; a dual cone of {0} needs the least
_SAMPLE, _SAMPLE_STEPS = 8, (200, 800)  # problems to choose the penalty on; steps, and more if needed
_LOST = 4  # wrong rows per sampled problem above which the null space is tried
_BETTER = 0.8  # another penalty is better if it leaves less than this share of the wrong rows
_STEPS = (50, 25, 25, 50, 50, 100, 100, 200, 200, 400, 400, 800, 800)  # between checks of the supports
_SETTLED = 1  # a support is tried if it has changed by at most this many rows since the last check
_EXCHANGES = 4
_FEW = 1 / 64  # share of wrong rows up to which exchanges are tried
_REFINEMENTS = 20
_PRECISION = 1e-13


def solve_low_rank(cosines: Tensor, targets: Tensor, regularisation: float = 0.0) -> Tensor:
    """Finds z >= 0 with s = C (u + z) >= 0 and s^T z = 0, for each row u of `targets`.

    Args:
        cosines: C, [m, m], positive semi-definite, of unit diagonal.
        targets: u, [k, m], 0 or more.
        regularisation: Added to the diagonal to pick the solution of smallest |u + z|; refinement undoes its other
            effects. 0 if C is definite.

    Returns:
        z, [k, m]; rows that did not settle hold NaN.
    """
    problems = _Problems(cosines, targets, targets @ cosines, regularisation)
    trial = _choose_penalty(problems)
    if regularisation and trial.wrong > _LOST and ((targets > 0).sum(dim=1) == 1).all():
        solution = _solve_in_null_space(problems)
    else:
        solution = torch.full_like(targets, torch.nan)
    left = solution[:, 0].isnan().nonzero()[:, 0]
    solution[left] = _settle(problems.select(left), trial)
    return solution


def _settle(problems: _Problems, trial: _Trial) -> Tensor:
    """Takes steps and tries supports that have settled; returns z, [k, m], with NaN where no support was right."""
    targets, step = problems.targets, trial.step
    solution = torch.full_like(targets, torch.nan)
    left = torch.arange(len(targets), device=targets.device)
    state, last = targets.to(step) + trial.moved, targets > 0
    tried = torch.zeros_like(last)
    for steps in _STEPS:
        if not len(left):
            break
        state = _split(step, targets[left], state, steps)
        positive = state > targets[left]
        ready = ((positive ^ last).sum(dim=1) <= _SETTLED) & (positive != tried).any(dim=1)
        if ready.any():
            solution[left[ready]] = _exchange(problems.select(left[ready]), positive[ready])
            tried[ready] = positive[ready]
        unsolved = solution[left, 0].isnan()
        left, state, last, tried = left[unsolved], state[unsolved], positive[unsolved], tried[unsolved]
    return solution


def _solve_in_null_space(problems: _Problems) -> Tensor:
    """Solves problems with one positive u_i each, assuming the dual cone is {0}; returns z, [k, m], NaN where it isn't.

    If it is {0}, C v = 0, so v = N c for an orthonormal basis N [m, f] of the null space of C. The smallest v >= u is a
    multiple of N times the projection of row n_i onto the cone {c : N c >= 0}: the same problem again, but one whose
    solutions are never large.
    """
    values, vectors = torch.linalg.eigh(problems.cosines)
    null = vectors[:, values <= values[-1] * len(values) * EPSILON]
    if not null.shape[1]:
        return torch.full_like(problems.targets, torch.nan)
    rows = null / null.norm(dim=1, keepdim=True)
    ones = (problems.targets > 0).to(null)
    cosines = rows @ rows.T
    mirrored = _Problems(cosines, ones, ones @ cosines, problems.regularisation)
    projections = (ones + _settle(mirrored, _choose_penalty(mirrored))) @ rows
    weights = projections @ null.T
    scale = problems.targets.sum(dim=1) / (weights * ones).sum(dim=1)
    corrections = (weights * scale[:, None] - problems.targets) * (1 - ones)
    solved = (corrections >= -_PRECISION * corrections.amax(dim=1, keepdim=True)).all(dim=1) & (scale > 0)
    return torch.where(solved[:, None], corrections.clamp(min=0), torch.nan)


class _Problems(NamedTuple):
    """C [m, m], the k problems' u and C u [k, m], and the addition to the diagonal of C."""

    cosines: Tensor
    targets: Tensor
    slopes: Tensor
    regularisation: float

    def select(self, index: Tensor) -> _Problems:
        return self._replace(targets=self.targets[index], slopes=self.slopes[index])


def _choose_penalty(problems: _Problems) -> _Trial:
    """Returns the penalty that leaves the fewest wrong rows in a sample of the problems."""
    count = len(problems.targets)
    sample = problems.select(torch.arange(0, count, -(-count // _SAMPLE), device=problems.targets.device))
    penalties, trials = list(_PENALTIES), []
    for steps in _SAMPLE_STEPS:
        trials = []
        for penalty in penalties:
            trials.append(_try_penalty(sample, penalty, steps))
            if trials[-1].wrong <= 1:
                return trials[-1]
        trials.sort(key=lambda trial: trial.wrong)
        penalties = [trial.penalty for trial in trials]  # With more steps, the best of few is tried first.
    best = trials[0]
    for factor in (3, 1 / 3):
        best = _better(best, _try_penalty(sample, factor * best.penalty, _SAMPLE_STEPS[-1]))
    return best


class _Trial(NamedTuple):
    """A penalty p, its step p (C + p)^-1 [m, m], and averages over a sample.

    Attributes:
        penalty: p.
        step: In single precision: steps only have to find supports, which `_solve` verifies.
        wrong: The number of rows that prove a support wrong.
        moved: The distance of the states from u, [m].
    """

    penalty: float
    step: Tensor
    wrong: float
    moved: Tensor


def _try_penalty(sample: _Problems, penalty: float, steps: int) -> _Trial:
    shifted = sample.cosines.clone()
    shifted.diagonal().add_(sample.regularisation + penalty)
    step = (penalty * torch.cholesky_inverse(torch.linalg.cholesky(shifted))).float()
    state = _split(step, sample.targets, sample.targets.float(), steps)
    wrong = _solve(sample, state > sample.targets)[1].sum(dim=1)
    # One wrong row can make all look wrong, so high counts are cut off.
    mean = wrong.clamp(max=len(step) // 16).double().mean().item()
    return _Trial(penalty, step, mean, (state - sample.targets).mean(dim=0).float())


def _better(first: _Trial, second: _Trial) -> _Trial:
    return second if second.wrong < _BETTER * first.wrong else first


def _split(step: Tensor, targets: Tensor, state: Tensor, steps: int) -> Tensor:
    """Takes Douglas-Rachford steps: t + r (p (C + p)^-1 (2 v - t) - v), v = max(u, t); t, u are [k, m]."""
    targets, state = targets.to(step), state.clone()
    for _ in range(steps):
        weights = torch.maximum(targets, state)
        reflected = torch.sub(weights, state, alpha=0.5)
        state.sub_(weights, alpha=_RELAXATION).addmm_(reflected, step, alpha=2 * _RELAXATION)
    return state


def _exchange(problems: _Problems, positive: Tensor) -> Tensor:
    """Solves for z on the supports [k, m], exchanging wrong rows while they are few; NaN if they are many."""
    solution = torch.full_like(problems.targets, torch.nan)
    left = torch.arange(len(solution), device=solution.device)
    for _ in range(_EXCHANGES):
        candidates, wrong = _solve(problems.select(left), positive)
        count = wrong.sum(dim=1)
        solution[left[count == 0]] = candidates[count == 0]
        few = (count > 0) & (count <= max(1, _FEW * len(problems.cosines)))
        left, positive = left[few], (positive ^ wrong)[few]
        if not len(left):
            break
    return solution


def _solve(problems: _Problems, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Solves C_PP z_P = -(C u)_P for the supports P [k, m]; returns z, and the rows that prove P wrong, [k, m]."""
    cosines, targets, slopes, regularisation = problems
    first, refined = targets.clone(), targets.clone()
    for i, mask in enumerate(positive):
        support = mask.nonzero()[:, 0]
        if len(support):
            system = cosines.index_select(0, support).gather(1, support.expand(len(support), -1))
            right = system @ targets[i, support] - slopes[i, support]
            first[i, support], refined[i, support] = _solve_support(system, right, regularisation)
    gaps = first @ cosines + regularisation * first
    wrong = torch.where(positive, ~(first >= targets), gaps < -_PRECISION * first.sum(dim=1, keepdim=True))
    return (refined - targets).clamp(min=0), wrong


def _solve_support(system: Tensor, right: Tensor, regularisation: float) -> tuple[Tensor, Tensor]:
    """Solves A v = b with a larger diagonal, which gives the signs of the smallest v, then refines without it."""
    regular = system.clone()
    regular.diagonal().add_(regularisation)
    factor, _ = torch.linalg.cholesky_ex(regular)

    def solve(values: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, values[:, None], upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, 0]

    def in_range(values: Tensor) -> Tensor:
        # The smallest v has no component in A's null space; rounding errors of b there grow by 1 / regularisation.
        return values - regularisation * solve(values) if regularisation else values

    first = solve(right)
    values, last = in_range(first), first.abs().max().item()
    for _ in range(_REFINEMENTS):
        correction = in_range(solve(right - system @ values))
        size = correction.abs().max().item()
        if not size < last / 2:
            break
        values, last = values + correction, size
        if size <= _PRECISION * values.abs().max():
            break
    return first, values
