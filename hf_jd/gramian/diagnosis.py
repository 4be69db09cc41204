"""Check a model before training: which rows are right, by which tier, and what to do."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_jd.gramian._passes.check import BLIND, TOLERANCE
from hf_jd.gramian._rules import RULES, Rule
from hf_jd.gramian.engine import Engine

SETTLING_STEPS = 3  # steps to find the holders of parameters whose owner isn't called
ADVICE = {
    0: "no objective depends on it: freeze it, or check that the loss uses it",
    1: "closed form: costs as much as autograd's own weight gradient",
    2: "its module is called again for the rows: a little more expensive than a closed form",
    3: "one differentiation per objective and step: freeze it, or give Engine a rule for its layer",
}


@dataclass(frozen=True)
class RowCheck:
    """The result for one parameter.

    Attributes:
        name: The parameter's name.
        tier: 1: closed form; 2: module by module; 3: objective by objective; 0: no objective depends on it.
        error: The norm of the difference from autograd's rows, one objective at a time, relative to the larger norm.
        right: Whether the error is within the dtype's tolerance.
        advice: What to do.
    """

    name: str
    tier: int
    error: float
    right: bool
    advice: str

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        return f"{self.name}: tier {self.tier}, {verdict} (error {self.error:.1e}); {self.advice}"


def check_rows(
    model: nn.Module, losses_fn: Callable[..., Tensor], rules: Mapping[type[nn.Module], Rule] = RULES
) -> list[RowCheck]:
    """Compare the engine's rows of each trainable parameter with autograd's, with one backward per objective.

    Args:
        model: The model; its `.grad` and hooks stay unchanged.
        losses_fn: Returns losses [m], one per instance, from a new forward; called with the model, or without arguments
            if it takes none. Called a few times: parameters whose owner isn't called need some steps to find their
            tier.
        rules: Closed forms by exact layer type.

    Returns:
        One result per trainable parameter, in the model's order.

    Raises:
        ValueError: As `Engine.compute_gramian`: no trainable parameter, instances that mix, ...
    """
    takes_model = len(inspect.signature(losses_fn).parameters) > 0
    engine, oracle = Engine(model, rules=rules), Engine(model, batch_dim=None)
    try:
        for _ in range(SETTLING_STEPS):
            losses = losses_fn(model) if takes_model else losses_fn()
            jacobian = engine.compute_jacobian(losses)
        expected = oracle.compute_jacobian(losses)
        tiers = engine.tiers()
    finally:
        engine.detach()
        oracle.detach()
    typical = max(float(expected.rows(p).norm()) / max(1, p.numel()) ** 0.5 for p in expected.parameters)
    findings = []
    for (name, tier), parameter in zip(tiers.items(), jacobian.parameters, strict=True):
        ours, theirs = jacobian.rows(parameter).double(), expected.rows(parameter).double()
        difference, scale = float((ours - theirs).norm()), max(float(ours.norm()), float(theirs.norm()))
        relative, noise = TOLERANCE.get(parameter.dtype, BLIND)
        right = difference <= relative * scale + noise * typical * max(1, parameter.numel()) ** 0.5
        advice = ADVICE[tier] if right else "rows differ from autograd's: report it, and freeze the parameter for now"
        findings.append(RowCheck(name, tier, difference / scale if scale else 0.0, right, advice))
    return findings
