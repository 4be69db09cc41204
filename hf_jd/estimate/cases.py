"""How an update is made: the numbers that a cost is calculated from.

In the formulas of this room, a process has m instances of T tokens in an update, N = m T tokens; R rows are on it, m of
instances or K of groups; W processes have M objectives together, W m or K; n numbers are trained, of b bytes each; a
linear map is [p, d], of p outputs and d inputs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """How an update is made.

    Attributes:
        batch: Instances of a micro-batch on a process.
        tokens: T, of each instance.
        accumulation: Micro-batches of an update.
        processes: W.
        groups: K; None: an objective an instance.
        parallelism: One of `PARALLELISMS`.
        materialise: Whether rows are formed where their factors, the layers' inputs and gradients, are smaller.
        two_pass: Whether the update takes a second backward pass, of the weighed losses.
        checkpointing: Whether blocks are computed again in the backward pass, instead of keeping what is in them.
        number_bytes: Of frozen weights and activations.
        trained_bytes: b, of trained weights, their rows and gradients.
    """

    batch: int
    tokens: int
    accumulation: int = 1
    processes: int = 1
    groups: int | None = None
    parallelism: str = "ddp"
    materialise: bool = True
    two_pass: bool = False
    checkpointing: bool = False
    number_bytes: int = 2
    trained_bytes: int = 4

    @property
    def instances(self) -> int:
        """m, of an update on one process."""
        return self.batch * self.accumulation

    @property
    def all_tokens(self) -> int:
        """N, of an update on one process."""
        return self.instances * self.tokens

    @property
    def rows(self) -> int:
        """R, of an update on one process."""
        return self.groups or self.instances

    @property
    def objectives(self) -> int:
        """M, of all processes."""
        return self.groups or self.instances * self.processes

    @property
    def leaving(self) -> float:
        """f = (W - 1) / W, the share of evenly divided data that is another process's."""
        return (self.processes - 1) / self.processes


@dataclass(frozen=True)
class Parallelism:
    """One of accelerate's engines, by what its processes share out among them.

    Attributes:
        weights: Whether weights are shared out, and so gathered for each forward and each backward pass.
        gradients: Whether gradients are.
        optimizer: Whether the optimizer's state is.
        owns_backward: Whether it takes gradients only from its own backward pass, so that an update takes two.
    """

    weights: bool
    gradients: bool
    optimizer: bool
    owns_backward: bool

    @property
    def holds_trained(self) -> bool:
        """Whether what is trained is gathered once for the measuring pass, and held whole: ZeRO 3."""
        return self.weights and self.owns_backward


PARALLELISMS = {
    "ddp": Parallelism(weights=False, gradients=False, optimizer=False, owns_backward=False),
    "fsdp2": Parallelism(weights=True, gradients=True, optimizer=True, owns_backward=False),
    "zero1": Parallelism(weights=False, gradients=False, optimizer=True, owns_backward=True),
    "zero2": Parallelism(weights=False, gradients=True, optimizer=True, owns_backward=True),
    "zero3": Parallelism(weights=True, gradients=True, optimizer=True, owns_backward=True),
}
