"""The self-check: proof, against autograd, that the recorded rows are right.

One identity decides. For random r in [0.5, 1.5], autograd's gradient of sum_i r_i loss_i must equal sum_i r_i row_i, for
every trainable parameter. It sees wrong rules, wrong maps from rows to objectives, uses that no tap met, and instances
that mix. Cheaper identities do not: with as many tokens as instances, the rows of a relative-position table add up to
the gradient and are still wrong.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_jd.gramian.plan import Plan
from hf_jd.gramian.recording import Recording

# How far apart the two sides may be: relative to the parameter's own gradient, and relative to the typical gradient of
# the model, below which a parameter's gradient is rounding noise (a bias that softmax cancels) and proves nothing.
TOLERANCE = {torch.float64: (1e-5, 1e-10), torch.float32: (5e-3, 1e-6)}
HALF_TOLERANCE = (1e-1, 1e-2)


class Checker:
    """Says which rows still need a proof, and which are wrong.

    Args:
        plan: The engine's decisions.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._proved: set[tuple] = set()
        self._vacuous: dict[tuple, int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def pending(self, recording: Recording) -> bool:
        """Whether something was met in a way that no check has proved: a parameter, a layout, a rank, a mode.

        A gradient of zero proves nothing (lora_A at its start, where lora_B is zero): it is looked at again after 1, 2,
        4, ... such steps.
        """
        pending = False
        for entry in self._entries(recording):
            if entry in self._proved:
                continue
            seen = self._vacuous.get(entry, 0)
            if seen:
                self._vacuous[entry] = seen + 1
            pending = pending or (seen & (seen - 1)) == 0
        return pending

    def probe(self, losses: Tensor) -> Tensor:
        """Random weights r in [0.5, 1.5], shaped like the losses; from a generator of the checker's own."""
        r = torch.rand(losses.shape, generator=self._generator, dtype=torch.float64) + 0.5
        return r.to(losses)

    def wrong(self, recording: Recording, expected: Mapping[nn.Parameter, Tensor | None]) -> set[nn.Parameter]:
        """The parameters whose rows, weighted by the probe, are not autograd's gradient."""
        typical = _typical(expected.values())
        found = set()
        for parameter, gradient in expected.items():
            if parameter not in recording.probed or parameter in recording.unmapped:
                continue
            relative, noise = _tolerance(recording, parameter)
            ours = recording.probed[parameter]
            theirs = torch.zeros_like(parameter) if gradient is None else gradient
            theirs = theirs.to_dense() if theirs.is_sparse else theirs
            scale = max(float(ours.norm()), float(theirs.norm()))
            error = float((ours - theirs.to(ours.dtype)).norm())
            # Written so that a NaN is not called wrong: non-finite losses are the caller's to see.
            if error > relative * scale + noise * typical * math.sqrt(parameter.numel()):
                found.add(parameter)
        return found

    def approve(self, recording: Recording, expected: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Remembers what was proved, and what had too small a gradient to be."""
        typical = _typical(expected.values())
        for entry in self._entries(recording):
            gradient = expected.get(entry[0])
            relative, noise = _tolerance(recording, entry[0])
            size = 0.0 if gradient is None else float(gradient.norm()) / math.sqrt(gradient.numel())
            if size * relative > noise * typical:
                self._proved.add(entry)
            elif entry not in self._proved:
                self._vacuous.setdefault(entry, 1)

    def diagnose(
        self,
        recording: Recording,
        suspects: set[nn.Parameter],
        lost: set[nn.Parameter],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Tells a model that mixes instances from parameters that only need another tier.

        Where instances mix, everything before that point is wrong in every layout and by every method, and everything
        after it is right. Raises ValueError that names the place.
        """
        forward = list(reversed(recording.order))
        failing = {site.module for p in lost for site in recording.sites.get(p, ())}
        if not failing or all(isinstance(module, nn.Embedding) for module in failing):
            return
        last = max(i for i, module in enumerate(forward) if module in failing)
        before = {p for p, sites in recording.sites.items() if any(s.module in forward[: last + 1] for s in sites)}
        if before - lost:
            return
        after = forward[last + 1] if last + 1 < len(forward) else None
        here = _module_name(forward[last], recording, names)
        place = f"after {here}" + (
            f" and before {_module_name(after, recording, names)}"
            if after is not None
            else ", in the last layers or the loss"
        )
        raise ValueError(
            f"instances of the batch mix {place}: a loss depends on other instances than its own, so it has no row of its "
            "own. Usual causes: BatchNorm in training mode (use GroupNorm, or .eval()), a balancing loss over the batch "
            "or in-batch negatives inside the losses (take them out of the per-instance losses), statistics over the "
            "batch. To take the losses as they are, differentiate them one by one: Engine(..., batch_dim=None)."
        )

    def _entries(self, recording: Recording) -> Iterable[tuple]:
        for parameter, sites in recording.sites.items():
            if parameter not in self._plan.individual and parameter not in recording.unmapped:
                for site, layout in sites.items():
                    yield parameter, site, layout, site.module.training


def _tolerance(recording: Recording, parameter: nn.Parameter) -> tuple[float, float]:
    dtypes = (parameter.dtype, recording.dtypes[parameter])
    return max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)


def _typical(gradients: Iterable[Tensor | None]) -> float:
    """Root mean square over the elements of all gradients."""
    square, count = 0.0, 1
    for gradient in gradients:
        if gradient is not None:
            square += float(gradient.norm()) ** 2
            count += gradient.numel()
    return math.sqrt(square / count)


def _module_name(module: nn.Module, recording: Recording, names: Mapping[nn.Parameter, str]) -> str:
    for parameter, sites in recording.sites.items():
        if any(site.module is module for site in sites):
            return f"{names[parameter].rpartition('.')[0] or 'the model'} ({type(module).__name__})"
    return type(module).__name__
