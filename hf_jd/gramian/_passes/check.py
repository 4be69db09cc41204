"""The self-check: verify the recorded rows against autograd.

One identity decides. For random r, autograd's gradient of sum_i r_i loss_i must equal sum_i r_i row_i, for every
trainable parameter. This catches wrong rules, wrong maps from rows to objectives, uses without a tap, and instances
that mix. Cheaper identities do not: with as many tokens as instances, the rows of a relative-position table can add up
to the gradient and still be wrong.

Each r_i is a power of two. A backward is linear in its start, and scaling by a power of two commutes with every
rounding: until gradients of several instances are added up, the backward of r_i loss_i equals r_i times the backward of
loss_i, bit for bit, through any number of layers in bfloat16, TF32 or 4 bits. Rounding differs only where a parameter's
gradient is formed, so only the precision of its own layer matters. (float16 underflows, which is not linear.)
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_jd.gramian._passes.graph import Differentiator
from hf_jd.gramian._passes.recording import Recording
from hf_jd.gramian._passes.small_tensors import SmallTensors
from hf_jd.gramian._rules.plan import ModuleUse, RecordedUse
from hf_jd.gramian.layouts import AXES, Batch, Layout, candidates
from hf_jd.gramian.rows import accumulation_dtype
from hf_jd.gramian.taps import TapEvent

# The largest difference allowed: relative to the parameter's own gradient, and relative to the typical gradient of the
# model, below which a parameter's gradient is rounding noise (a bias that softmax cancels) and proves nothing.
TOLERANCE = {torch.float64: (1e-5, 1e-10), torch.float32: (5e-3, 1e-6)}
HALF_TOLERANCE = (3e-2, 1e-3)
BLIND = (1e-1, 1e-2)  # if explaining an error takes more noise than this, the identity has proved next to nothing
OUTLIERS = 1e3  # times the median parameter's gradient
# The first levels have distinct, nonzero pairwise sums, so that what rows have in common does not cancel.
LEVELS = (1.0, 0.5, -0.25, 0.25, -0.5)
NOISE = 4  # errors below this many times autograd's disagreement with itself are no evidence

Probed = list[Tensor]  # one tensor, shaped like the parameter, per vector of the probe


class Checker:
    """The decisions about which rows still need a proof, and which are wrong.

    Attributes:
        asleep: Parameters whose gradient was zero in their last check, which proves nothing (lora_A at its start, where
            lora_B is zero). They need another proof as soon as their rows are not zero.
        expects: Whether the next step may need a proof: the quantities that it compares are then recorded first.
        underflows: Whether some part of the model computes in float16, where small gradients lose digits.
    """

    def __init__(self) -> None:
        self.asleep: set[nn.Parameter] = set()
        self.expects = True
        self.underflows = False
        self._generator = torch.Generator().manual_seed(0)

    def pending(self, recording: Recording) -> bool:
        """Return whether a parameter was used in a way that no check has proved: with a new layout, rank or mode.

        A gradient that is too small proves nothing: it is checked again after 1, 2, 4, ... such steps, counted here.
        """
        uses = _uses(recording)
        pending = bool(recording.awake) or any(is_due(*use) for use in uses)
        for use, parameter, layout in uses:
            entry = (parameter, layout, use.module.training)
            if entry in use.vacuous and entry not in use.proved:
                use.vacuous[entry] += 1
        self.expects = any(is_due(*use) for use in uses)
        return pending

    def probe(self, losses: Tensor) -> Tensor:
        """Draw vectors r [P, R] of `LEVELS` from the checker's own generator.

        Any two of up to 25 objectives differ in one of the two vectors; a single vector is enough for up to 5.
        """
        count = len(LEVELS)
        order = torch.randperm(len(losses), generator=self._generator)
        digits = [order % count] if len(losses) <= count else [order % count, order // count % count]
        return torch.tensor(LEVELS)[torch.stack(digits)].to(losses)

    def wrong(self, recording: Recording, expected: Mapping[nn.Parameter, Probed | None]) -> dict[nn.Parameter, float]:
        """Return parameters whose rows, weighted by the probe, differ from autograd's gradient, with the error's norm.

        A NaN is not called wrong: the caller handles losses that are not finite.
        """
        typical = _typical(expected.values())
        errors = {}
        for parameter, theirs in expected.items():
            if parameter not in recording.probed or parameter in recording.unmapped:
                continue
            relative, noise = self._tolerance(parameter, recording)
            ours = recording.probed[parameter]
            error = distance(ours, theirs)
            scale = max(_norm(ours), _norm(theirs))
            if error > relative * scale + noise * typical * math.sqrt(_numel(ours)):
                errors[parameter] = error
        return errors

    def approve(self, recording: Recording, expected: Mapping[nn.Parameter, Probed | None]) -> None:
        """Remember what was proved, and which gradients were too small to prove anything."""
        typical = _typical(expected.values())
        uses = _uses(recording)
        for use, parameter, layout in uses:
            entry = (parameter, layout, use.module.training)
            if self._is_evidence(parameter, recording, expected, typical):
                use.proved.add(entry)
            else:
                use.vacuous.setdefault(entry, 1)
            if _norm(expected.get(parameter)) == 0.0:
                self.asleep.add(parameter)
            else:
                self.asleep.discard(parameter)
        self.expects = bool(self.asleep) or any(is_due(*use) for use in uses)

    def _is_evidence(
        self,
        parameter: nn.Parameter,
        recording: Recording,
        expected: Mapping[nn.Parameter, Probed | None],
        typical: float,
    ) -> bool:
        """Return whether a parameter's gradient is large enough to expose wrong rows."""
        relative, noise = self._tolerance(parameter, recording)
        gradients = expected.get(parameter)
        return _norm(gradients) * relative > noise * typical * math.sqrt(_numel(gradients))

    def _tolerance(self, parameter: nn.Parameter, recording: Recording) -> tuple[float, float]:
        dtypes = {parameter.dtype, *recording.precisions.get(parameter, ())}
        if self.underflows or any(torch.float16 in seen for seen in recording.precisions.values()):
            dtypes.add(torch.float16)
        return max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)

    def diagnose(
        self,
        recording: Recording,
        lost: set[nn.Parameter],
        leaking: set[nn.Module],
        expected: Mapping[nn.Parameter, Probed | None],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Tell apart models that mix instances and parameters that only need another tier.

        Where instances mix, everything before that point is wrong in every layout and by every method, and the gradient
        of one loss reaches the rows of other instances there; everything after it is right.

        Args:
            recording: The first recording of the backward.
            lost: Parameters that only tier 3 gets right.
            leaking: Modules at whose output two losses reach the same place (`LeakRecording`).
            expected: The gradient of each parameter, if it has one.
            names: The parameters' names.

        Raises:
            ValueError: Instances mix; the message names the place.
        """
        forward = list(dict.fromkeys(recorded.use.module for recorded in reversed(recording.uses)))
        failing = leaking & {recorded.use.module for p in lost for recorded in recording.uses_of.get(p, ())}
        if not failing:
            return
        last = max(i for i, module in enumerate(forward) if module in failing)
        before = {p for m in recording.uses if m.use.module in forward[: last + 1] for p in m.targets.values()}
        # Packed documents mix in attention, after the queries, whose rows are right and prove nothing here.
        by_token, typical = recording.batch.segments.by_token, _typical(expected.values())
        if not by_token and any(self._is_evidence(p, recording, expected, typical) for p in before - lost):
            return
        named = {m.use.module: f"{_owner(names, m)} ({type(m.use.module).__name__})" for m in recording.uses}
        place = f"after {named[forward[last]]}"
        place += f" and before {named[forward[last + 1]]}" if last + 1 < len(forward) else ", at the end or in the loss"
        raise ValueError(
            f"instances of the batch mix {place}: a loss depends on instances other than its own, so its gradient is "
            "not one instance's row. Usual causes: BatchNorm in training mode (use GroupNorm, or .eval()), a balancing "
            "loss over the batch or in-batch negatives (take them out of the per-instance losses), statistics over the "
            "batch, and, in packed rows, attention across documents (give no attention_mask, and use_cache=False). "
            "To train these losses as they are, differentiate them one by one with Engine(..., batch_dim=None), or, in "
            "a Trainer, make each batch one objective with --jd_objectives batch."
        )


def _uses(recording: Recording) -> set[tuple[ModuleUse, nn.Parameter, Layout | None]]:
    """Return every use of a parameter with its layout, except for unmapped parameters."""
    return {
        (recorded.use, parameter, recorded.layout)
        for recorded in recording.uses
        for parameter in recorded.targets.values()
        if parameter not in recording.unmapped
    }


def is_due(use: ModuleUse, parameter: nn.Parameter, layout: Layout | None) -> bool:
    """Return whether a parameter's rows in this use and layout have to be verified in this step."""
    entry = (parameter, layout, use.module.training)
    seen = use.vacuous.get(entry, 0)
    return entry not in use.proved and (seen & (seen - 1)) == 0


class LeakRecording:
    """A recorder of one backward per loss, which finds the modules where two losses reach the same place.

    If instances don't mix, no two losses reach the same place, whatever the order or dimension of the instances.

    Args:
        batch: The instances of the step.
    """

    def __init__(self, batch: Batch):
        self.leaking: set[nn.Module] = set()
        self._batch = batch
        self._reached: dict[tuple[nn.Module, int], Tensor] = {}
        self._calls: Counter[nn.Module] = Counter()

    def begin(self) -> None:
        """Begin the backward of the next loss; each backward visits modules in the same order."""
        self._calls.clear()

    def record(self, event: TapEvent) -> None:
        """Note where the loss arrives; skip tables, and tensors that may not hold the batch."""
        tap, g = event.tap, event.first
        if g is None or g.dim() < 2 or isinstance(tap.module, nn.Embedding):
            return
        ids = self._batch.segments.ids
        by_token = ids is not None and ids.dim() == 2 and g.shape[:2] == ids.shape
        if not by_token and candidates(g.shape[:-1], self._batch.instances) != AXES[:1]:
            return
        key = tap.module, self._calls[tap.module]
        self._calls[tap.module] += 1
        here, before = g != 0, self._reached.get(key)
        if before is not None and bool((here & before).any()):
            self.leaking.add(tap.module)
        self._reached[key] = here if before is None else here | before


def probed_gradients(
    differentiator: Differentiator, losses: Tensor, probe: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Probed | None]:
    """Compute autograd's gradient of sum_i r_i loss_i for each r of a probe [P, R]; None if no loss depends on it."""
    small = SmallTensors()

    def move(gradient: Tensor | None) -> Tensor | None:  # as soon as it is formed
        return None if gradient is None else small.store(gradient)

    handles = [p.register_hook(move) for p in parameters]
    try:
        gradients = [differentiator.gradients((r * losses).sum(), parameters) for r in probe]
    finally:
        for handle in handles:
            handle.remove()
    columns = zip(*gradients, strict=True)
    return {
        p: None if column[0] is None else [g.to_dense() if g.is_sparse else g for g in column if g is not None]
        for p, column in zip(parameters, columns, strict=True)
    }


def unresolved(
    differentiator: Differentiator,
    losses: Tensor,
    probe: Tensor,
    errors: Mapping[nn.Parameter, float],
    expected: Mapping[nn.Parameter, Probed | None],
) -> set[nn.Parameter]:
    """Return the parameters for which autograd makes as large an error when it differentiates the levels separately.

    Sums of many half-precision numbers lose digits (a LayerNorm's bias over 30,000 tokens), and small gradients
    underflow in float16: the identity can't tell right from wrong below that.
    """
    parameters, levels = list(errors), probe.abs().unique()
    parts = [
        probed_gradients(differentiator, losses, (probe.abs() == level) * probe.sign(), parameters) for level in levels
    ]
    noisy = set()
    for parameter in parameters:
        grouped = None
        for level, part in zip(levels.tolist(), parts, strict=True):
            scaled = [level * g.to(accumulation_dtype(g)) for g in part[parameter] or ()]
            grouped = scaled if grouped is None else [a + b for a, b in zip(grouped, scaled, strict=True)]
        noise = NOISE * distance(grouped, expected[parameter]) if grouped else 0.0
        # A single objective can't be grouped, and its rows can't belong to another objective.
        alone = len(losses) == 1 and not is_blind(errors[parameter], expected[parameter], expected)
        if errors[parameter] <= noise or alone:
            noisy.add(parameter)
    return noisy


def is_blind(error: float, gradients: Probed | None, expected: Mapping[nn.Parameter, Probed | None]) -> bool:
    """Return whether the noise is large enough to hide a wrong map from rows to objectives."""
    relative, noise = BLIND
    return error > relative * _norm(gradients) + noise * _typical(expected.values()) * math.sqrt(_numel(gradients))


def distance(ours: Probed, theirs: Probed | None) -> float:
    """Return the norm of the difference; None counts as zero."""
    if theirs is None:
        return _norm(ours)
    dtype = torch.promote_types(accumulation_dtype(ours[0]), theirs[0].dtype)
    return _norm([a.to(dtype) - b.to(dtype) for a, b in zip(ours, theirs, strict=True)])


def _norm(gradients: Probed | None) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=accumulation_dtype(g))) for g in gradients or ()))


def _numel(gradients: Probed | None) -> int:
    return sum(g.numel() for g in gradients or ())


def _typical(gradients: Iterable[Probed | None]) -> float:
    """Return the root mean square of all gradients' elements, with a cap against outliers that dwarf the others."""
    square, count, sizes = 0.0, 1, [0.0]
    for gradient in gradients:
        if gradient is not None:
            norm = _norm(gradient)
            square += norm**2
            count += _numel(gradient)
            sizes.append(norm / math.sqrt(max(1, _numel(gradient))))
    return min(math.sqrt(square / count), OUTLIERS * statistics.median(filter(None, sizes)) if any(sizes) else 0.0)


def _owner(names: Mapping[nn.Parameter, str], recorded: RecordedUse) -> str:
    name, parameter = next(iter(recorded.targets.items()))
    return names[parameter].removesuffix(name).rstrip(".") or "the model"
