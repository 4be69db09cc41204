"""One backward: what the taps bring -> the rows of each parameter."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_jd.gramian.fallback import module_rows
from hf_jd.gramian.layouts import Segments, UnmappedError, arrange
from hf_jd.gramian.plan import LOOPED, Decision, Plan, Site
from hf_jd.gramian.rows import OuterRows, Rows
from hf_jd.gramian.taps import Call, ModuleTap


@dataclass
class Batch:
    """The instances of a step and whose they are.

    Attributes:
        instances: B.
        segments: Of the B instances, or of their tokens.
    """

    instances: int
    segments: Segments

    @property
    def conclusive(self) -> bool:
        """Whether a check can tell layouts apart: not with one objective."""
        return self.segments.objectives > 1


@dataclass
class Recording:
    """The rows that one backward brings.

    Args:
        plan: The engine's decisions.
        batch: The instances of the step.
        materialise: Whether rows are formed even where their factors are smaller.
        gramian_only: Rows become inner products at once and are dropped, but for `shared` parameters.
        shared: Parameters with several uses in the step, whose rows must add up first.
        probe: Random weights [R] of the self-check: sum_i r_i row_i is kept of each parameter.

    Attributes:
        rows: By parameter, the sum over its uses.
        sites: Where each parameter was met, with the layout read there.
        unmapped: Parameters met where no layout fits: tier 3 in this step.
        order: Modules in the order of the backward.
        dtypes: The dtype of the output gradient that each parameter met.
        tiers: 1 (closed form) or 2 (vjp of a module) of each parameter.
        probed: By parameter, the sum of rows weighted by the probe.
        gramian: The inner products of the rows that were dropped.
        reached: Parameters without a tap that the backward was asked for and found.
        busy: Whether a module is being called again to form rows, so that taps look away.
    """

    plan: Plan
    batch: Batch
    materialise: bool = True
    gramian_only: bool = False
    shared: set[nn.Parameter] = field(default_factory=set)
    probe: Tensor | None = None
    rows: dict[nn.Parameter, Rows] = field(default_factory=dict)
    sites: dict[nn.Parameter, dict[Site, str | None]] = field(default_factory=dict)
    unmapped: set[nn.Parameter] = field(default_factory=set)
    order: dict[nn.Module, None] = field(default_factory=dict)
    dtypes: dict[nn.Parameter, torch.dtype] = field(default_factory=dict)
    tiers: dict[nn.Parameter, int] = field(default_factory=dict)
    probed: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    gramian: Tensor | None = None
    reached: set[nn.Parameter] = field(default_factory=set)
    busy: bool = False
    _dropped: set[nn.Parameter] = field(default_factory=set)

    def record(
        self, tap: ModuleTap, call: Call, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
    ) -> None:
        """Takes what a tap met in the backward. Raises nothing for what it cannot map: that is left to tier 3."""
        targets = {n: p for n, p in tap.targets.items() if p.requires_grad and p not in self.plan.individual}
        first = next((g for g in grad_outputs if g is not None), None)
        if not targets or first is None:
            return
        self.order[tap.module] = None
        site = Site(tap.module, first.dim(), self.batch.conclusive)
        decision = self.plan.decide(tap, site, inputs)
        lead = tuple(first.shape[:-1] or first.shape)
        layout = self.plan.layout(site, lead, self.batch.instances)
        for parameter in targets.values():
            self.sites.setdefault(parameter, {})[site] = layout
            self.dtypes[parameter] = first.dtype
        found: dict[str, Rows] = {}
        if layout is not None:
            self.busy = True
            found = self._rows(tap, site, decision, layout, targets, call, inputs, grad_outputs)
            self.busy = False
        for name, parameter in targets.items():
            if name in found:
                self._add(parameter, found[name])
            else:
                self.unmapped.add(parameter)

    def _rows(
        self,
        tap: ModuleTap,
        site: Site,
        decision: Decision,
        layout: str,
        targets: dict[str, nn.Parameter],
        call: Call,
        inputs: Sequence[Tensor],
        grad_outputs: Sequence[Tensor | None],
    ) -> dict[str, Rows]:
        """The rows of the targets at one site, by its method or the next that works."""
        found: dict[str, Rows] = {}
        tier = 1
        try:
            if callable(decision.method):
                (g, x), segments = self._arranged(layout, grad_outputs[0], inputs[0])
                found = decision.method(tap.module, x, g, segments)
            remaining = {n: p for n, p in targets.items() if n not in found}
            if remaining:
                tier = 2
                tensors, gradients, segments = self._batch_first(layout, inputs, grad_outputs)
                vectorised = decision.method != LOOPED
                found.update(module_rows(tap.module, remaining, call, tensors, gradients, segments, vectorised))
        except torch.OutOfMemoryError:
            raise
        except UnmappedError:
            return {}
        except (RuntimeError, IndexError, TypeError, AttributeError):
            # The method does not fit this call: the shapes of a closed form, or what vmap cannot trace.
            if decision.method == LOOPED:
                return {}
            self.plan.fall_back(site)
            return self._rows(tap, site, decision, layout, targets, call, inputs, grad_outputs)
        for name, parameter in targets.items():
            self.tiers[parameter] = max(self.tiers.get(parameter, 1), tier if name in remaining else 1)
        return found

    def _arranged(self, layout: str, *tensors: Tensor) -> tuple[list[Tensor], Segments]:
        return arrange(layout, self.batch.segments, self.batch.instances, *tensors)

    def _batch_first(
        self, layout: str, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None], Segments]:
        """Tier 2 calls the module again, so its tensors stay as they are: the batch must lead them."""
        if layout.startswith("axis") and layout != "axis0":
            raise UnmappedError
        gradients = [g for g in grad_outputs if g is not None]
        _, segments = self._arranged(layout, gradients[0])
        if segments.by_token:
            raise UnmappedError
        return list(inputs), list(grad_outputs), segments

    def _add(self, parameter: nn.Parameter, rows: Rows) -> None:
        if isinstance(rows, OuterRows):
            rows = rows.settled(parameter.dtype, self.materialise)
        if self.probe is not None:
            part = rows.weighted_sum(self.probe)
            self.probed[parameter] = self.probed[parameter] + part if parameter in self.probed else part
        if not self.gramian_only or parameter in self.shared:
            self.rows[parameter] = self.rows[parameter] + rows if parameter in self.rows else rows
            return
        if parameter in self._dropped:
            self.shared.add(parameter)
        self._dropped.add(parameter)
        part = rows.gramian()
        self.gramian = part if self.gramian is None else self.gramian + part
