"""The set-up of an update, from which its cost is calculated.

In the formulas of this package, a process has m instances of T tokens per update, N = m T tokens, and R rows, m of
instances or K of groups; W processes have M objectives in all, W m or K; n numbers are trained, of b bytes each; a
linear map is [p, d], with p outputs and d inputs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """The set-up of an update.

    Attributes:
        batch: Instances per micro-batch and process.
        tokens: T, per instance.
        accumulation: Micro-batches per update.
        processes: W.
        groups: K; None: one objective per instance.
        parallelism: One of `PARALLELISMS`.
        materialise: Whether to form rows even if their factors, the layers' inputs and gradients, are smaller.
        two_pass: Whether the update takes a second backward pass, of the weighted losses.
        checkpointing: Whether the backward pass recomputes blocks instead of storing their activations.
        number_bytes: Bytes per number of frozen weights and activations.
        trained_bytes: b, bytes per number of trained weights, their rows and gradients.
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
        """m, per update and process."""
        return self.batch * self.accumulation

    @property
    def all_tokens(self) -> int:
        """N, per update and process."""
        return self.instances * self.tokens

    @property
    def rows(self) -> int:
        """R, per update and process."""
        return self.groups or self.instances

    @property
    def objectives(self) -> int:
        """M, over all processes."""
        return self.groups or self.instances * self.processes

    @property
    def leaving(self) -> float:
        """f = (W - 1) / W, the share of evenly divided data that belongs to other processes."""
        return (self.processes - 1) / self.processes


@dataclass(frozen=True)
class Parallelism:
    """One of accelerate's backends, by what its processes shard.

    Attributes:
        weights: Whether weights are sharded, and so gathered for each forward and each backward pass.
        gradients: Whether gradients are sharded.
        optimizer: Whether the optimizer's state is sharded.
        owns_backward: Whether it takes gradients only from its own backward pass, so that an update takes two passes.
    """

    weights: bool
    gradients: bool
    optimizer: bool
    owns_backward: bool

    @property
    def holds_trained(self) -> bool:
        """Whether trained weights are gathered once for the measuring pass, and held whole: ZeRO 3."""
        return self.weights and self.owns_backward


# ZeRO 1 to 3 as in DeepSpeed 0.19 with its defaults.
PARALLELISMS = {
    "ddp": Parallelism(weights=False, gradients=False, optimizer=False, owns_backward=False),
    "fsdp2": Parallelism(weights=True, gradients=True, optimizer=True, owns_backward=False),
    "zero1": Parallelism(weights=False, gradients=False, optimizer=True, owns_backward=True),
    "zero2": Parallelism(weights=False, gradients=True, optimizer=True, owns_backward=True),
    "zero3": Parallelism(weights=True, gradients=True, optimizer=True, owns_backward=True),
}
