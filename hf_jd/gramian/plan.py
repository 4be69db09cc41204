"""What an engine has learnt about its modules: by which method and in which layout each one's rows come.

Decisions are tried in order (closed rule in each layout that shapes allow, then the vjp of the module in each layout,
then one differentiation per objective) and kept once the self-check has proved them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_jd.gramian.layouts import AXES, Batch, Layout, candidates
from hf_jd.gramian.methods import LINEAR_MAPS, ClosedForm, Method
from hf_jd.gramian.routed import experts, is_experts
from hf_jd.gramian.rules import RULES, Rule, recognise
from hf_jd.gramian.sharding import layer_type
from hf_jd.gramian.taps import ModuleTap, TapEvent


@dataclass(eq=False)
class ModuleUse:
    """One way in which a module is used, and the decision for it.

    Attributes:
        module: The module.
        method: How its rows are formed.
        layout: How its tensors hold the batch; None: not yet decided, or no layout fits.
        rejected: Layouts that were tried in vain with this method.
        proved: (parameter, layout, training) that a self-check has proved.
        vacuous: The same where the gradient was too small to prove anything, and how often it was met since.
    """

    module: nn.Module
    method: Method
    layout: Layout | None = None
    rejected: set[Layout] = field(default_factory=set)
    proved: set[tuple[nn.Parameter, Layout | None, bool]] = field(default_factory=set)
    vacuous: dict[tuple[nn.Parameter, Layout | None, bool], int] = field(default_factory=dict)

    @property
    def is_closed(self) -> bool:
        """Whether a rule forms the rows, and the module is not called again."""
        return isinstance(self.method, ClosedForm)

    def fall_back(self) -> None:
        """Takes the next method. Raises AssertionError where there is none."""
        assert self.method.next is not None
        self.method = self.method.next
        self.rejected.clear()

    def layout_for(self, lead: Sequence[int], instances: int) -> Layout | None:
        """The layout to read a call's tensors in, as things stand; None where shapes allow none that was not rejected.

        Args:
            lead: Dimensions of the output gradient but for the last.
            instances: B.
        """
        if self.layout is AXES[0] and lead[0] == instances:
            return self.layout
        possible = [c for c in candidates(lead, instances) if c not in self.rejected]
        return self.layout if self.layout in possible else next(iter(possible), None)

    def choose_layout(self, lead: Sequence[int], instances: int) -> Layout | None:
        """Decides for `layout_for`; where all layouts that shapes allow were rejected, for the next method's first."""
        self.layout = self.layout_for(lead, instances)
        # The vjp of a table would hold rows of its full size.
        if self.layout is None and self.method.next is not None and not isinstance(self.module, nn.Embedding):
            found = candidates(lead, instances)
            if found:
                self.fall_back()
                self.layout = found[0]
        return self.layout


# Module, modes, rank of the output gradient, whether it has one leading row per instance, whether objectives differ.
_Key = tuple[nn.Module, tuple[bool, ...], int, bool, bool]


class Plan:
    """The decisions of one engine.

    Args:
        rules: Closed forms by exact type.

    Attributes:
        individual: Parameters that only tier 3 gets right.
        several: Parameters whose rows were added up from several uses.
        stacked: By `kind_of` layers, whether their rows are formed together.
    """

    def __init__(self, rules: Mapping[type[nn.Module], Rule]):
        self.rules = rules
        self.individual: set[nn.Parameter] = set()
        self.several: set[nn.Parameter] = set()
        self.stacked: dict[tuple, bool] = {}
        self._uses: dict[_Key, ModuleUse] = {}

    def use(self, event: TapEvent, shape: torch.Size, batch: Batch) -> ModuleUse:
        """The use of a module that an event shows; its decision is made when it is met first.

        Args:
            event: Of the module's tap.
            shape: Of the output gradient.
            batch: The instances of the step.
        """
        key = _key(event.tap, event.call.modes, shape, batch)
        found = self._uses.get(key)
        if found is None:
            found = self._uses[key] = ModuleUse(event.tap.module, self._method(event))
        return found

    def known_use(self, tap: ModuleTap, modes: tuple[bool, ...], shape: torch.Size, batch: Batch) -> ModuleUse | None:
        """The use, if it was met before."""
        return self._uses.get(_key(tap, modes, shape, batch))

    def reject(self, wrong: Mapping[nn.Parameter, Sequence[ModuleUse]]) -> None:
        """Takes back one decision behind each parameter's wrong rows; where none is left, it goes to tier 3.

        Args:
            wrong: The parameters and the uses in which they were met. Parameters that share one share its decision.
        """
        taken_back: set[ModuleUse] = set()
        undecided: set[nn.Parameter] = set()
        for parameter, uses in wrong.items():
            if not taken_back.isdisjoint(uses):
                continue
            decided = [(use, use.layout) for use in uses if use.layout is not None]
            if not decided:
                undecided.add(parameter)
                continue
            # The order of several rows per instance is a guess: doubt it before a dimension that has their number.
            use, layout = next((pair for pair in decided if pair[1].is_repeated), decided[0])
            use.rejected.add(layout)
            use.layout = None
            taken_back.add(use)
        # Rows without a layout of their own come from those of word embeddings, which may have been in a wrong one.
        if not taken_back:
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
    """What calls of a module must have in common to share a decision.

    In another mode a module may compute something else. An encoder that is called with B queries and with 2B passages
    holds the batch in two ways. And where all instances belong to one objective, no check can tell layouts apart: what
    it approves is kept for such steps only.
    """
    return tap.module, modes, len(shape), shape[:1] == (batch.instances,), batch.segments.distinguish
