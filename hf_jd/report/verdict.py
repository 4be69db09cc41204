"""What a run logged -> what to make of it, in sentences."""

from __future__ import annotations

from hf_jd.report.history import History, mean

FEW = 0.05
"""A share of pairs or steps below which there is nothing to mend."""
_CONTROLS = ("mean", "sum", "constant")
"""Weightings that don't look at conflicts."""


def setup(history: History) -> str:
    """Name model, data, objectives, weighting and learning rate; "" where they aren't known."""
    facts = history.facts
    if not {"model", "data"} <= facts.keys():
        return ""
    kind = "all parameters" if facts.get("full") else f"LoRA, r = {facts.get('lora_r')}"
    method = "transformers' Trainer"
    if not facts.get("stock"):
        objectives = {
            "instance": "an objective per example",
            "group": f"an objective per {facts.get('jd_group_column')}",
        }
        asked = facts.get("jd_objectives", "")
        method = f"{facts.get('jd_weighting')}, {objectives.get(asked, f'objectives `{asked}`')}"
    return f"{facts['model']} ({kind}) on {facts['data']}; {method}; learning rate {facts.get('learning_rate'):g}"


def verdict(history: History) -> str:
    """Tell whether there was conflict, who was gone against, and what follows; "" if nothing was measured."""
    shares = {name: mean([value for _, value in series]) for name, series in history.against.items()}
    conflicts = mean([value for _, value in history.totals.get("jd/conflicts", [])])
    if not shares and conflicts != conflicts:
        return ""
    worst = max(shares, key=lambda name: (shares[name], name), default="")
    against = shares.get(worst, 0.0)
    blind = history.facts.get("jd_weighting") in _CONTROLS or history.facts.get("stock", False)
    disturbed = any(mean([value for _, value in series]) < -FEW for series in history.pairs.values())
    if against >= FEW:
        end = (
            "A weighting such as UPGrad would have kept it from that; look first whether its loss suffered."
            if blind
            else "This weighting doesn't promise otherwise of whole groups: look whether the group's loss suffered."
        )
        return f"{against:.0%} of the steps went against {worst}. {end}"
    clean = "No group was gone against" if shares else "Nothing is known of groups"
    if not conflicts >= FEW and not disturbed:
        return f"{clean}, and there was hardly any conflict: the mean of the losses would have done as well."
    if blind:
        return f"{clean}, although {_pairs(conflicts)}: the mean does well enough here."
    return (
        f"{clean}, although {_pairs(conflicts)}: that is as it should be. A run with --jd_weighting mean tells what "
        "the weighting was worth."
    )


def why_pairs(history: History) -> str:
    """Explain why examples conflict where their groups don't; "" where that isn't so."""
    conflicts = mean([value for _, value in history.totals.get("jd/conflicts", [])])
    calm = history.pairs and all(mean([v for _, v in series]) >= 0 for series in history.pairs.values())
    if history.facts.get("jd_objectives", "instance") != "instance" or not calm or not conflicts >= FEW:
        return ""
    return (
        "Here the pairs are of single examples, whose gradients are mostly noise: two of one group often point apart, "
        "while the groups, in which the noise averages out, agree."
    )


def _pairs(conflicts: float) -> str:
    return f"{conflicts:.0%} of the pairs of objectives conflict" if conflicts == conflicts else "groups conflict"
