"""What an engine has learnt about its modules: the method and the layout that form each one's rows.

Decisions are tried in order (a closed form in each layout that the shapes allow, then the module's vjp in each layout,
then one differentiation per objective), until the self-check confirms one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from hf_jd.gramian._rules import RULES, Rule
from hf_jd.gramian._rules.experts import experts, is_experts
from hf_jd.gramian._rules.methods import LINEAR_MAPS, ClosedForm, Method
from hf_jd.gramian._rules.recognition import recognise
from hf_jd.gramian.layouts import AXES, Batch, Layout, candidates
from hf_jd.gramian.sharding import layer_type
from hf_jd.gramian.taps import Call, ModuleTap, TapEvent


@dataclass(eq=False)
class ModuleUse:
    """One way in which a module is used, and the decision for it.

    Attributes:
        module: The module.
        method: How its rows are formed.
        layout: How its tensors hold the batch; None: not yet decided, or no layout fits.
        rejected: Layouts that failed with this method.
        proved: The (parameter, layout, training) that a self-check has confirmed.
        vacuous: The same where the gradient was too small to prove anything, and how often they were used since.
    """

    module: nn.Module
    method: Method
    layout: Layout | None = None
    rejected: set[Layout] = field(default_factory=set)
    proved: set[tuple[nn.Parameter, Layout | None, bool]] = field(default_factory=set)
    vacuous: dict[tuple[nn.Parameter, Layout | None, bool], int] = field(default_factory=dict)

    @property
    def is_closed(self) -> bool:
        """Whether a rule forms the rows, without calling the module again."""
        return isinstance(self.method, ClosedForm)

    def fall_back(self) -> None:
        """Switch to the next method. Raise AssertionError if there is none."""
        assert self.method.next is not None
        self.method = self.method.next
        self.rejected.clear()

    def layout_for(self, lead: Sequence[int], instances: int) -> Layout | None:
        """Return the current layout for a call's tensors; None if the shapes allow none that hasn't been rejected.

        Args:
            lead: Dimensions of the output gradient, without the last.
            instances: B.
        """
        if self.layout is AXES[0] and lead[0] == instances:
            return self.layout
        possible = [c for c in candidates(lead, instances) if c not in self.rejected]
        return self.layout if self.layout in possible else next(iter(possible), None)

    def choose_layout(self, lead: Sequence[int], instances: int) -> Layout | None:
        """Decide on `layout_for`'s layout; if all layouts were rejected, on the next method and its first layout."""
        self.layout = self.layout_for(lead, instances)
        # The vjp of a table would hold rows of its full size.
        if self.layout is None and self.method.next is not None and not isinstance(self.module, nn.Embedding):
            layouts = candidates(lead, instances)
            if layouts:
                self.fall_back()
                self.layout = layouts[0]
        return self.layout


@dataclass(frozen=True)
class RecordedUse:
    """One use of a module, as a backward recorded it.

    Attributes:
        targets: The parameters whose rows it gives, by name.
        use: The module, and how its rows are formed.
        layout: How its tensors hold the batch; None if no layout fits.
    """

    targets: Mapping[str, nn.Parameter]
    use: ModuleUse
    layout: Layout | None


class Waited(NamedTuple):
    """A small layer's last event that waited to be stacked: the same event waits again in the same situation.

    Attributes:
        recorded: Its use.
        method: Of the use, at that time.
        call: How the layer was called.
        situation: What else decided.
        kind: What the layers of its stack have in common (`stacks.kind_of`).
        dtypes: The parameters'.
    """

    recorded: RecordedUse
    method: Method
    call: Call
    situation: tuple
    kind: tuple
    dtypes: list[torch.dtype]

    def fits(self, event: TapEvent) -> bool:
        """Return whether the event is of the same kind, and nothing was decided about its use since."""
        recorded, g = self.recorded, event.grad_outputs[0]
        if event.call is not self.call or event.targets is not recorded.targets or event.inputs is None or g is None:
            return False
        if recorded.use.method is not self.method or recorded.use.layout is not recorded.layout:
            return False
        x = event.inputs[0]
        if (x.shape, g.shape, x.dtype, g.dtype) != self.kind[1:5]:
            return False
        for parameter, dtype in zip(event.targets.values(), self.dtypes, strict=True):
            if not parameter.requires_grad or parameter.dtype is not dtype:
                return False
        return True


