"""Turn one vector of losses into rows: record a backward through the taps, verify the rows, add the missing ones."""

import logging
import time
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_jd.gramian._passes.check import Checker, LeakRecording, is_blind, probed_gradients, unresolved
from hf_jd.gramian._passes.coverage import Coverage
from hf_jd.gramian._passes.foresight import Foresight, Outlook
from hf_jd.gramian._passes.graph import Differentiator
from hf_jd.gramian._passes.recording import Keep, Recording
from hf_jd.gramian._rules.methods import Tier
from hf_jd.gramian._rules.plan import Plan
from hf_jd.gramian._rules.stacks import Stack
from hf_jd.gramian.layouts import Batch, UnsupportedError
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.sharding import Lockstep
from hf_jd.gramian.taps import Switch

logger = logging.getLogger(__name__)
ATTEMPTS = 12  # passes of one self-check: each revokes one wrong decision per parameter
MIXING_TESTS = 32  # how many losses to differentiate one by one if instances seem to mix


@dataclass(frozen=True)
class Measurement:
    """The losses to compute rows for.

    Attributes:
        losses: [R], one entry per objective.
        batch: The instances that they belong to.
        differentiator: Differentiates their graph.
        keep: Whether to store rows, factors or only the Gramian.
        retain: Whether to retain the graph even when this measurement no longer needs it.
    """

    losses: Tensor
    batch: Batch
    differentiator: Differentiator
    keep: Keep
    retain: bool


@dataclass
class Outcome:
    """The rows of one vector of losses.

    Attributes:
        rows: By parameter, without parameters that no loss depends on.
        gramian: In a pass that stores no rows, the part of the Gramian that is not in `rows`.
        tiers: The tier that formed each parameter's rows.
    """

    rows: dict[nn.Parameter, Rows | Stack]
    gramian: Tensor | None
    tiers: dict[nn.Parameter, Tier]


