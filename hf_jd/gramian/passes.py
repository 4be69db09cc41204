"""How one vector of losses becomes rows: a backward to the taps, then what they did not meet, then the proof."""

import logging
import time
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_jd.gramian.check import Checker, LeakRecording, is_blind, probed_gradients, unresolved
from hf_jd.gramian.coverage import Coverage
from hf_jd.gramian.fallback import individual_rows
from hf_jd.gramian.foresight import is_last
from hf_jd.gramian.graph import Differentiator, walk
from hf_jd.gramian.layouts import UnsupportedError
from hf_jd.gramian.plan import Plan
from hf_jd.gramian.recording import Batch, Recording
from hf_jd.gramian.rows import Rows
from hf_jd.gramian.sharding import Lockstep

logger = logging.getLogger(__name__)
ATTEMPTS = 12  # passes of one self-check: each one takes back a wrong decision of every parameter that has one left
MIXING_TESTS = 32  # losses differentiated alone when instances are suspected to mix


@dataclass
class Outcome:
    """The rows of one vector of losses.

    Attributes:
        rows: By parameter; parameters that no loss depends on are left out.
        gramian: In a pass that keeps no rows, the part of the Gramian that is not in `rows`.
        tiers: The tier that brought each parameter's rows.
    """

    rows: dict[nn.Parameter, Rows]
    gramian: Tensor | None
    tiers: dict[nn.Parameter, int]