# Module, modes, rank of the output gradient, whether it has one leading row per instance, whether there are several
# objectives.
_Key = tuple[nn.Module, tuple[bool, ...], int, bool, bool]


class Plan:
    """The decisions of one engine.

    Args:
        rules: Closed forms by exact type.

    Attributes:
        individual: Parameters that only tier 3 gets right.
        several: Parameters whose rows were the sum of several uses.
        stacked: Whether rows are formed together, by the layers' `kind_of`.
        waited: By tap, its last event that waited for this.
    """

    def __init__(self, rules: Mapping[type[nn.Module], Rule]):
        self.rules = rules
        self.individual: set[nn.Parameter] = set()
        self.several: set[nn.Parameter] = set()
        self.stacked: dict[tuple, bool] = {}
        self.waited: dict[ModuleTap, Waited] = {}
        self._uses: dict[_Key, ModuleUse] = {}

    def use(self, event: TapEvent, shape: torch.Size, batch: Batch) -> ModuleUse:
        """Return the use of a module that an event belongs to; the first event decides on its method.

        Args:
            event: From the module's tap.
            shape: Of the output gradient.
            batch: The instances of the step.
        """
        key = _key(event.tap, event.call.modes, shape, batch)
        use = self._uses.get(key)
        if use is None:
            use = self._uses[key] = ModuleUse(event.tap.module, self._method(event))
        return use

    def past_use(self, tap: ModuleTap, modes: tuple[bool, ...], shape: torch.Size, batch: Batch) -> ModuleUse | None:
        """Return the use, if it has been recorded before."""
        return self._uses.get(_key(tap, modes, shape, batch))

    def reject(self, wrong: Mapping[nn.Parameter, Sequence[ModuleUse]]) -> None:
        """Revoke one decision behind each parameter's wrong rows; parameters without any left go to tier 3.

        Args:
            wrong: The parameters and their uses. Parameters with a common use share its decision.
        """
        revoked: set[ModuleUse] = set()
        undecided: set[nn.Parameter] = set()
        for parameter, uses in wrong.items():
            if not revoked.isdisjoint(uses):
                continue
            decided = [(use, use.layout) for use in uses if use.layout is not None]
            if not decided:
                undecided.add(parameter)
                continue
            # The order of several rows per instance is a guess: revoke it before a dimension of the right size.
            use, layout = next((pair for pair in decided if pair[1].is_repeated), decided[0])
            use.rejected.add(layout)
            use.layout = None
            revoked.add(use)
        # Rows without a layout come from word embeddings, whose layout may have been wrong: revoke that one first.
        if not revoked:
            self.individual |= undecided

    def _method(self, event: TapEvent) -> Method:
        module, inputs = event.tap.module, event.inputs or ()
        kind = layer_type(module)
        if kind in self.rules:
            rule = self.rules[kind]
            return ClosedForm(rule, is_trusted=rule is not RULES.get(kind))
        if is_experts(module, inputs):
            return ClosedForm(experts)
        if len(inputs) != 1 or any("." in name for name in event.tap.targets):
            return LINEAR_MAPS
        rule = recognise(module, inputs[0])
        return LINEAR_MAPS if rule is None else ClosedForm(rule)


def _key(tap: ModuleTap, modes: tuple[bool, ...], shape: torch.Size, batch: Batch) -> _Key:
    """Return a key for calls of a module that share a decision.

    In another mode, a module may compute something else. An encoder called with B queries and with 2B passages holds
    the batch in two ways. And if all instances belong to one objective, no check can tell layouts apart: its approval
    holds for such steps only.
    """
    return tap.module, modes, len(shape), shape[:1] == (batch.instances,), batch.segments.distinguish
