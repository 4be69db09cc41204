"""What an engine has learnt about its modules: by which method and in which layout each one's rows come.

Decisions are tried in order (closed rule in each layout that shapes allow, then the vjp of the module in each layout,
then one differentiation an objective) and kept once the self-check has proved them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hf_jd.gramian.layouts import candidates
from hf_jd.gramian.routed import experts, is_experts
from hf_jd.gramian.rules import Rule, recognise
from hf_jd.gramian.sharding import layer_type
from hf_jd.gramian.taps import ModuleTap

LINEAR, VECTORISED, LOOPED = "linear", "vmap", "loop"


@dataclass(eq=False)
class Site:
    """One way in which a module is met, and the decision for it.

    Attributes:
        module: The module.
        method: A closed rule, or the module's vjp: through its linear maps, by "vmap", or in a "loop".
        layout: How its tensors hold the batch; None: not yet decided, or no layout fits.
        rejected: Layouts that were tried in vain with this method.
        proved: (parameter, layout, training) that a self-check has proved.
        vacuous: The same where the gradient was too small to prove anything, and how often it was met since.
    """

    module: nn.Module
    method: Rule | str
    layout: str | None = None
    rejected: set[str] = field(default_factory=set)
    proved: set[tuple[nn.Parameter, str | None, bool]] = field(default_factory=set)
    vacuous: dict[tuple[nn.Parameter, str | None, bool], int] = field(default_factory=dict)

    def fall_back(self) -> None:
        """From a closed form to the module's linear maps, to vmap, to the loop."""
        ladder = {LINEAR: VECTORISED, VECTORISED: LOOPED}
        self.method = ladder[self.method] if isinstance(self.method, str) else LINEAR
        self.rejected.clear()

    def layout_for(self, lead: Sequence[int], instances: int) -> str | None:
        """The layout to read a call's tensors in, as things stand; None where shapes allow none that was not rejected.

        Args:
            lead: Dimensions of the output gradient but for the last.
            instances: B.
        """
        if self.layout == "axis0" and lead[0] == instances:
            return self.layout
        possible = [c for c in candidates(lead, instances) if c not in self.rejected]
        return self.layout if self.layout in possible else next(iter(possible), None)

    def choose_layout(self, lead: Sequence[int], instances: int) -> str | None:
        """Decides for `layout_for`; where all layouts that shapes allow were rejected, for the next method's first."""
        self.layout = self.layout_for(lead, instances)
        # The vjp of a table would hold rows of its full size.
        if self.layout is None and self.method != LOOPED and not isinstance(self.module, nn.Embedding):
            found = candidates(lead, instances)
            if found:
                self.fall_back()
                self.layout = found[0]
        return self.layout


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
        self._sites: dict[tuple[nn.Module, tuple[bool, ...], int, bool, bool], Site] = {}

    def site(
        self,
        tap: ModuleTap,
        modes: tuple[bool, ...],
        rank: int,
        plain: bool,
        conclusive: bool,
        inputs: Sequence[Tensor],
    ) -> Site:
        """The site of a module's output gradient of that rank; its decision is made when it is met first.

        Args:
            tap: The module's tap.
            modes: Of the module's call: in another mode it may compute something else.
            rank: Dimensions of the output gradient.
            plain: Whether it has one leading row per instance: another call of the module may have several.
            conclusive: Whether instances belong to different objectives: else no check can tell layouts apart, so what
                it approves is kept for such steps only.
            inputs: The tensors that the module was called with.
        """
        key = (tap.module, modes, rank, plain, conclusive)
        if key not in self._sites:
            self._sites[key] = Site(tap.module, self._rule(tap, inputs) or LINEAR)
        return self._sites[key]

    def known_site(
        self, tap: ModuleTap, modes: tuple[bool, ...], rank: int, plain: bool, conclusive: bool
    ) -> Site | None:
        """The site, if it was met before."""
        return self._sites.get((tap.module, modes, rank, plain, conclusive))

    def reject(self, wrong: Mapping[nn.Parameter, Sequence[Site]]) -> None:
        """Takes back one decision behind each parameter's wrong rows; where none is left, it goes to tier 3.

        Args:
            wrong: The parameters and the sites where they were met. Parameters that share a site share its decision.
        """
        taken_back: set[Site] = set()
        undecided: set[nn.Parameter] = set()
        for parameter, sites in wrong.items():
            if not taken_back.isdisjoint(sites):
                continue
            decided = [site for site in sites if site.layout is not None]
            # Where calls are of unlike size, the order of several rows per instance is the likelier mistake.
            guessed = [site for site in decided if site.layout in ("major", "minor")]
            site = next(iter(guessed or decided), None)
            if site is None:
                undecided.add(parameter)
                continue
            assert site.layout is not None
            site.rejected.add(site.layout)
            site.layout = None
            taken_back.add(site)
        # Rows of an input without a batch dimension are those of the word embeddings, whose layout may be wrong.
        self.individual |= set() if taken_back else undecided

    def _rule(self, tap: ModuleTap, inputs: Sequence[Tensor]) -> Rule | None:
        module = tap.module
        kind = layer_type(module)
        if kind in self.rules:
            return self.rules[kind]
        if is_experts(module, inputs):
            return experts
        if len(inputs) != 1 or any("." in name for name in tap.targets):
            return None
        return recognise(module, inputs[0])
