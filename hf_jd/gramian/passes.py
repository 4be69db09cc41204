"""How one vector of losses becomes rows: record what a backward to the taps brings, prove it, complete it."""

import logging
import time
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_jd.gramian.check import Checker, LeakRecording, is_blind, probed_gradients, unresolved
from hf_jd.gramian.coverage import Coverage
from hf_jd.gramian.foresight import Foresight, Outlook
from hf_jd.gramian.graph import Differentiator
from hf_jd.gramian.layouts import Batch, UnsupportedError
from hf_jd.gramian.methods import Tier
from hf_jd.gramian.plan import Plan
from hf_jd.gramian.recording import Keep, Recording
from hf_jd.gramian.rows import DenseRows, Rows
from hf_jd.gramian.sharding import Lockstep
from hf_jd.gramian.stacks import Stack
from hf_jd.gramian.taps import Switch

logger = logging.getLogger(__name__)
ATTEMPTS = 12  # passes of one self-check: each one takes back a wrong decision of every parameter that has one left
MIXING_TESTS = 32  # losses differentiated alone when instances are suspected to mix


@dataclass(frozen=True)
class Measurement:
    """What is measured.

    Attributes:
        losses: [R], one entry per objective.
        batch: The instances behind them.
        differentiator: Of their graph.
        keep: What is kept of the rows.
        retain: Whether the graph must be kept where this measurement needs it no more.
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
        rows: By parameter; parameters that no loss depends on are left out.
        gramian: In a pass that keeps no rows, the part of the Gramian that is not in `rows`.
        tiers: The tier that brought each parameter's rows.
    """

    rows: dict[nn.Parameter, Rows | Stack]
    gramian: Tensor | None
    tiers: dict[nn.Parameter, Tier]