class Passes:
    """The backward passes of one engine, and what it learnt from them.

    Args:
        plan: Decisions by module.
        coverage: Which module holds which parameter.
        checker: The self-check, or None.
        switch: Shared with the taps.
    """

    def __init__(self, plan: Plan, coverage: Coverage, checker: Checker | None, switch: Switch):
        self._plan, self._coverage, self._checker, self._switch = plan, coverage, checker, switch
        self._foresight = Foresight(plan, coverage, checker)
        self._absent: set[nn.Parameter] = set()
        self._warned: set[nn.Parameter] = set()

    def run(self, losses: Tensor, batch: Batch, keep: Keep, retain: bool) -> Outcome:
        """Compute the rows of losses [R].

        Args:
            losses: One entry per objective.
            batch: The instances that they belong to.
            keep: Whether to store rows, factors or only the Gramian.
            retain: Whether to retain the graph even when this call no longer needs it.

        Raises:
            ValueError: The model mixes instances.
        """
        outlook = self._foresight.look(losses, None if retain or self._coverage.sharded else batch)
        one = Measurement(losses, batch, self._differentiator(losses, outlook), keep, retain)
        if outlook.is_last:
            return self._only_pass(one, outlook)
        self._foresight.forget()
        checker = self._checker
        # If a proof is likely, record what it compares right away, and save a pass.
        recording = self._record(one, checker.probe(losses) if checker is not None and checker.expects else None)
        self._check_length(losses, batch, recording)
        reached = self._unmet(one, recording)
        if checker is not None and checker.pending(recording):
            recording = self._prove(one, recording)
        if recording.probe is not None:
            more = bool(reached or self._plan.individual or recording.unmapped)
            recording = self._record(one, retain=retain or more)
        return self._complete(one, recording, reached)

    def one_by_one(self, losses: Tensor) -> Outcome:
        """Compute the rows of losses without an instance dimension: one differentiation each."""
        differentiator = self._differentiator(losses, self._foresight.look(losses))
        rows = _individual_rows(differentiator, losses, list(self._coverage.names))
        return Outcome({**rows}, None, dict.fromkeys(rows, Tier.OBJECTIVE))

    def gradients(self, scalar: Tensor) -> dict[nn.Parameter, Tensor]:
        """Differentiate a scalar with respect to each parameter that it depends on, and retains the graph."""
        names, differentiator = list(self._coverage.names), self._differentiator(scalar, self._foresight.look(scalar))
        gradients = zip(names, differentiator.gradients(scalar, names), strict=True)
        return {p: g for p, g in gradients if g is not None}

    def finish(self, scalar: Tensor) -> None:
        """End a batch's passes: with sharded parameters, wait until all processes have run theirs."""
        self._differentiator(scalar, self._foresight.look(scalar)).finish(scalar)

    def _differentiator(self, losses: Tensor, outlook: Outlook) -> Differentiator:
        touched = None if outlook.touched is None else [*self._coverage.parameters(), *outlook.touched]
        if not self._coverage.sharded:
            return Differentiator(touched)
        return Differentiator(touched, self._coverage.whole(), Lockstep(losses.device), self._switch.sentinel)

    def _only_pass(self, one: Measurement, outlook: Outlook) -> Outcome:
        """Compute the rows with one backward that frees the graph."""
        recording = self._record(one, retain=False)
        if len(recording.tiers) < len(self._coverage.names):
            self._absent = self._coverage.names.keys() - recording.uses_of.keys()
        if recording.unmapped:
            self._foresight.forget()
        if self._checker is not None and not outlook.is_settled:
            self._checker.pending(recording)  # Counts the step.
        return self._complete(one, recording, set())

    def _record(
        self,
        one: Measurement,
        probe: Tensor | None = None,
        doubted: Set[nn.Parameter] = frozenset(),
        retain: bool = True,
    ) -> Recording:
        """Run a backward of the summed losses to the sentinel; repeats it if a parameter turns out to be shared."""
        shared = self._coverage.shared() if one.keep is Keep.GRAMIAN else set()
        asleep = set() if self._checker is None else self._checker.asleep
        while True:
            recording = Recording(self._plan, one.batch, one.keep, set(shared), asleep, probe, doubted)
            self._switch.recorder = recording
            try:
                absent = [p for p in self._absent if p in self._coverage.names]
                inputs = [self._switch.sentinel, *absent]
                gradients = one.differentiator.gradients(one.losses.sum(), inputs, retain)
            except UnsupportedError as error:
                name = self._coverage.names[next(iter(recording.uses[-1].targets.values()))]
                raise UnsupportedError(f"{name}: {error}") from None
            finally:
                self._switch.recorder = None
            recording.finish()
            recording.reached = {p for p, g in zip(absent, gradients[1:], strict=True) if g is not None}
            if recording.shared == shared:
                return recording
            shared = recording.shared

    def _unmet(self, one: Measurement, recording: Recording) -> set[nn.Parameter]:
        """Return the parameters that have gradients, but that no tap has seen."""
        names, individual, seen = self._coverage.names, self._plan.individual, recording.uses_of
        reached = recording.reached - seen.keys()
        missing = [p for p in names if p not in seen and p not in individual and p not in self._absent]
        if missing:
            gradients = one.differentiator.gradients(one.losses.sum(), missing)
            reached |= {p for p, g in zip(missing, gradients, strict=True) if g is not None}
        self._absent = {p for p in names if p not in seen and p not in individual and p not in reached}
        self._coverage.climb(reached)
        return reached

    def _check_length(self, losses: Tensor, batch: Batch, recording: Recording) -> None:
        """Raise if no input of the model can hold as many instances as there are losses or segments."""
        seen, n = self._coverage.sizes, batch.instances
        # A batch in the second dimension is still some module's input, so one dimension alone proves nothing.
        fits = any(size % n == 0 if axis == 0 else size == n and not recording.uses for axis, size in seen)
        if not seen or fits or any(m.layout is not None or m.use.rejected for m in recording.uses):
            return
        sizes = ", ".join(str(size) for axis, size in sorted(seen) if axis == 0)
        raise ValueError(
            f"{batch.instances} instances were given (losses of shape {list(losses.shape)}), but the first dimensions "
            f"of the model's inputs are {sizes}: give one loss per instance of the batch, in its order, or segments "
            "[B] that assign instances to objectives. For losses of separate forwards: Engine(..., batch_dim=None)."
        )

    def _prove(self, one: Measurement, first: Recording) -> Recording:
        """Compare the rows with autograd; revoke decisions until the rows are right or no decision is left.

        Returns:
            The last recording, which has sums weighted by a probe instead of rows.
        """
        checker, losses, recording = self._checker, one.losses, first
        assert checker is not None
        start = time.perf_counter()
        checker.underflows = any(p.dtype == torch.float16 for p in self._coverage.parameters())
        probe = checker.probe(losses) if first.probe is None else first.probe
        expected = probed_gradients(one.differentiator, losses, probe, list(recording.uses_of))
        suspects: set[nn.Parameter] = set()
        first.rows = {}
        for attempt in range(ATTEMPTS):
            if attempt or first.probe is None:
                recording = self._record(one, probe)
            errors = checker.wrong(recording, expected)
            doubted = unresolved(one.differentiator, losses, probe, errors, expected) if errors else set()
            if doubted:
                recording = self._record(one, probe, doubted)
            wrong = errors.keys() - (doubted - recording.refuted)
            suspects |= wrong
            self._plan.reject({p: [m.use for m in uses] for p, uses in recording.uses_of.items() if p in wrong})
            if not wrong:
                break
        else:
            self._plan.individual |= wrong
            recording = self._record(one, probe)
        lost = suspects & (self._plan.individual | recording.unmapped)
        if lost:
            checker.diagnose(first, lost, self._leaking(one), expected, self._coverage.names)
        checker.approve(recording, expected)
        self._warn_of_noise([p for p in doubted - wrong if is_blind(errors[p], expected[p], expected)])
        logger.info("Verified the rows against autograd in %.2f s.", time.perf_counter() - start)
        return recording

    def _leaking(self, one: Measurement) -> set[nn.Module]:
        """Find the modules at which two losses reach the same place."""
        self._switch.recorder = recording = LeakRecording(one.batch)
        try:
            for loss in one.losses[:MIXING_TESTS]:
                recording.begin()
                one.differentiator.gradients(loss, [self._switch.sentinel])
        finally:
            self._switch.recorder = None
        return recording.leaking

    def _complete(self, one: Measurement, recording: Recording, reached: set[nn.Parameter]) -> Outcome:
        """Add rows that need one differentiation per objective, and warn about the cost."""
        alone = self._plan.individual | recording.unmapped | reached
        individual = [p for p in self._coverage.names if p in alone] if alone else []
        if not recording.uses and not individual:
            raise ValueError(
                "the losses depend on no trainable parameter of the engine's modules: compute them with those modules, "
                "and unfreeze some of their parameters."
            )
        rows, tiers = recording.rows, recording.tiers
        if individual:
            rows = {p: r for p, r in rows.items() if p not in recording.unmapped}
            tiers = {p: tier for p, tier in tiers.items() if p not in recording.unmapped}
            added = _individual_rows(one.differentiator, one.losses, individual)
            rows |= added
            tiers |= dict.fromkeys(added, Tier.OBJECTIVE)
            soon = reached | recording.postponed  # the next step has a faster way for these
            self._warn([p for p in individual if p not in soon and p in added], len(one.losses))
        return Outcome(rows, recording.gramian, tiers)

    def _warn_of_noise(self, parameters: list[nn.Parameter]) -> None:
        new = [self._coverage.names[p] for p in parameters if p not in self._warned]
        self._warned |= set(parameters)
        if new:
            warnings.warn(
                f"The self-check can't prove the rows of {len(new)} parameter(s) ({_listed(new)}) on this model: "
                "rounding alone changes autograd's gradient by as much. Their rows come from rules that were verified "
                "in float32, layer by layer, or from calling their modules again.",
                stacklevel=2,
            )

    def _warn(self, parameters: list[nn.Parameter], objectives: int) -> None:
        new = [self._coverage.names[p] for p in parameters if p not in self._warned]
        self._warned |= set(parameters)
        if new:
            warnings.warn(
                f"{len(new)} parameter(s) ({_listed(new)}) bring no rows in the backward of the batch: each step "
                f"differentiates every objective for them, {objectives} further passes now. "
                "Freeze them if they matter little.",
                stacklevel=2,
            )


def _individual_rows(
    differentiator: Differentiator, losses: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Rows]:
    """Apply tier 3: one differentiation per objective, for these parameters only; always right, but slow.

    Returns:
        The rows of parameters that some loss depends on.
    """
    gradients = [differentiator.gradients(loss, parameters) for loss in losses]
    rows: dict[nn.Parameter, Rows] = {}
    for parameter, column in zip(parameters, zip(*gradients, strict=True), strict=True):
        if any(g is not None for g in column):
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            dense = [zeros if g is None else g.to_dense() if g.is_sparse else g for g in column]
            rows[parameter] = DenseRows(torch.stack(dense).reshape(len(losses), -1), parameter.shape)
    return rows


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
