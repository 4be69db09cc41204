"""What an engine has learnt about its modules: by which tier and in which layout each parameter's rows come.

Decisions are tried in order (closed rule in each layout that shapes allow, then the vjp of the module in each layout,
then one differentiation an objective) and kept once the self-check has proved them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_jd.gramian.layouts import candidates
from hf_jd.gramian.rules import Rule, recognise
from hf_jd.gramian.taps import ModuleTap

VECTORISED, LOOPED = "vmap", "loop"


@dataclass(frozen=True)
class Site:
    """One way in which a module is met: what a decision is kept for.

    Attributes:
        module: The module.
        rank: Dimensions of its output gradient.
        conclusive: Whether the step has several objectives; with one, no check can tell layouts apart.
    """

    module: nn.Module
    rank: int
    conclusive: bool


@dataclass
class Decision:
    """How rows are formed at a site: by a rule or by the module's vjp, in a layout; and what was tried in vain."""

    method: Rule | str
    layout: str | None = None
    rejected: set[str] = field(default_factory=set)


class Plan:
    """The decisions of one engine.

    Args:
        rules: Closed forms by exact type.

    Attributes:
        individual: Parameters that only tier 3 gets right.
    """

    def __init__(self, rules: Mapping[type[nn.Module], Rule]):
        self.rules = rules
        self.individual: set[nn.Parameter] = set()
        self._decisions: dict[Site, Decision] = {}

    def decide(self, tap: ModuleTap, site: Site, inputs: tuple[Tensor, ...]) -> Decision:
        """The decision for a site, made when it is met first."""
        if site not in self._decisions:
            self._decisions[site] = Decision(self._rule(tap, inputs) or VECTORISED)
        return self._decisions[site]

    def layout(self, site: Site, lead: Sequence[int], instances: int) -> str | None:
        """The layout to read this call's tensors in; None where the shapes allow none that was not rejected."""
        decision = self._decisions[site]
        found = candidates(lead, instances)
        possible = [c for c in found if c not in decision.rejected]
        # The vjp of a table would hold rows of its full size.
        if found and not possible and decision.method != LOOPED and not isinstance(site.module, nn.Embedding):
            self.fall_back(site)
            possible = found
        if decision.layout not in possible:
            decision.layout = possible[0] if possible else None
        return decision.layout

    def fall_back(self, site: Site) -> None:
        """From a closed form to vmap, from vmap to the loop."""
        decision = self._decisions[site]
        decision.method = LOOPED if decision.method == VECTORISED else VECTORISED
        decision.rejected.clear()

    def reject(self, parameter: nn.Parameter, sites: Iterable[Site]) -> None:
        """Takes back one decision behind a parameter's wrong rows; once none is left, the parameter goes to tier 3."""
        for site in sites:
            decision = self._decisions[site]
            if decision.layout is not None:
                decision.rejected.add(decision.layout)
                return
        self.individual.add(parameter)

    def _rule(self, tap: ModuleTap, inputs: Sequence[Tensor]) -> Rule | None:
        module = tap.module
        if type(module) in self.rules:
            return self.rules[type(module)]
        if len(inputs) != 1 or any("." in name for name in tap.targets):
            return None
        return recognise(module, inputs[0])
