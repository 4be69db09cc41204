"""One backward: what the taps bring -> the rows of each parameter."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_jd.gramian.fallback import linear_rows, module_rows, single_precision_gradients
from hf_jd.gramian.layouts import DrawsError, Segments, UnmappedError, UnsupportedError, arrange
from hf_jd.gramian.plan import LINEAR, LOOPED, Plan, Site
from hf_jd.gramian.rows import Rows, accumulation_dtype
from hf_jd.gramian.sharding import is_partitioned
from hf_jd.gramian.taps import Call, ModuleTap

ROUNDED = 0.03  # of the rows' norms, how far a rule may be from autograd in float32 on the same half-precision tensors


@dataclass
class Batch:
    """The instances of a step and whose they are.

    Attributes:
        instances: B.
        segments: Of the B instances, or of their tokens.
    """

    instances: int
    segments: Segments


@dataclass
class Meeting:
    """One meeting of a module's input and output gradient in the backward.

    Attributes:
        targets: The parameters whose rows it brings, by name.
        site: The module, and how its rows are formed.
        layout: How its tensors held the batch; None where no layout fits.
    """

    targets: Mapping[str, nn.Parameter]
    site: Site
    layout: str | None


class Recording:
    """The rows that one backward brings.

    Args:
        plan: The engine's decisions.
        batch: The instances of the step.
        materialise: Whether rows are formed even where their factors are smaller.
        gramian_only: Rows become inner products at once and are dropped, but for `shared` parameters.
        shared: Parameters with several uses in the step, whose rows must add up first.
        asleep: Parameters whose gradient was zero when they were last looked at.
        probe: Vectors [P, R] of the self-check: sum_i r_i row_i is kept of each parameter and vector, in the place of
            its rows, beside which the self-check's own backward would not find room.
        doubted: Parameters whose closed forms are compared with autograd in float32, layer by layer.

    Attributes:
        rows: By parameter, the sum over its uses.
        gramian: The inner products of the rows that were dropped.
        meetings: What was met, in the order of the backward.
        unmapped: Parameters met where no layout fits: tier 3 in this step.
        postponed: Those of them whose module draws random numbers, which its next forward notes.
        reached: Parameters without a tap that the backward was asked for and found.
        tiers: 1 (closed form) or 2 (vjp of a module) of each parameter.
        awake: Those of `asleep` that have rows other than zero.
        probed: By parameter, the sums of rows weighted by the probe.
        precisions: By parameter, with a probe: the dtypes that its modules computed with.
        refuted: Those of `doubted` that were not proved so.
    """

    def __init__(
        self,
        plan: Plan,
        batch: Batch,
        materialise: bool,
        gramian_only: bool,
        shared: set[nn.Parameter],
        asleep: Set[nn.Parameter],
        probe: Tensor | None = None,
        doubted: Set[nn.Parameter] = frozenset(),
    ):
        self.batch, self.materialise, self.gramian_only = batch, materialise, gramian_only
        self.shared, self.asleep, self.probe, self.doubted = shared, asleep, probe, doubted
        self.awake: set[nn.Parameter] = set()
        self.rows: dict[nn.Parameter, Rows] = {}
        self.gramian: Tensor | None = None
        self.meetings: list[Meeting] = []
        self.unmapped: set[nn.Parameter] = set()
        self.postponed: set[nn.Parameter] = set()
        self.reached: set[nn.Parameter] = set()
        self.tiers: dict[nn.Parameter, int] = {}
        self.probed: dict[nn.Parameter, list[Tensor]] = {}
        self.precisions: dict[nn.Parameter, set[torch.dtype]] = {}
        self.refuted: set[nn.Parameter] = set()
        self._plan = plan
        self._dropped: set[nn.Parameter] = set()
        self._embedded: list[tuple[Tensor, Segments]] = []
        self._unbatched: list[tuple[Site, Mapping[str, nn.Parameter], Tensor, Tensor]] = []

    @property
    def met(self) -> dict[nn.Parameter, list[Meeting]]:
        """The meetings of each parameter."""
        found: dict[nn.Parameter, list[Meeting]] = {}
        for meeting in self.meetings:
            for parameter in meeting.targets.values():
                found.setdefault(parameter, []).append(meeting)
        return found

    def record(
        self,
        tap: ModuleTap,
        targets: Mapping[str, nn.Parameter],
        call: Call,
        inputs: Sequence[Tensor] | None,
        grad_outputs: Sequence[Tensor | None],
    ) -> None:
        """Takes what a tap met in the backward. Raises nothing for what it cannot map: that is left to tier 3.

        Inputs are None where the model has changed them in place since.
        """
        first = next((g for g in grad_outputs if g is not None), None)
        individual = self._plan.individual
        if any(p in individual or not p.requires_grad for p in targets.values()):
            targets = {name: p for name, p in targets.items() if p not in individual and p.requires_grad}
        if first is None or not targets:
            return
        lead, conclusive = first.shape[:-1] or first.shape, self.batch.segments.distinguish
        plain = lead[:1] == (self.batch.instances,)
        site = self._plan.site(tap, call.modes, first.dim(), plain, conclusive, inputs or ())
        layout = site.choose_layout(lead, self.batch.instances)
        self.meetings.append(Meeting(targets, site, layout))
        if self.probe is not None:
            dtypes = _precisions(site.module, call, [*(inputs or ()), first])
            for parameter in targets.values():
                self.precisions.setdefault(parameter, set()).update(dtypes)
        if layout is None and not isinstance(site.method, str) and inputs is not None and len(inputs) == 1:
            self._unbatched.append((site, targets, inputs[0], first))
            return
        if isinstance(site.module, nn.Embedding) and layout is not None:
            self._embedded.append(self._batch_first(layout, first))
        ModuleTap.look_away = True
        try:
            found = {} if layout is None else self._rows(site, layout, targets, call, inputs, grad_outputs)
        except DrawsError:
            tap.note_states(first.device)
            self.postponed.update(targets.values())
            found = {}
        finally:
            ModuleTap.look_away = False
        self._take(targets, found)

    def finish(self) -> None:
        """Forms the rows of inputs without a batch dimension, once all gradients are known.

        Position embeddings are added to word embeddings, so the gradient that reaches them is that of the word
        embeddings summed over the batch: where such a twin was met, it has the rows that the sum has lost.
        """
        for site, targets, x, g in self._unbatched:
            twin = next((found for found in self._embedded if _is_sum_of(g, found[0])), None)
            found: dict[str, Rows] = {}
            if twin is not None and not isinstance(site.method, str):
                one = x if x.shape[0] == 1 else x[None]
                with torch.no_grad():
                    found = dict(site.method(site.module, one.expand(len(twin[0]), *one.shape[1:]), *twin))
            self.tiers.update(dict.fromkeys((targets[name] for name in found if name in targets), 1))
            self.refuted |= self.doubted & set(targets.values())  # A twin's gradient is no input of the layer.
            self._take(targets, found)
        if self.gramian_only:
            self.shared |= self.unmapped & self._dropped  # Their part is in the Gramian, and all their rows will come.

    def _batch_first(self, layout: str, gradient: Tensor) -> tuple[Tensor, Segments]:
        (moved,), segments = arrange(layout, self.batch.segments, self.batch.instances, gradient)
        return moved, segments

    def _take(self, targets: Mapping[str, nn.Parameter], found: dict[str, Rows]) -> None:
        self.unmapped.update(parameter for name, parameter in targets.items() if name not in found)
        for name in list(found):
            rows = found.pop(name)  # Factors are let go before those of the next parameter become rows.
            if name in targets:
                self._add(targets[name], rows)

    def _rows(
        self,
        site: Site,
        layout: str,
        targets: Mapping[str, nn.Parameter],
        call: Call,
        inputs: Sequence[Tensor] | None,
        grad_outputs: Sequence[Tensor | None],
    ) -> dict[str, Rows]:
        """The rows of the targets at one site, by its method or the next that works."""
        while True:
            if isinstance(site.method, str) and is_partitioned(targets.values()):
                return {}  # Calling a module would gather its parameters, on this process alone.
            try:
                return self._try_method(site, layout, targets, call, inputs or (), grad_outputs)
            except (torch.OutOfMemoryError, UnsupportedError, DrawsError):
                raise
            except UnmappedError:
                return {}
            except Exception:
                # The method does not fit this call: the shapes of a closed form, what vmap cannot trace, a module that
                # cannot be called again. The next one may, and the self-check has the last word.
                if site.method == LOOPED or inputs is None:
                    return {}
                site.fall_back()

    def _try_method(
        self,
        site: Site,
        layout: str,
        targets: Mapping[str, nn.Parameter],
        call: Call,
        inputs: Sequence[Tensor],
        grad_outputs: Sequence[Tensor | None],
    ) -> dict[str, Rows]:
        found: dict[str, Rows] = {}
        first = next(g for g in grad_outputs if g is not None)
        if not isinstance(site.method, str):
            (g, *xs), segments = arrange(layout, self.batch.segments, self.batch.instances, first, *inputs)
            found = dict(site.method(site.module, xs[0] if len(xs) == 1 else xs, g, segments))
            for name, rows in found.items():
                if name in targets and not rows.fits(targets[name], segments.objectives):
                    raise RuntimeError(f"the rule's rows of {name} have another shape than the parameter")
            if not self.doubted.isdisjoint(targets.values()):
                self._prove_rule(site.module, targets, call, xs, g, segments, found)
        for name, parameter in targets.items():
            self.tiers[parameter] = 1 if name in found else 2
        # In a backward, a sharded parameter's module holds the whole one.
        rest = {name: site.module.get_parameter(name) for name in targets if name not in found}
        if rest and not is_partitioned(rest.values()):
            _, segments = arrange(layout, self.batch.segments, self.batch.instances, first)
            axis = int(layout[4:]) if layout.startswith("axis") else 0
            again = (site.module, rest, call, inputs, grad_outputs, segments, axis)
            if site.method == LINEAR:
                found |= linear_rows(*again)
            else:
                found |= module_rows(*again, vectorised=site.method != LOOPED)
        return found

    def _prove_rule(
        self,
        module: nn.Module,
        targets: Mapping[str, nn.Parameter],
        call: Call,
        inputs: Sequence[Tensor],
        grad_output: Tensor,
        segments: Segments,
        found: Mapping[str, Rows],
    ) -> None:
        """Compares a rule's rows with autograd through a copy of the layer in float32, from the same tensors."""
        assert self.probe is not None
        r = self.probe[0].to(accumulation_dtype(grad_output))
        doubted = {name: p for name, p in targets.items() if name in found and p in self.doubted}
        weighted = segments.spread(r, grad_output) * grad_output
        try:
            gradients = single_precision_gradients(module, doubted, call, inputs, weighted)
        except Exception:
            self.refuted.update(doubted.values())  # A layer that can't be called so, for whatever reason: no proof.
            return
        for name, parameter in doubted.items():
            rows = found[name]
            error = float((rows.weighted_sum(r).float() - gradients[name]).norm())
            # Rows are rounded one by one: relative to them, not to their sum.
            if not error <= ROUNDED * math.sqrt(float(r.double().square() @ rows.gramian().diagonal().double())):
                self.refuted.add(parameter)

    def _add(self, parameter: nn.Parameter, rows: Rows) -> None:
        rows = rows.settled(parameter.dtype, self.materialise)
        if parameter in self.asleep and bool(rows.gramian().any()):
            self.awake.add(parameter)
        if self.probe is not None:
            parts = [rows.weighted_sum(r) for r in self.probe]
            before = self.probed.get(parameter)
            self.probed[parameter] = parts if before is None else [a + b for a, b in zip(before, parts, strict=True)]
            return
        if not self.gramian_only or parameter in self.shared:
            self.rows[parameter] = self.rows[parameter] + rows if parameter in self.rows else rows
            return
        if parameter in self._dropped:
            self.shared.add(parameter)
        self._dropped.add(parameter)
        part = rows.gramian()
        self.gramian = part if self.gramian is None else self.gramian + part


def _precisions(module: nn.Module, call: Call, tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes that a call computed with."""
    dtypes = {t.dtype for t in (*tensors, *module.parameters()) if t.is_floating_point()}
    _, autocast, enabled = call.autocast
    return dtypes | {autocast} if enabled else dtypes


def _is_sum_of(total: Tensor, parts: Tensor) -> bool:
    """Whether a gradient [1, T, d] or [T, d] is that of the rows of [N, T, d], added up."""
    if parts.shape[1:] != total.shape[total.dim() - parts.dim() + 1 :]:
        return False
    if total.numel() * len(parts) != parts.numel():
        return False
    added = parts.sum(0).view(total.shape)
    return bool((added - total).norm() <= 0.02 * total.norm())
