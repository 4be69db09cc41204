"""Solve many non-negative least squares problems with one low-rank matrix together.

Where most rows depend on others, exchanges of wrong rows wander between many supports that are nearly right. Operator
splitting heads for the right one, at the cost of one matrix product per step for all problems. Supports that hardly
change any more are tried: each is right, or wrong in a few rows, which exchanges correct.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import EPSILON
from hf_jd.weighting._solvers.supports import Pivoted, Problems, exchange

_RELAXATION = 1.95  # of the steps: they converge below 2, and longer steps mean fewer of them
_PENALTIES = (
    0.03,
    0.1,
    0.01,
    3e-3,
    1e-3,
    1e-4,
    1e-5,
    1e-6,
)  # the likeliest first; a dual cone of {0} needs the least, if noise hides the null space
_ENOUGH = 1 / 2  # share of solved problems from which no other penalty is tried
_SAMPLE, _SAMPLE_STEPS = 8, (200, 800)  # problems to choose the penalty on; steps, and more if needed
_STEPS = (75, 25, 25, 25, 50, 50, 50, 100, 100, 200, 200, 400, 400, 800)  # between checks of the supports
_SETTLED = 1 / 64  # a support is tried if it has changed by at most this share of the rows since the last check
_AHEAD = 1  # how many times as many steps to look ahead
_INDEPENDENT = 1e-6  # length of e_i's projection onto the null space of C up to which row i depends on no others
_ROUNDING = 1e-12  # of weights, relative to the largest one


def solve_low_rank(cosines: Tensor, targets: Tensor) -> Tensor:
    """Find z >= 0 with s = C (u + z) >= 0 and s^T z = 0, for each row u of `targets`.

    Args:
        cosines: C, [m, m], positive semi-definite, of unit diagonal.
        targets: u, [k, m], 0 or more.

    Returns:
        z, [k, m], of smallest |u + z| if there are several; rows that did not settle hold NaN.
    """
    problems = Problems(cosines, targets)
    image = _MirrorImage.of(problems)
    if image is None:
        return _settle(*_choose([problems]))
    view, trial = _choose([problems, image.problems])
    solution = _settle(view, trial)
    return solution if view is problems else image.reflected(solution, targets)


def _settle(problems: Problems, trial: _Trial) -> Tensor:
    """Take steps and try supports that have settled; return z, [k, m], with NaN where no support was right."""
    targets, step = problems.targets, trial.step
    solution = torch.full_like(targets, torch.nan)
    left = torch.arange(len(targets), device=targets.device)
    state, last = targets.to(step) + trial.moved, targets > 0
    tried = torch.zeros_like(last)
    for steps in _STEPS:
        if not len(left):
            break
        before, state = state, _split(step, targets[left], state, steps)
        # Slow rows move steadily: look ahead to where they go.
        positive = state + _AHEAD * (state - before) > targets[left]
        changed = (positive ^ last).sum(dim=1)
        ready = (changed <= max(1, _SETTLED * len(step))) & (positive != tried).any(dim=1)
        if ready.any():
            solution[left[ready]] = exchange(problems.select(left[ready]), trial.pivoted, positive[ready])
            tried[ready] = positive[ready]
        unsolved = solution[left, 0].isnan()
        left, state, last, tried = left[unsolved], state[unsolved], positive[unsolved], tried[unsolved]
    return solution


class _MirrorImage(NamedTuple):
    """The mirror image, in the null space of C, of problems with one positive u_i each.

    If the dual cone is {0}, C v = 0, so v = N c for an orthonormal basis N [m, f] of the null space. The smallest
    v >= u is a multiple of N times the projection of row n_i onto the cone {c : N c >= 0}: the same problem again, but
    one whose solutions are never large.

    Attributes:
        null: N, [m, f].
        rows: N, of rows of unit length, [m, f].
        problems: The problems with these rows and u = e_i.
    """

    null: Tensor
    rows: Tensor
    problems: Problems

    @classmethod
    def of(cls, problems: Problems) -> _MirrorImage | None:
        """Return the mirror image; None if there is none, or if the dual cone isn't {0}."""
        if not ((problems.targets > 0).sum(dim=1) == 1).all():
            return None
        values, vectors = torch.linalg.eigh(problems.cosines)
        null = vectors[:, values <= values[-1] * len(values) * EPSILON]
        lengths = null.norm(dim=1, keepdim=True)
        if not lengths.amin() > _INDEPENDENT:  # C v = 0 then means v_i = 0
            return None
        rows = null / lengths
        ones = (problems.targets > 0).to(null)
        return cls(null, rows, Problems(rows @ rows.T, ones))

    def reflected(self, corrections: Tensor, targets: Tensor) -> Tensor:
        """Return z for the u in `targets`, from the image's z, [k, m]; NaN where the dual cone isn't {0}."""
        ones = self.problems.targets
        weights = (ones + corrections) @ self.rows @ self.null.T
        scale = targets.sum(dim=1) / (weights * ones).sum(dim=1)
        reflected = (weights * scale[:, None] - targets) * (1 - ones)
        solved = (reflected >= -_ROUNDING * reflected.amax(dim=1, keepdim=True)).all(dim=1) & (scale > 0)
        return torch.where(solved[:, None], reflected.clamp(min=0), torch.nan)


