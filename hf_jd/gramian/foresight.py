"""Whether a backward is the last one of its step, read from the graph before it: the graph can be freed on the way.

A plain step frees activations as its backward goes. The engine can do so too, once nothing is left to be found out:
where each parameter that the losses depend on is met by a tap, at a place and in a layout that were proved.
"""

from torch import Tensor

from hf_jd.gramian.check import Checker, is_due
from hf_jd.gramian.coverage import Coverage
from hf_jd.gramian.graph import walk
from hf_jd.gramian.plan import Plan
from hf_jd.gramian.recording import Batch


def is_last(losses: Tensor, batch: Batch, plan: Plan, coverage: Coverage, checker: Checker | None) -> bool:
    """Whether a backward to the taps will bring all rows of the losses, so that none has to follow.

    Args:
        losses: [R].
        batch: The instances behind them.
        plan: What was learnt in the steps before.
        coverage: Which tap brings which parameter.
        checker: None where rows need no proof.
    """
    graph = walk(losses)
    if graph.reentrant or plan.individual:
        return False
    own, tapped = set(coverage.taps), set()
    for node in graph.taps:
        if node.tap not in own:
            continue
        for shape in node.shapes:
            lead = shape[:-1] or shape
            plain = lead[:1] == (batch.instances,)
            site = plan.known_site(node.tap, node.call.modes, len(shape), plain, batch.segments.distinguish)
            # Methods that call a module again may give up at a call's shapes, and leave its parameters to tier 3.
            if site is None or isinstance(site.method, str):
                return False
            layout = site.layout_for(lead, batch.instances)
            if layout is None or (checker and any(is_due(site, p, layout) for p in node.targets.values())):
                return False
        tapped |= set(node.targets.values())
    if checker and not checker.asleep.isdisjoint(tapped):
        return False
    leaves = set(graph.leaves)
    return all(p in tapped or p not in leaves for p in coverage.names)
