"""A run's logs -> a verdict, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_jd.report.history import History, mean

FEW = 0.05
"""The share of pairs or steps below which there is nothing to fix."""
CONTROLS = ("mean", "sum", "constant")
"""Weightings that ignore conflicts."""


def setup(facts: Mapping[str, Any]) -> str:
    """Name model, data, objectives, weighting and learning rate, from a run's flags; "" if they are unknown."""
    if not {"model", "data"} <= facts.keys():
        return ""
    kind = "all parameters" if facts.get("full") else f"LoRA, r = {facts.get('lora_r')}"
    method = "transformers' Trainer"
    if not facts.get("stock"):
        flag = facts.get("jd_objectives", "")
        names = {"instance": "example", "group": facts.get("jd_group_column"), "instance_loss": "example and loss"}
        method = f"{facts.get('jd_weighting')}, one objective per {names.get(flag, flag)}"
        if facts.get("jd_blocks", "none") != "none":
            method += f", weighed by {facts['jd_blocks']}"
    return f"{facts['model']} ({kind}) on {facts['data']}; {method}; learning rate {facts.get('learning_rate'):g}"


def verdict(history: History) -> str:
    """Say whether there was conflict, which group suffered most, and what follows; "" if nothing was measured."""
    conflicts = mean(history.totals.get("jd/conflicts", []))
    if not history.against and conflicts != conflicts:
        return ""
    worst, against = history.worst
    blind = history.facts.get("jd_weighting") in CONTROLS or history.facts.get("stock", False)
    disturbed = any(mean(series) < -FEW for series in history.pairs.values())
    if against >= FEW:
        end = (
            "A weighting such as UPGrad would have prevented that; check first whether its loss suffered."
            if blind
            else "This weighting guarantees nothing for whole groups: check whether the group's loss suffered."
        )
        return f"{against:.0%} of the steps went against {worst}. {end}"
    clean = "No steps went against a group" if history.against else "Nothing is known about groups"
    if not conflicts >= FEW and not disturbed:
        return f"{clean}, and there was hardly any conflict: the mean of the losses would have done as well."
    if blind:
        return f"{clean}, although {_pairs(conflicts)}: the mean does well enough here."
    return (
        f"{clean}, although {_pairs(conflicts)}: that is as it should be. Compare with a run with --jd_weighting mean "
        "to see what the weighting achieved."
    )


def why_pairs(history: History) -> str:
    """Explain why examples conflict although their groups don't; "" if that isn't the case."""
    conflicts = mean(history.totals.get("jd/conflicts", []))
    calm = history.pairs and all(mean(series) >= 0 for series in history.pairs.values())
    if history.facts.get("jd_objectives", "instance") != "instance" or not calm or not conflicts >= FEW:
        return ""
    return (
        "These pairs are single examples, whose gradients are mostly noise: two examples of the same group often point "
        "apart, while the groups agree, because the noise averages out."
    )


def _pairs(conflicts: float) -> str:
    return f"{conflicts:.0%} of the pairs of objectives conflict" if conflicts == conflicts else "groups conflict"