def _choose(views: list[Problems]) -> tuple[Problems, _Trial]:
    """Return the view, and the penalty, that solve most of a sample of the problems."""
    options, results = [(view, penalty) for penalty in _PENALTIES for view in views], []
    for steps in _SAMPLE_STEPS:
        results = []
        for view, penalty in options:
            results.append((view, _try_penalty(view, penalty, steps)))
            if results[-1][1].solved >= _ENOUGH:
                return results[-1]
        results.sort(key=lambda result: -result[1].solved)
        options = [(view, trial.penalty) for view, trial in results]  # With more steps, the best of few is tried first.
    return results[0]


class _Trial(NamedTuple):
    """A penalty p, its step p (C + p)^-1 [m, m], and averages over a sample.

    Attributes:
        penalty: p.
        step: In single precision: steps only have to find supports, which `exchange` verifies.
        pivoted: C, pivoted on the support of the sum of all u.
        solved: The share of the problems that are solved.
        moved: The distance of the states from u, [m].
    """

    penalty: float
    step: Tensor
    pivoted: Pivoted
    solved: float
    moved: Tensor


def _try_penalty(problems: Problems, penalty: float, steps: int) -> _Trial:
    count, device = len(problems.targets), problems.targets.device
    sample = problems.select(torch.arange(0, count, -(-count // _SAMPLE), device=device))
    shifted = problems.cosines.clone()
    shifted.diagonal().add_(penalty)
    step = (penalty * torch.cholesky_inverse(torch.linalg.cholesky(shifted))).float()
    targets = torch.cat([sample.targets, problems.targets.sum(dim=0, keepdim=True)])
    moved = _split(step, targets, targets.float(), steps) - targets
    pivoted = Pivoted.on(moved[-1] > 0, problems)
    solved = exchange(sample, pivoted, moved[:-1] > 0)[:, 0].isfinite().double().mean().item()
    return _Trial(penalty, step, pivoted, solved, moved[:-1].mean(dim=0).float())


def _split(step: Tensor, targets: Tensor, state: Tensor, steps: int) -> Tensor:
    """Take Douglas-Rachford steps: t + r (p (C + p)^-1 (2 v - t) - v), v = max(u, t); t, u are [k, m]."""
    targets, state = targets.to(step), state.clone()
    for _ in range(steps):
        weights = torch.maximum(targets, state)
        reflected = torch.sub(weights, state, alpha=0.5)
        state.sub_(weights, alpha=_RELAXATION).addmm_(reflected, step, alpha=2 * _RELAXATION)
    return state
