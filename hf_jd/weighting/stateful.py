"""A weighting's memory of past steps: numbers per objective, and a random generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_jd.weighting.base import LossWeighting, Names, Weighting


class Memory:
    """Tensors [M] or [M, M] over the M objectives seen so far, float64, on the CPU; they grow as objectives appear.

    Attributes:
        names: The objectives' names, in the order in which they appeared.
        values: One tensor per quantity.
        steps: The number of steps taken.
        generator: Separate from torch's global generator, so that neither disturbs the other.
    """

    def __init__(self, seed: int = 0) -> None:
        self.names: list[Any] = []
        self.values: dict[str, Tensor] = {}
        self.steps = 0
        self.generator = torch.Generator().manual_seed(seed)

    def read(self, quantity: str, names: Names, like: Tensor, initial: float = 0.0, dims: int = 1) -> Tensor:
        """Return a quantity for these objectives, [m] or [m, m], on the device of `like`; `initial` for new ones."""
        index = self._index(names)
        stored = self.values.get(quantity, torch.empty((0,) * dims, dtype=torch.float64))
        grown = torch.full((len(self.names),) * dims, initial, dtype=torch.float64)
        grown[(slice(len(stored)),) * dims] = stored
        self.values[quantity] = grown
        return grown[torch.meshgrid(*[index] * dims, indexing="ij")].to(like.device)

    def write(self, quantity: str, names: Names, values: Tensor) -> None:
        """Store a quantity for these objectives; absent objectives keep their values."""
        index = self._index(names)
        self.values[quantity][torch.meshgrid(*[index] * values.ndim, indexing="ij")] = values.detach().cpu()

    def read_shares(self, quantity: str, names: Names, like: Tensor) -> Tensor:
        """Return shares that sum to 1 over these objectives, [m]; new ones start with an equal share."""
        shares = self.read(quantity, names, like, initial=float("nan"))
        shares = shares.where(~shares.isnan(), 1 / len(self.names))
        total = shares.sum()
        return torch.where(total > 0, shares / total, 1 / len(shares))

    def _index(self, names: Names) -> Tensor:
        seen = set(self.names)
        self.names.extend(name for name in names if name not in seen)
        place = {name: i for i, name in enumerate(self.names)}
        return torch.tensor([place[name] for name in names])


@dataclass(frozen=True)
class Stateful(Weighting):
    """A weighting whose result depends on past steps, or on random numbers.

    The memory is stored by the objectives' names (`weighting(gramian, names=names)`), so their number and order may
    change from step to step. A run resumed from `state_dict()` continues as if it had not been interrupted.
    """

    memory: Memory = field(init=False, repr=False, compare=False, default_factory=Memory)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all past steps; the generator starts from the seed again."""
        object.__setattr__(self, "memory", Memory(getattr(self, "seed", 0)))

    def remember_as(self, other: Stateful) -> None:
        """Share the memory of another weighting, which has the same method and other parameters."""
        object.__setattr__(self, "memory", other.memory)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain containers and tensors, for `torch.save`."""
        memory = self.memory
        return {
            "names": list(memory.names),
            "values": {quantity: values.clone() for quantity, values in memory.values.items()},
            "steps": memory.steps,
            "generator": memory.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raise a `ValueError` for anything else."""
        missing = {"names", "values", "steps", "generator"} - state.keys()
        if missing:
            raise ValueError(f"This is not the state of a weighting: it lacks {sorted(missing)}.")
        self.reset()
        self.memory.names = list(state["names"])
        self.memory.values = {quantity: values.clone() for quantity, values in state["values"].items()}
        self.memory.steps = state["steps"]
        self.memory.generator.set_state(state["generator"])


@dataclass(frozen=True)
class StatefulLoss(Stateful, LossWeighting):
    """A weighting that reads losses, and depends on past steps or on random numbers."""
