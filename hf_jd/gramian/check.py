"""The self-check: proof, against autograd, that the recorded rows are right.

One identity decides. For random r, autograd's gradient of sum_i r_i loss_i must equal sum_i r_i row_i, for every
trainable parameter. It sees wrong rules, wrong maps from rows to objectives, uses that no tap met, and instances that
mix. Cheaper identities do not: with as many tokens as instances, the rows of a relative-position table add up to the
gradient and are still wrong.

Each r_i is a power of two. A backward is linear in what it starts from, and scaling by a power of two commutes with
every rounding: until gradients of several instances are added up, the backward of r_i loss_i is that of loss_i times
r_i, bit for bit, through any number of layers in bfloat16, TF32 or 4 bits. What differs is rounded where a parameter's
gradient is formed, so that only the precision of its own layer counts. (float16 underflows, which is not linear.)
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_jd.gramian.graph import Differentiator
from hf_jd.gramian.layouts import AXES, Batch, Layout, candidates
from hf_jd.gramian.plan import ModuleUse
from hf_jd.gramian.recording import Meeting, Recording
from hf_jd.gramian.rows import accumulation_dtype
from hf_jd.gramian.taps import TapEvent

# How far apart the two sides may be: relative to the parameter's own gradient, and relative to the typical gradient of
# the model, below which a parameter's gradient is rounding noise (a bias that softmax cancels) and proves nothing.
TOLERANCE = {torch.float64: (1e-5, 1e-10), torch.float32: (5e-3, 1e-6)}
HALF_TOLERANCE = (3e-2, 1e-3)
BLIND = (1e-1, 1e-2)  # where only noise beyond this explains an error, the identity has proved next to nothing
OUTLIERS = 1e3  # times the median parameter's gradient
# The first ones have distinct pairwise sums other than zero: what rows have in common must not cancel.
LEVELS = (1.0, 0.5, -0.25, 0.25, -0.5)
NOISE = 4  # times autograd's disagreement with itself: an error below is no evidence

Probed = list[Tensor]  # one tensor, shaped like the parameter, per vector of the probe


class Checker:
    """Says which rows still need a proof, and which are wrong.

    Attributes:
        asleep: Parameters whose gradient was zero in their last proof, which proves nothing (lora_A at its start, where
            lora_B is zero). As soon as their rows are not, they need another one.
        expects: Whether the next step will need a proof, or may: what a proof compares is then recorded first.
        underflows: Whether the model computes in float16 somewhere, whose small gradients lose digits on the way.
    """

    def __init__(self) -> None:
        self.asleep: set[nn.Parameter] = set()
        self.expects = True
        self.underflows = False
        self._generator = torch.Generator().manual_seed(0)

    def pending(self, recording: Recording) -> bool:
        """Whether something was met in a way that no check has proved: a parameter, a layout, a rank, a mode.

        Too small a gradient proves nothing: it is looked at again after 1, 2, 4, ... such steps, counted here.
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
        """Vectors r [P, R] of `LEVELS`, from a generator of the checker's own.

        Each pair of up to 25 objectives differs in one of the vectors, and one vector is enough for up to 5.
        """
        count = len(LEVELS)
        order = torch.randperm(len(losses), generator=self._generator)
        digits = [order % count] if len(losses) <= count else [order % count, order // count % count]
        return torch.tensor(LEVELS)[torch.stack(digits)].to(losses)

    def wrong(self, recording: Recording, expected: Mapping[nn.Parameter, Probed | None]) -> dict[nn.Parameter, float]:
        """The parameters whose rows, weighted by the probe, are not autograd's gradient, with the error's norm."""
        typical = _typical(expected.values())
        errors = {}
        for parameter, theirs in expected.items():
            if parameter not in recording.probed or parameter in recording.unmapped:
                continue
            relative, noise = self._tolerance(parameter, recording)
            ours = recording.probed[parameter]
            error = distance(ours, theirs)
            scale = max(_norm(ours), _norm(theirs))
            # Written so that a NaN is not called wrong: non-finite losses are the caller's to see.
            if error > relative * scale + noise * typical * math.sqrt(_numel(ours)):
                errors[parameter] = error
        return errors

    def approve(self, recording: Recording, expected: Mapping[nn.Parameter, Probed | None]) -> None:
        """Remembers what was proved, and what had too small a gradient to be."""
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
        """Whether a parameter's gradient is large enough for wrong rows to have shown."""
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
        """Tells a model that mixes instances from parameters that only need another tier.

        Where instances mix, everything before that point is wrong in every layout and by every method, and the gradient
        of one loss reaches the rows of other instances there; everything after it is right.

        Args:
            recording: The backward as it was first read.
            lost: Parameters that no method but tier 3 gets right.
            leaking: Modules at whose output two losses reached the same place (`LeakRecording`).
            expected: The gradient of each parameter; what has none says nothing.
            names: Of the parameters.

        Raises:
            ValueError: Instances mix; names the place.
        """
        forward = list(dict.fromkeys(meeting.use.module for meeting in reversed(recording.meetings)))
        failing = leaking & {meeting.use.module for p in lost for meeting in recording.met.get(p, ())}
        if not failing:
            return
        last = max(i for i, module in enumerate(forward) if module in failing)
        before = {p for m in recording.meetings if m.use.module in forward[: last + 1] for p in m.targets.values()}
        # Documents mix in attention, beside which a layer's queries are right.
        by_token, typical = recording.batch.segments.by_token, _typical(expected.values())
        if not by_token and any(self._is_evidence(p, recording, expected, typical) for p in before - lost):
            return
        named = {m.use.module: f"{_owner(names, m)} ({type(m.use.module).__name__})" for m in recording.meetings}
        place = f"after {named[forward[last]]}"
        place += f" and before {named[forward[last + 1]]}" if last + 1 < len(forward) else ", at the end or in the loss"
        raise ValueError(
            f"instances of the batch mix {place}: a loss depends on other instances than its own, so it has no row of "
            "its own. Usual causes: BatchNorm in training mode (use GroupNorm, or .eval()), a balancing loss over the "
            "batch or in-batch negatives (take them out of the per-instance losses), statistics over the batch, and in "
            "packed rows attention across documents (give no attention_mask, and use_cache=False). "
            "To take the losses as they are, differentiate them one by one: Engine(..., batch_dim=None), or in a "
            "Trainer each batch as one objective: --jd_objectives batch."
        )


def _uses(recording: Recording) -> set[tuple[ModuleUse, nn.Parameter, Layout | None]]:
    """Each way in which a parameter was met, but for those whose rows are not read from it."""
    return {
        (meeting.use, parameter, meeting.layout)
        for meeting in recording.meetings
        for parameter in meeting.targets.values()
        if parameter not in recording.unmapped
    }


def is_due(use: ModuleUse, parameter: nn.Parameter, layout: Layout | None) -> bool:
    """Whether the rows of a parameter, met so, have to be proved in this step."""
    entry = (parameter, layout, use.module.training)
    seen = use.vacuous.get(entry, 0)
    return entry not in use.proved and (seen & (seen - 1)) == 0


class LeakRecording:
    """Backwards of single losses, in the place of a `Recording`: which modules do two of them reach at one place?

    Where instances are in another order or dimension than the losses, each loss still has places of its own.

    Args:
        batch: The instances of the step.
    """

    def __init__(self, batch: Batch):
        self.leaking: set[nn.Module] = set()
        self._batch = batch
        self._reached: dict[tuple[nn.Module, int], Tensor] = {}
        self._calls: Counter[nn.Module] = Counter()

    def begin(self) -> None:
        """Begins the backward of the next loss; modules are met in the same order in each."""
        self._calls.clear()

    def record(self, event: TapEvent) -> None:
        """Looks where the loss arrives; a table, or a tensor that need not hold the batch, proves nothing."""
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
    """Autograd's gradient of sum_i r_i loss_i for each r of a probe [P, R]; None where no loss depends on it."""
    gradients = [differentiator.gradients((r * losses).sum(), parameters) for r in probe]
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
    """The parameters whose error autograd makes, too, when it differentiates the objectives in groups, r by r.

    Sums of many half-precision numbers lose what they add (a LayerNorm's bias over 30,000 tokens), and small gradients
    underflow in float16: below that the identity can't tell right from wrong.
    """
    parameters, levels = list(errors), probe.abs().unique()
    parts = [
        probed_gradients(differentiator, losses, (probe.abs() == level) * probe.sign(), parameters) for level in levels
    ]
    found = set()
    for parameter in parameters:
        grouped = None
        for level, part in zip(levels.tolist(), parts, strict=True):
            scaled = [level * g.to(accumulation_dtype(g)) for g in part[parameter] or ()]
            grouped = scaled if grouped is None else [a + b for a, b in zip(grouped, scaled, strict=True)]
        noise = NOISE * distance(grouped, expected[parameter]) if grouped else 0.0
        # One objective alone can't be grouped, nor its rows be another's.
        alone = len(losses) == 1 and not is_blind(errors[parameter], expected[parameter], expected)
        if errors[parameter] <= noise or alone:
            found.add(parameter)
    return found


def is_blind(error: float, gradients: Probed | None, expected: Mapping[nn.Parameter, Probed | None]) -> bool:
    """Whether an error that is noise is so large that a wrong map from rows to objectives could hide in it."""
    relative, noise = BLIND
    return error > relative * _norm(gradients) + noise * _typical(expected.values()) * math.sqrt(_numel(gradients))


def distance(ours: Probed, theirs: Probed | None) -> float:
    """Norm of the difference; None is zero."""
    if theirs is None:
        return _norm(ours)
    dtype = torch.promote_types(accumulation_dtype(ours[0]), theirs[0].dtype)
    return _norm([a.to(dtype) - b.to(dtype) for a, b in zip(ours, theirs, strict=True)])


def _norm(gradients: Probed | None) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=accumulation_dtype(g))) for g in gradients or ()))


def _numel(gradients: Probed | None) -> int:
    return sum(g.numel() for g in gradients or ())


def _typical(gradients: Iterable[Probed | None]) -> float:
    """Root mean square over the elements of all gradients, but for outliers beside which the others would not count."""
    square, count, sizes = 0.0, 1, [0.0]
    for gradient in gradients:
        if gradient is not None:
            norm = _norm(gradient)
            square += norm**2
            count += _numel(gradient)
            sizes.append(norm / math.sqrt(max(1, _numel(gradient))))
    return min(math.sqrt(square / count), OUTLIERS * statistics.median(filter(None, sizes)) if any(sizes) else 0.0)


def _owner(names: Mapping[nn.Parameter, str], meeting: Meeting) -> str:
    name, parameter = next(iter(meeting.targets.items()))
    return names[parameter].removesuffix(name).rstrip(".") or "the model"