class Passes:
    """Runs backwards for one engine and remembers what they taught.

    Args:
        plan: Decisions by module.
        coverage: Which module holds which parameter.
        checker: The self-check, or None.
        switch: What the taps report to.
    """

    def __init__(self, plan: Plan, coverage: Coverage, checker: Checker | None, switch: Switch):
        self._plan, self._coverage, self._checker, self._switch = plan, coverage, checker, switch
        self._foresight = Foresight(plan, coverage, checker)
        self._absent: set[nn.Parameter] = set()
        self._warned: set[nn.Parameter] = set()

    def run(self, losses: Tensor, batch: Batch, keep: Keep, retain: bool) -> Outcome:
        """The rows of losses [R].

        Args:
            losses: One entry per objective.
            batch: The instances behind them.
            keep: What is kept of the rows.
            retain: Whether the graph must be kept where this call needs it no more.

        Raises:
            ValueError: A model that mixes instances.
        """
        outlook = self._foresight.look(losses, None if retain or self._coverage.sharded else batch)
        one = Measurement(losses, batch, self._differentiator(losses, outlook), keep, retain)
        if outlook.is_last:
            return self._only_pass(one, outlook)
        self._foresight.forget()
        checker = self._checker
        # What a proof compares is recorded first, where one is expected.
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
        """The rows of losses without an instance dimension: one differentiation each."""
        differentiator = self._differentiator(losses, self._foresight.look(losses))
        rows = _individual_rows(differentiator, losses, list(self._coverage.names))
        return Outcome({**rows}, None, dict.fromkeys(rows, Tier.OBJECTIVE))

    def gradients(self, scalar: Tensor) -> dict[nn.Parameter, Tensor]:
        """The gradient of a scalar with regard to each parameter that it depends on; the graph is kept."""
        names, differentiator = list(self._coverage.names), self._differentiator(scalar, self._foresight.look(scalar))
        found = zip(names, differentiator.gradients(scalar, names), strict=True)
        return {p: g for p, g in found if g is not None}

    def finish(self, scalar: Tensor) -> None:
        """Ends a batch's passes with sharded parameters, once all processes have made theirs."""
        self._differentiator(scalar, self._foresight.look(scalar)).finish(scalar)

    def _differentiator(self, losses: Tensor, outlook: Outlook) -> Differentiator:
        touched = None if outlook.touched is None else [*self._coverage.parameters(), *outlook.touched]
        if not self._coverage.sharded:
            return Differentiator(touched)
        return Differentiator(touched, self._coverage.whole(), Lockstep(losses.device), self._switch.sentinel)

    def _only_pass(self, one: Measurement, outlook: Outlook) -> Outcome:
        """Rows by one backward that frees the graph."""
        recording = self._record(one, retain=False)
        if len(recording.tiers) < len(self._coverage.names):
            self._absent = self._coverage.names.keys() - recording.met.keys()
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
        """One backward of the sum of the losses to the sentinel; again, where a use was met too late to add up."""
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
                name = self._coverage.names[next(iter(recording.meetings[-1].targets.values()))]
                raise UnsupportedError(f"{name}: {error}") from None
            finally:
                self._switch.recorder = None
            recording.finish()
            recording.reached = {p for p, g in zip(absent, gradients[1:], strict=True) if g is not None}
            if recording.shared == shared:
                return recording
            shared = recording.shared

    def _unmet(self, one: Measurement, recording: Recording) -> set[nn.Parameter]:
        """Parameters with gradients that no tap met."""
        names, individual, met = self._coverage.names, self._plan.individual, recording.met
        reached = recording.reached - met.keys()
        missing = [p for p in names if p not in met and p not in individual and p not in self._absent]
        if missing:
            gradients = one.differentiator.gradients(one.losses.sum(), missing)
            reached |= {p for p, g in zip(missing, gradients, strict=True) if g is not None}
        self._absent = {p for p in names if p not in met and p not in individual and p not in reached}
        self._coverage.climb(reached)
        return reached

    def _check_length(self, losses: Tensor, batch: Batch, recording: Recording) -> None:
        """Raises where no input of the model can hold as many instances as there are losses or segments."""
        seen, n = self._coverage.sizes, batch.instances
        # Where the batch comes second, some module meets it: a second dimension proves nothing if none did.
        fits = any(size % n == 0 if axis == 0 else size == n and not recording.meetings for axis, size in seen)
        if not seen or fits or any(m.layout is not None or m.use.rejected for m in recording.meetings):
            return
        sizes = ", ".join(str(size) for axis, size in sorted(seen) if axis == 0)
        raise ValueError(
            f"{batch.instances} instances were given (losses of shape {list(losses.shape)}), but the first dimensions "
            f"of the model's inputs are {sizes}: give one loss an instance of the batch, in its order, or segments [B] "
            "that say whose each instance is. Losses of separate forwards: Engine(..., batch_dim=None)."
        )

    def _prove(self, one: Measurement, first: Recording) -> Recording:
        """Compares the rows with autograd; takes back decisions until they are right or none is left.

        Returns:
            The last recording, with a probe in the place of its rows.
        """
        checker, losses, recording = self._checker, one.losses, first
        assert checker is not None
        start = time.perf_counter()
        checker.underflows = any(p.dtype == torch.float16 for p in self._coverage.parameters())
        probe = checker.probe(losses) if first.probe is None else first.probe
        expected = probed_gradients(one.differentiator, losses, probe, list(recording.met))
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
            self._plan.reject({p: [m.use for m in meetings] for p, meetings in recording.met.items() if p in wrong})
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
        logger.info("The rows were proved against autograd in %.2f s.", time.perf_counter() - start)
        return recording

    def _leaking(self, one: Measurement) -> set[nn.Module]:
        """The modules at which two losses reach the same place."""
        self._switch.recorder = recording = LeakRecording(one.batch)
        try:
            for loss in one.losses[:MIXING_TESTS]:
                recording.begin()
                one.differentiator.gradients(loss, [self._switch.sentinel])
        finally:
            self._switch.recorder = None
        return recording.leaking

    def _complete(self, one: Measurement, recording: Recording, reached: set[nn.Parameter]) -> Outcome:
        """Adds the rows that only one differentiation per objective brings, and says what that costs."""
        alone = self._plan.individual | recording.unmapped | reached
        individual = [p for p in self._coverage.names if p in alone] if alone else []
        if not recording.meetings and not individual:
            raise ValueError(
                "the losses depend on no trainable parameter of the engine's modules: compute them with those modules, "
                "and unfreeze some of their parameters."
            )
        rows, tiers = recording.rows, recording.tiers
        if individual:
            rows = {p: r for p, r in rows.items() if p not in recording.unmapped}
            tiers = {p: tier for p, tier in tiers.items() if p not in recording.unmapped}
            found = _individual_rows(one.differentiator, one.losses, individual)
            rows |= found
            tiers |= dict.fromkeys(found, Tier.OBJECTIVE)
            soon = reached | recording.postponed
            self._warn([p for p in individual if p not in soon and p in found], len(one.losses))
        return Outcome(rows, recording.gramian, tiers)

    def _warn_of_noise(self, parameters: list[nn.Parameter]) -> None:
        new = [self._coverage.names[p] for p in parameters if p not in self._warned]
        self._warned |= set(parameters)
        if new:
            warnings.warn(
                f"The self-check can't prove the rows of {len(new)} parameter(s) ({_listed(new)}) on this model: "
                "rounding alone moves autograd's gradient of them as far. They come from rules that were proved in "
                "float32, layer by layer, or from their modules called again.",
                stacklevel=2,
            )

    def _warn(self, parameters: list[nn.Parameter], objectives: int) -> None:
        new = [self._coverage.names[p] for p in parameters if p not in self._warned]
        self._warned |= set(parameters)
        if new:
            warnings.warn(
                f"{len(new)} parameter(s) ({_listed(new)}) bring no rows in the "
                f"backward of the batch: each step differentiates every objective for them, {objectives} further "
                "passes now. Freeze them if they matter little.",
                stacklevel=2,
            )


def _individual_rows(
    differentiator: Differentiator, losses: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Rows]:
    """Tier 3: one differentiation per objective, for these parameters only; always right, and slow.

    Returns:
        The rows of those that some loss depends on.
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
