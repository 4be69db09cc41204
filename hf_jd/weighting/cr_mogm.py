"""CR-MOGM: the moving average of another weighting's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting, checked_gramian, checked_losses, checked_names
from hf_jd.weighting.preference import checked_numbers
from hf_jd.weighting.stateful import Stateful
from hf_jd.weighting.upgrad import UPGradWeighting


@dataclass(frozen=True)
class CRMOGMWeighting(Stateful):
    """Correlation-reduced multi-objective gradient manipulation: smooths the weights of another weighting.

    w_t = alpha w_(t-1) + (1 - alpha) W(G_t). Without initial weights, an objective starts with W's weight. An absent
    objective keeps its last weight.

    Attributes:
        weighting: W: a weighting, its name, or any callable G -> w.
        alpha: The share of the previous weights, in [0, 1].
        initial_weights: w_0 of the first step's objectives, [m], non-negative; None for W's first weights.

    References:
        Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS 2022,
        algorithm 1.
    """

    guarantee: ClassVar[str] = "none for one step; those of averaged weights"
    cost: ClassVar[str] = "the other's"
    # Set by the package, which knows all names; importing it here would be circular.
    by_name: ClassVar[Callable[[str], Weighting]]

    weighting: Callable[[Tensor], Tensor] | str = UPGradWeighting()
    alpha: float = 0.9
    initial_weights: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weighting, str):
            object.__setattr__(self, "weighting", type(self).by_name(self.weighting))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; give a number in [0, 1].")
        if self.initial_weights is not None:
            initial = checked_numbers("initial_weights", self.initial_weights)
            object.__setattr__(self, "initial_weights", initial)

    @property
    def reads(self) -> Literal["gramian", "losses"]:
        """The input that the other weighting takes."""
        return getattr(self.weighting, "reads", "gramian")

    def __call__(self, statistic: Tensor, /, *, names: Names | None = None) -> Tensor:
        """Compute the weights [m] from the Gramian [m, m], or from the losses [m] if the other weighting does."""
        checked = checked_losses(statistic) if self.reads == "losses" else checked_gramian(statistic)
        return self.weigh(checked, checked_names(names, len(statistic))).to(statistic)

    def weigh(self, statistic: Tensor, names: Names, /) -> Tensor:
        """Move the stored weights [m] towards the other weighting's."""
        inner: Any = self.weighting
        if isinstance(inner, Weighting):
            weights = inner(statistic, names=names)
        else:
            weights = inner(statistic).detach()
        last = self.memory.read("weights", names, weights, initial=float("nan"))
        if self.initial_weights is not None and not self.memory.steps:
            if len(self.initial_weights) != len(weights):
                raise ValueError(
                    f"initial_weights has {len(self.initial_weights)} entries, but the first step has {len(weights)} "
                    f"objectives."
                )
            last = weights.new_tensor(self.initial_weights)
        self.memory.steps += 1
        smoothed = self.alpha * last.where(~last.isnan(), weights) + (1 - self.alpha) * weights
        self.memory.write("weights", names, smoothed)
        return smoothed

    def reset(self) -> None:
        """Forget all past steps, including the other weighting's."""
        super().reset()
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the other weighting's under "weighting"."""
        inner = {"weighting": self.weighting.state_dict()} if isinstance(self.weighting, Stateful) else {}
        return super().state_dict() | inner

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        if isinstance(self.weighting, Stateful):
            self.weighting.load_state_dict(state["weighting"])