class Passes:
    """Runs backwards for one engine and remembers what they taught.

    Args:
        plan: Decisions by module.
        coverage: Which module holds which parameter.
        checker: The self-check, or None.
        sentinel: What every tap depends on.

    Attributes:
        recording: The backward under way, which taps report to; else None.
    """

    def __init__(self, plan: Plan, coverage: Coverage, checker: Checker | None, sentinel: Tensor):
        self.recording: Recording | LeakRecording | None = None
        self._plan, self._coverage, self._checker, self._sentinel = plan, coverage, checker, sentinel
        self._reentrant: bool | None = None  # None: the graph was not looked at yet
        self._absent: set[nn.Parameter] = set()
        self._warned: set[nn.Parameter] = set()

    def run(
        self, losses: Tensor, batch: Batch | None, materialise: bool, gramian_only: bool, retain_graph: bool
    ) -> Outcome:
        """The rows of losses [R].

        Args:
            losses: One entry an objective.
            batch: The instances behind them; None where losses have no instance dimension.
            materialise: Whether rows are formed even where their factors are smaller.
            gramian_only: Whether rows are dropped once their inner products are taken.
            retain_graph: Whether the graph must be kept where this call needs it no more.

        Raises:
            ValueError: A model that mixes instances.
        """
        differentiator = self._differentiator(losses)
        if batch is None:
            rows = individual_rows(differentiator, losses, list(self._coverage.names))
            used = {p: r for p, r in rows.items() if r is not None}
            return Outcome(used, None, dict.fromkeys(used, 3))
        if not retain_graph and self._is_last(losses, batch):
            return self._only_pass(losses, differentiator, batch, materialise)
        try:
            probe = self._checker.probe(losses) if self._checker is not None and self._checker.expects else None
            recording = self._record(losses, differentiator, batch, materialise, gramian_only, probe)
            self._check_length(losses, batch, recording)
            reached = self._unmet(losses, differentiator, recording)
        except RuntimeError:
            # Reentrant checkpointing was switched on since the graph was looked at: it refuses, or hides modules.
            if self._reentrant is not False or not walk(losses).reentrant:
                raise
            self._reentrant = None
            return self.run(losses, batch, materialise, gramian_only, retain_graph)
        if self._checker is not None and self._checker.pending(recording):
            recording = self._prove(losses, differentiator, recording)
        if recording.probe is not None:
            more = bool(reached or self._plan.individual or recording.unmapped)
            recording = self._record_again(losses, differentiator, recording, None, retain_graph or more)
        return self._complete(losses, differentiator, recording, reached)

    def gradients(self, scalar: Tensor) -> dict[nn.Parameter, Tensor]:
        """The gradient of a scalar with regard to each parameter that it depends on; the graph is kept."""
        names = list(self._coverage.names)
        found = zip(names, self._differentiator(scalar).gradients(scalar, names), strict=True)
        return {p: g for p, g in found if g is not None}

    def finish(self, scalar: Tensor) -> None:
        """Ends a batch's passes: with sharded parameters, once all processes have made theirs."""
        if self._coverage.sharded:
            self._differentiator(scalar).finish(scalar)

    def _differentiator(self, losses: Tensor) -> Differentiator:
        touched = None
        if self._reentrant is not False:
            graph = walk(losses)
            self._reentrant = graph.reentrant
            touched = [*self._coverage.parameters(), *graph.leaves] if self._reentrant else None
        if not self._coverage.sharded:
            return Differentiator(touched)
        return Differentiator(touched, self._coverage.whole(), Lockstep(losses.device), self._sentinel)

    def _is_last(self, losses: Tensor, batch: Batch) -> bool:
        if self._coverage.sharded or self._reentrant is not False:
            return False
        return is_last(losses, batch, self._plan, self._coverage, self._checker)

    def _only_pass(self, losses: Tensor, differentiator: Differentiator, batch: Batch, materialise: bool) -> Outcome:
        """Rows by one backward that frees the graph."""
        recording = self._record(losses, differentiator, batch, materialise, gramian_only=False, retain_graph=False)
        self._absent = self._coverage.names.keys() - recording.met.keys()
        if self._checker is not None:
            self._checker.pending(recording)  # Counts the step.
        return self._complete(losses, differentiator, recording, set())

    def _record(
        self,
        losses: Tensor,
        differentiator: Differentiator,
        batch: Batch,
        materialise: bool,
        gramian_only: bool,
        probe: Tensor | None = None,
        retain_graph: bool = True,
        doubted: Set[nn.Parameter] = frozenset(),
    ) -> Recording:
        """One backward of the sum of the losses to the sentinel; again, where a use was met too late to add up."""
        shared = self._coverage.shared() if gramian_only else set()
        asleep = set() if self._checker is None else self._checker.asleep
        while True:
            recording = Recording(self._plan, batch, materialise, gramian_only, set(shared), asleep, probe, doubted)
            self.recording = recording
            try:
                absent = [p for p in self._absent if p in self._coverage.names]
                gradients = differentiator.gradients(losses.sum(), [self._sentinel, *absent], retain_graph)
            except UnsupportedError as error:
                name = self._coverage.names[next(iter(recording.meetings[-1].targets.values()))]
                raise UnsupportedError(f"{name}: {error}") from None
            finally:
                self.recording = None
            recording.finish()
            recording.reached = {p for p, g in zip(absent, gradients[1:], strict=True) if g is not None}
            if recording.shared == shared:
                return recording
            shared = recording.shared

    def _unmet(self, losses: Tensor, differentiator: Differentiator, recording: Recording) -> set[nn.Parameter]:
        """Parameters with gradients that no tap met. Raises RuntimeError where a reentrant checkpoint hides them."""
        names, individual, met = self._coverage.names, self._plan.individual, recording.met
        reached = recording.reached - met.keys()
        missing = [p for p in names if p not in met and p not in individual and p not in self._absent]
        if missing:
            if self._reentrant is False and walk(losses).reentrant:
                raise RuntimeError("a reentrant checkpoint hides modules")
            gradients = differentiator.gradients(losses.sum(), missing)
            reached |= {p for p, g in zip(missing, gradients, strict=True) if g is not None}
        self._absent = {p for p in names if p not in met and p not in individual and p not in reached}
        self._coverage.climb(reached)
        return reached

    def _check_length(self, losses: Tensor, batch: Batch, recording: Recording) -> None:
        """Raises where no input of the model can hold as many instances as there are losses or segments."""
        seen, n = self._coverage.sizes, batch.instances
        # Where the batch comes second, some module meets it: a second dimension proves nothing if none did.
        fits = any(size % n == 0 if axis == 0 else size == n and not recording.meetings for axis, size in seen)
        if not seen or fits or any(m.layout is not None or m.site.rejected for m in recording.meetings):
            return
        sizes = ", ".join(str(size) for axis, size in sorted(seen) if axis == 0)
        raise ValueError(
            f"{batch.instances} instances were given (losses of shape {list(losses.shape)}), but the first dimensions "
            f"of the model's inputs are {sizes}: give one loss an instance of the batch, in its order, or segments [B] "
            "that say whose each instance is. Losses of separate forwards: Engine(..., batch_dim=None)."
        )

    def _prove(self, losses: Tensor, differentiator: Differentiator, recording: Recording) -> Recording:
        """Compares the rows with autograd; takes back decisions until they are right or none is left.

        Returns:
            The last recording, with a probe in the place of its rows.
        """
        checker = self._checker
        assert checker is not None
        start, first = time.perf_counter(), recording
        checker.underflows = any(p.dtype == torch.float16 for p in self._coverage.parameters())
        probe = checker.probe(losses) if first.probe is None else first.probe
        expected = probed_gradients(differentiator, losses, probe, list(recording.met))
        suspects: set[nn.Parameter] = set()
        first.rows = {}
        for attempt in range(ATTEMPTS):
            if attempt or first.probe is None:
                recording = self._record_again(losses, differentiator, first, probe)
            errors = checker.wrong(recording, expected)
            doubted = unresolved(differentiator, losses, probe, errors, expected) if errors else set()
            if doubted:
                recording = self._record_again(losses, differentiator, first, probe, doubted=doubted)
            wrong = errors.keys() - (doubted - recording.refuted)
            suspects |= wrong
            self._plan.reject({p: [m.site for m in meetings] for p, meetings in recording.met.items() if p in wrong})
            if not wrong:
                break
        else:
            self._plan.individual |= wrong
            recording = self._record_again(losses, differentiator, first, probe)
        lost = suspects & (self._plan.individual | recording.unmapped)
        if lost:
            leaking = self._leaking(losses, differentiator, first.batch)
            checker.diagnose(first, lost, leaking, expected, self._coverage.names)
        checker.approve(recording, expected)
        self._warn_of_noise([p for p in doubted - wrong if is_blind(errors[p], expected[p], expected)])
        logger.info("The rows were proved against autograd in %.2f s.", time.perf_counter() - start)
        return recording

    def _record_again(
        self,
        losses: Tensor,
        differentiator: Differentiator,
        first: Recording,
        probe: Tensor | None,
        retain_graph: bool = True,
        doubted: Set[nn.Parameter] = frozenset(),
    ) -> Recording:
        batch, kept = first.batch, (first.materialise, first.gramian_only)
        return self._record(losses, differentiator, batch, *kept, probe, retain_graph, doubted)

    def _leaking(self, losses: Tensor, differentiator: Differentiator, batch: Batch) -> set[nn.Module]:
        """The modules at which two losses reach the same place."""
        self.recording = recording = LeakRecording(batch)
        try:
            for loss in losses[:MIXING_TESTS]:
                recording.begin()
                differentiator.gradients(loss, [self._sentinel])
        finally:
            self.recording = None
        return recording.leaking

    def _complete(
        self, losses: Tensor, differentiator: Differentiator, recording: Recording, reached: set[nn.Parameter]
    ) -> Outcome:
        """Adds the rows that only one differentiation an objective brings, and says what that costs."""
        names = self._coverage.names
        individual = [p for p in names if p in self._plan.individual or p in recording.unmapped or p in reached]
        if not recording.meetings and not individual:
            raise ValueError(
                "the losses depend on no trainable parameter of the engine's modules: compute them with those modules, "
                "and unfreeze some of their parameters."
            )
        rows: dict[nn.Parameter, Rows] = {p: r for p, r in recording.rows.items() if p not in recording.unmapped}
        tiers = {p: recording.tiers[p] for p in recording.tiers if p not in recording.unmapped}
        if individual:
            found = individual_rows(differentiator, losses, individual)
            rows |= {p: r for p, r in found.items() if r is not None}
            tiers |= {p: 3 for p, r in found.items() if r is not None}
            soon = reached | recording.postponed
            self._warn([p for p in individual if p not in soon and p in rows], len(losses))
        return Outcome({p: rows[p] for p in names if p in rows}, recording.gramian, tiers)

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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
