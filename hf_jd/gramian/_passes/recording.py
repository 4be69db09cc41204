"""Record one backward: events at the taps -> the rows of each parameter."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from hf_jd.gramian._passes.small_tensors import SmallTensors
from hf_jd.gramian._rules.methods import FINAL, VECTORISED, ClosedForm, Tier
from hf_jd.gramian._rules.plan import ModuleUse, Plan, RecordedUse, Waited
from hf_jd.gramian._rules.stacks import Stack, Stacker, kind_of
from hf_jd.gramian.functional_call import single_precision_gradients
from hf_jd.gramian.layouts import AXES, Batch, DrawsError, Layout, Segments, UnmappedError
from hf_jd.gramian.rows import DenseRows, OuterRows, Rows, accumulation_dtype
from hf_jd.gramian.sharding import is_partitioned
from hf_jd.gramian.taps import Call, ModuleTap, TapEvent

ROUNDED = 0.03  # a rule's largest error against float32 autograd on the same tensors, relative to the rows' norms


class Keep(Enum):
    """What to store of the rows of a backward."""

    ROWS = "rows"
    FACTORS = "factors"  # if they are smaller than rows
    GRAMIAN = "gramian"


@dataclass
class Recording:
    """The rows from one backward.

    Attributes:
        plan: The engine's decisions.
        batch: The instances of the step.
        keep: With `GRAMIAN`, rows become inner products at once and are dropped, except for `shared` parameters.
        shared: Parameters with several uses in the step, whose rows have to be added up first.
        asleep: Parameters whose gradient was zero at their last check.
        probe: Vectors [P, R] of the self-check. With a probe, only sum_i r_i row_i is stored per parameter and vector:
            the rows and the self-check's own backward would not fit in memory together.
        doubted: Parameters whose closed forms are compared with autograd in float32, layer by layer.
        rows: By parameter, the sum over its uses, or the stack that holds it.
        gramian: The inner products of the rows that were dropped.
        uses: Uses of modules, in the order of the backward.
        unmapped: Parameters used where no layout fits: tier 3 in this step.
        postponed: Unmapped parameters whose module draws random numbers; its next forward notes their state.
        reached: Parameters without a tap that have a gradient in this backward.
        tiers: 1 (closed form) or 2 (vjp of a module) of each parameter.
        awake: Members of `asleep` with rows other than zero.
        probed: By parameter, the sums of rows weighted by the probe.
        precisions: By parameter, with a probe: the dtypes that its modules computed with.
        refuted: Members of `doubted` whose rule failed that comparison.
    """

    plan: Plan
    batch: Batch
    keep: Keep
    shared: set[nn.Parameter] = field(default_factory=set)
    asleep: Set[nn.Parameter] = frozenset()
    probe: Tensor | None = None
    doubted: Set[nn.Parameter] = frozenset()
    rows: dict[nn.Parameter, Rows | Stack] = field(default_factory=dict, init=False)
    gramian: Tensor | None = field(default=None, init=False)
    uses: list[RecordedUse] = field(default_factory=list, init=False)
    unmapped: set[nn.Parameter] = field(default_factory=set, init=False)
    postponed: set[nn.Parameter] = field(default_factory=set, init=False)
    reached: set[nn.Parameter] = field(default_factory=set, init=False)
    tiers: dict[nn.Parameter, Tier] = field(default_factory=dict, init=False)
    awake: set[nn.Parameter] = field(default_factory=set, init=False)
    probed: dict[nn.Parameter, list[Tensor]] = field(default_factory=dict, init=False)
    precisions: dict[nn.Parameter, set[torch.dtype]] = field(default_factory=dict, init=False)
    refuted: set[nn.Parameter] = field(default_factory=set, init=False)
    _dropped: set[nn.Parameter] = field(default_factory=set, init=False)
    _embedded: list[tuple[Tensor, Segments]] = field(default_factory=list, init=False)
    _unbatched: list[tuple[ModuleUse, TapEvent]] = field(default_factory=list, init=False)
    _stacker: Stacker = field(init=False)
    _waiting: set[nn.Parameter] = field(default_factory=set, init=False)
    _sums: SmallTensors = field(default_factory=SmallTensors, init=False)
    _situation: tuple | None = field(init=False)

    def __post_init__(self) -> None:
        self._stacker = Stacker(self.batch)
        # What the decision to let a layer wait depends on, beside the event; None: each parameter needs a closer look.
        plain = self.probe is None and self.keep is not Keep.GRAMIAN and not self.asleep and not self.doubted
        segments = self.batch.segments
        shape = None if segments.ids is None else segments.ids.shape
        self._situation = (self.batch.instances, segments.distinguish, shape, self.keep) if plain else None

    @property
    def uses_of(self) -> dict[nn.Parameter, list[RecordedUse]]:
        """The uses of each parameter."""
        uses: dict[nn.Parameter, list[RecordedUse]] = {}
        for recorded in self.uses:
            for parameter in recorded.targets.values():
                uses.setdefault(parameter, []).append(recorded)
        return uses

    def record(self, event: TapEvent) -> None:
        """Form the rows of one event; parameters whose layout is unknown are left to tier 3, without an error."""
        if self._waits_again(event):
            return
        event = self._without_individual(event)
        first, targets = event.first, event.targets
        if first is None or not targets:
            return
        use = self.plan.use(event, first.shape, self.batch)
        layout = use.choose_layout(first.shape[:-1] or first.shape, self.batch.instances)
        self.uses.append(RecordedUse(targets, use, layout))
        if self.probe is not None:
            dtypes = _precisions(use.module, event.call, [*(event.inputs or ()), first])
            for parameter in targets.values():
                self.precisions.setdefault(parameter, set()).update(dtypes)
        if layout is None and use.is_closed and event.inputs is not None and len(event.inputs) == 1:
            self._unbatched.append((use, event))
            return
        kind = self._kind(use, layout, event)
        if kind is not None and self.plan.stacked.get(kind):
            if self._situation is not None:
                dtypes = [p.dtype for p in targets.values()]
                recorded = self.uses[-1]
                self.plan.waited[event.tap] = Waited(recorded, use.method, event.call, self._situation, kind, dtypes)
            self._wait(kind, event)
            return
        ModuleTap.look_away = True
        try:
            rows = {} if layout is None else self._form(use, layout, event)
        except DrawsError:
            event.tap.note_states(first.device)
            self.postponed.update(targets.values())
            rows = {}
        finally:
            ModuleTap.look_away = False
        if rows and layout is not None and isinstance(use.module, nn.Embedding):
            (batch_first,), segments = layout.arrange(self.batch, first)
            self._embedded.append((batch_first, segments))
        if kind is not None:
            dense = [part for part in rows.values() if type(part) is DenseRows or not _stays_outer(part, self.keep)]
            self.plan.stacked[kind] = use.is_closed and rows.keys() == targets.keys() and len(dense) == len(rows)
            if self.plan.stacked[kind]:
                # Stack a kind from its first step on: rounding is then the same in a resumed and an uninterrupted run.
                self._wait(kind, event)
                return
        self._take(targets, rows)

    def finish(self) -> None:
        """Form the rows of inputs without a batch dimension, once all gradients are known, and the waiting rows.

        Position embeddings are added to word embeddings, so their gradient is the word embeddings' gradient summed
        over the batch. If such a twin was recorded, its gradient still has the rows that the sum has lost.
        """
        for use, event in self._unbatched:
            assert event.first is not None
            assert event.inputs is not None
            x, g, targets = event.inputs[0], event.first, event.targets
            twin = next((pair for pair in self._embedded if _is_sum_of(g, pair[0])), None)
            rows: dict[str, Rows] = {}
            if twin is not None and isinstance(use.method, ClosedForm):
                one = x if x.shape[0] == 1 else x[None]
                with torch.no_grad():
                    x = one.expand(len(twin[0]), *one.shape[1:])
                    rows = dict(use.method.rule(use.module, x, *twin))
            self.tiers.update(dict.fromkeys((targets[name] for name in rows if name in targets), Tier.CLOSED))
            self.refuted |= self.doubted & set(targets.values())  # A twin's rows have no layer to check them.
            self._take(targets, rows)
        self._release()
        for parameter in self.unmapped & self._waiting:
            self._unstack(parameter)
        if self.keep is Keep.GRAMIAN:
            self.shared |= self.unmapped & self._dropped  # Tier 3 gives all their rows, but the Gramian has a part.

    def _waits_again(self, event: TapEvent) -> bool:
        """Let a layer wait whose last event waited in the same situation, without deciding again."""
        waited, plan = self.plan.waited.get(event.tap), self.plan
        if waited is None or waited.situation != self._situation or plan.several or plan.individual:
            return False
        targets = event.targets.values()
        if not waited.fits(event) or not self._waiting.isdisjoint(targets):
            return False
        if self.rows and not self.rows.keys().isdisjoint(targets):
            return False
        self.uses.append(waited.recorded)
        self._wait(waited.kind, event)
        return True

    def _kind(self, use: ModuleUse, layout: Layout | None, event: TapEvent) -> tuple | None:
        """Return what layers must share with this one to form their rows together; None if it can't be stacked."""
        if layout is not AXES[0] or self.keep is Keep.GRAMIAN or not isinstance(use.method, ClosedForm):
            return None
        kind, ids = kind_of(use.method.rule, event), self.batch.segments.ids
        if kind is None:
            return None
        for parameter in event.targets.values():
            if not self._may_wait(parameter):
                return None
        if ids is not None and ids.dim() == 2 and kind[1][1:2] != ids.shape[1:]:
            return None
        return (*kind, ids is None, self.keep is Keep.ROWS)  # These decide whether rows stay factors.

    def _wait(self, kind: tuple, event: TapEvent) -> None:
        self._waiting.update(event.targets.values())
        self._stacker.wait(kind, event)
        if self._stacker.is_full:
            self._release()

    def _without_individual(self, event: TapEvent) -> TapEvent:
        individual = self.plan.individual
        for parameter in event.targets.values():
            if not parameter.requires_grad or (individual and parameter in individual):
                wanted = {n: p for n, p in event.targets.items() if p.requires_grad and p not in individual}
                return event._replace(targets=wanted)
        return event

    def _take(self, targets: Mapping[str, nn.Parameter], rows: dict[str, Rows]) -> None:
        self.unmapped.update(targets[name] for name in targets.keys() - rows.keys())
        for name in list(rows):
            part = rows.pop(name)  # Free these factors before the next parameter's become rows.
            if name in targets:
                self._add(targets[name], part)

    def _form(self, use: ModuleUse, layout: Layout, event: TapEvent) -> dict[str, Rows]:
        """Form the targets' rows at one use, by its method or the next one that works."""
        while True:
            method = use.method
            if not isinstance(method, ClosedForm) and is_partitioned(event.targets.values()):
                return {}  # Calling the module would gather its parameters on this process alone.
            if event.inputs is None and not method.mistakes:
                return {}
            try:
                return self._form_by_method(use, layout, event)
            except FINAL as error:
                if type(error) is UnmappedError:
                    return {}
                raise
            except method.mistakes:
                # Shapes that a closed form can't handle, code that vmap can't trace, a module that can't be called
                # again: the next method may fit, and the self-check has the last word.
                if method.next is None or event.inputs is None:
                    return {}
                use.fall_back()

    def _form_by_method(self, use: ModuleUse, layout: Layout, event: TapEvent) -> dict[str, Rows]:
        rows: dict[str, Rows] = {}
        if isinstance(use.method, ClosedForm):
            rows = dict(use.method.rows(event, layout, self.batch))
            if self.doubted and not self.doubted.isdisjoint(event.targets.values()):
                self._prove_rule(event, layout, rows)
        for name, parameter in event.targets.items():
            self.tiers[parameter] = Tier.CLOSED if name in rows else Tier.MODULE
        if event.targets.keys() <= rows.keys():
            return rows
        # During a backward, a sharded parameter's module holds the whole parameter.
        rest = {name: use.module.get_parameter(name) for name in event.targets if name not in rows}
        if is_partitioned(rest.values()):
            return rows
        method = VECTORISED if isinstance(use.method, ClosedForm) else use.method
        return rows | method.rows(event._replace(targets=rest), layout, self.batch)

    def _prove_rule(self, event: TapEvent, layout: Layout, rows: Mapping[str, Rows]) -> None:
        """Compare a rule's rows with autograd through a float32 copy of the layer, on the same tensors."""
        assert self.probe is not None
        assert event.first is not None
        (g, *xs), segments = layout.arrange(self.batch, event.first, *(event.inputs or ()))
        r = self.probe[0].to(accumulation_dtype(g))
        doubted = {name: p for name, p in event.targets.items() if name in rows and p in self.doubted}
        try:
            gradients = single_precision_gradients(event, list(doubted), xs, segments.spread(r, g) * g)
        except Exception:
            self.refuted.update(doubted.values())  # The layer can't be called like this, for whatever reason.
            return
        for name, parameter in doubted.items():
            error = float((rows[name].weighted_sum(r).float() - gradients[name]).norm())
            # Each row is rounded by itself, so the error scales with the rows' norms, not with their sum's.
            if not error <= ROUNDED * math.sqrt(float(r.double().square() @ rows[name].gramian().diagonal().double())):
                self.refuted.add(parameter)

    def _add(self, parameter: nn.Parameter, rows: Rows) -> None:
        materialise = self.keep is Keep.ROWS
        rows = rows.compact(parameter.dtype, materialise)
        if self.keep is not Keep.GRAMIAN and self._may_wait(parameter) and self._stacker.take(parameter, rows):
            self._waiting.add(parameter)
            return
        if parameter in self.asleep and bool(rows.gramian().any()):
            self.awake.add(parameter)
        if self.probe is not None:
            self._weigh(parameter, [rows.weighted_sum(r) for r in self.probe])
        elif self.keep is not Keep.GRAMIAN or parameter in self.shared:
            before = self._unstack(parameter)
            self.rows[parameter] = rows if before is None else before + rows
        else:
            if parameter in self._dropped:
                self.shared.add(parameter)
            self._dropped.add(parameter)
            part = rows.gramian()
            self.gramian = part if self.gramian is None else self.gramian + part

    def _may_wait(self, parameter: nn.Parameter) -> bool:
        """Return whether rows may join other parameters' rows: not if uses add up, or a proof needs each one."""
        if (self.asleep or self.doubted or self.plan.several) and self._is_special(parameter):
            return False
        if parameter in self._waiting or (self.rows and parameter in self.rows):
            self.plan.several.add(parameter)
            return False
        return True

    def _is_special(self, parameter: nn.Parameter) -> bool:
        return parameter in self.asleep or parameter in self.doubted or parameter in self.plan.several

    def _release(self) -> None:
        for stack in self._stacker.release():
            members = dict.fromkeys(stack.members, stack)
            self.tiers = dict.fromkeys(members, Tier.CLOSED) | self.tiers
            if self.probe is None:
                self.rows.update(members)
                continue
            sums = [stack.weighted_sums(r) for r in self.probe]
            for parameter, *parts in zip(stack.members, *sums, strict=True):
                self._weigh(parameter, parts)

    def _weigh(self, parameter: nn.Parameter, parts: list[Tensor]) -> None:
        before = self.probed.get(parameter)
        sums = parts if before is None else [a + b for a, b in zip(before, parts, strict=True)]
        self.probed[parameter] = [self._sums.store(part) for part in sums]

    def _unstack(self, parameter: nn.Parameter) -> Rows | None:
        """Return a parameter's rows so far, to add to or leave out; take their stack apart."""
        if parameter in self._waiting:
            self._release()
        rows = self.rows.get(parameter)
        if isinstance(rows, Stack):
            self.rows.update({p: rows.apart(p) for p in rows.members})
            rows = self.rows[parameter]
            assert not isinstance(rows, Stack)
        return rows


def _stays_outer(rows: Rows, keep: Keep) -> bool:
    return type(rows) is not OuterRows or rows.stay_factors(materialise=keep is Keep.ROWS)


def _precisions(module: nn.Module, call: Call, tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """Return the dtypes that a call computed with."""
    dtypes = {t.dtype for t in (*tensors, *module.parameters()) if t.is_floating_point()}
    _, autocast, enabled = call.autocast
    return dtypes | {autocast} if enabled else dtypes


def _is_sum_of(total: Tensor, parts: Tensor) -> bool:
    """Return whether a gradient [1, T, d] or [T, d] is the sum of N rows [N, T, d]."""
    if parts.shape[1:] != total.shape[total.dim() - parts.dim() + 1 :]:
        return False
    if total.numel() * len(parts) != parts.numel():
        return False
    added = parts.sum(0).view(total.shape)
    return bool((added - total).norm() <= 0.02 * total.norm())
