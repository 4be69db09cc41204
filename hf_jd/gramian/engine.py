"""The engine: losses -> Gramian, weights -> gradients, with one ordinary backward."""

import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from hf_jd.gramian._passes.check import Checker
from hf_jd.gramian._passes.coverage import Coverage
from hf_jd.gramian._passes.passes import Passes
from hf_jd.gramian._passes.recording import Keep
from hf_jd.gramian._rules import RULES, Rule
from hf_jd.gramian._rules.methods import Tier
from hf_jd.gramian._rules.plan import Plan
from hf_jd.gramian.blocks import Blocks, blocks_of, check_blocks
from hf_jd.gramian.jacobian import Jacobian
from hf_jd.gramian.layouts import Batch, Segments
from hf_jd.gramian.taps import ModuleTap, Switch

FREE_MEMORY_SHARE = 0.5  # the share of the device's free memory that rows may take with `keep_rows="auto"`


@dataclass
class _Step:
    """What `accumulate_grad` needs from the last `compute_gramian`.

    Attributes:
        shape: Of the weights.
        source: The rows; or, for a second backward, the losses. Losses hold the graph, and so all activations: they
            are not stored along with rows.
        versions: The parameters' versions, to notice changes.
    """

    shape: torch.Size
    source: Jacobian | Tensor
    versions: list[tuple[nn.Parameter, int]]


class Engine:
    """The Gramian G = J J^T of a batch's losses, and J^T w, from one backward.

    J is the Jacobian of the losses with respect to the trainable parameters of the modules. One ordinary backward of
    the sum of the losses visits each trainable layer with its input and output gradient. Since the model treats
    instances independently, these give each instance's row of J (`_rules/`). Layers without a closed form are
    differentiated module by module (`_rules/methods.py`), or objective by objective. A self-check verifies the rows on
    the first step (`_passes/check.py`). The approach follows Quinton & Rey, arXiv 2406.16232, Section 6.

        engine = Engine(model)
        losses = per_instance_loss(model(**batch))      # [m]
        weights = UPGradWeighting()(engine.compute_gramian(losses))
        engine.accumulate_grad(weights)                 # p.grad += J^T w

    Args:
        modules: The modules whose trainable parameters count; `requires_grad` is read at each step.
        batch_dim: The dimension of the losses that holds the instances of the batch; negative ones count from the last.
            None: losses have no instance dimension; each element costs one differentiation.
        keep_rows: Whether to store rows for `accumulate_grad` ("one-pass"). True: always. False: never; store only the
            Gramian, and run a second backward in `accumulate_grad` ("two-pass"). "auto": if the rows, or else their
            factors, fit in half of the free memory. A number: if they fit in that many bytes.
        rules: Closed forms by exact layer type.
        check: Whether to verify rows against autograd on the first step, and when the model is used in a new way.
        blocks: Blocks of parameters, each with its own Gramian and weights (`blocks.py`): "layer", "module",
            "parameter", a function from a parameter's name to its block's name, or a mapping; None: a single block.

    Raises:
        ValueError: No module, or an invalid argument.
    """

    def __init__(
        self,
        *modules: nn.Module,
        batch_dim: int | None = 0,
        keep_rows: bool | int | Literal["auto"] = "auto",
        rules: Mapping[type[nn.Module], Rule] = RULES,
        check: bool = True,
        blocks: Blocks | None = None,
    ):
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise ValueError(f"Engine takes one or more torch.nn.Module, got {modules!r}.")
        if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            raise ValueError(
                "a scripted module takes no hooks: give Engine the original module, before torch.jit.script."
            )
        if batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, int)):
            raise ValueError(
                f"batch_dim is {batch_dim!r}; allowed are an integer, the losses' dimension of instances, and None."
            )
        if not isinstance(keep_rows, bool | int) and keep_rows != "auto":
            raise ValueError(f'keep_rows is {keep_rows!r}; allowed are "auto", True, False and a number of bytes.')
        check_blocks(blocks)
        if blocks is not None and keep_rows is False:
            raise ValueError(
                "blocks have separate weights, which one second backward of the losses can't apply: keep_rows has to "
                'be "auto" or True, not False.'
            )
        self.batch_dim = batch_dim
        self.keep_rows = keep_rows
        self.blocks = blocks
        self._switch = switch = Switch()
        self._coverage = Coverage(modules, lambda module: ModuleTap(switch, module))
        weakref.finalize(self, self._coverage.remove)  # The model's hooks must not keep the engine, nor outlive it.
        plan = Plan(rules)
        self._passes = Passes(plan, self._coverage, Checker() if check else None, switch)
        self._tiers: dict[nn.Parameter, Tier] = {}
        self._step: _Step | None = None
        self._coverage.scan()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Disable the taps within the context: steps that need no rows then cost nothing extra."""
        self._switch.is_paused = self._coverage.inputs.is_paused = True
        try:
            yield
        finally:
            self._switch.is_paused = self._coverage.inputs.is_paused = False

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded, so that all processes have to run the same number of passes."""
        return self._coverage.sharded

    def held(self) -> list[nn.Parameter]:
        """Return the trainable parameters, and the frozen ones in the modules that form their rows.

        Sharded ones have to be whole: a pass to the trainable ones goes through all of them, other passes may not.
        """
        held = (p for tap in self._coverage.taps for p in tap.module.parameters())
        return list(dict.fromkeys([*self._coverage.names, *held]))

    def compute_gramian(self, losses: Tensor, segments: Tensor | None = None, retain_graph: bool = True) -> Tensor:
        """Compute the Gramian of the losses, G = J J^T.

        Args:
            losses: [m], or of more dimensions: one entry in `batch_dim` per instance of the batch, or, with `segments`,
                per objective.
            segments: Ids 0..K-1 of the objective that each instance [B], or each token [B, T], belongs to; -1 for none.
            retain_graph: True retains the graph, so that `losses.backward(weights)` works, too. False lets the backward
                free activations as it goes, like a plain backward, if rows are stored and no other pass follows.

        Returns:
            Losses of shape s give a Gramian of shape s + reversed(s), whatever `batch_dim` is: [m] gives [m, m],
            [m, K] gives [m, K, K, m]. With `blocks`, one Gramian per block: [B, m, m]. float32, or float64 for float64
            parameters.

        Raises:
            ValueError: The losses depend on no trainable parameter, are not finite, or don't have the batch's length;
                segments are out of range; the model mixes instances.
        """
        self._step = None
        keep = self._keep(losses)
        if keep is Keep.GRAMIAN:
            jacobian, gramian = None, self._gramian_only(losses, segments)
        else:
            rows = keep is Keep.ROWS
            jacobian = self.compute_jacobian(losses, segments, rows, retain_graph or not rows)
            gramian = jacobian.gramian() if self.blocks is None else jacobian.gramians()
            # Tiers 2 and 3 give dense rows, which the size of the factors could not predict.
            if keep is Keep.FACTORS and self.blocks is None and jacobian.nbytes > self._budget(losses.device):
                jacobian = None
        versions = [(p, p._version) for p in self._coverage.names]
        shape = losses.shape if self.blocks is None else torch.Size((len(gramian), *losses.shape))
        self._step = _Step(shape, losses if jacobian is None else jacobian, versions)
        if self.blocks is None:
            return self._generalized(gramian, losses)
        return torch.stack([self._generalized(part, losses) for part in gramian])

    def compute_jacobian(
        self, losses: Tensor, segments: Tensor | None = None, materialise: bool = True, retain_graph: bool = True
    ) -> Jacobian:
        """Compute the rows themselves, to add to or stack with those of other batches.

        Args:
            losses: As for `compute_gramian`. Rows follow `losses.movedim(batch_dim, -1).flatten()`: row k * m + i is of
                instance i and index k into the other dimensions.
            segments: As for `compute_gramian`.
            materialise: False stores rows as factors where those are smaller.
            retain_graph: As for `compute_gramian`.

        Raises:
            ValueError: As for `compute_gramian`.
        """
        parts, keep = [], Keep.ROWS if materialise else Keep.FACTORS
        for vector, batch in self._vectors(losses, segments):
            if batch is None:
                outcome = self._passes.one_by_one(vector)
            else:
                outcome = self._passes.run(vector, batch, keep, retain_graph or losses.dim() > 1)
            self._tiers = outcome.tiers
            rows = {p: outcome.rows.get(p) for p in self._coverage.names}
            parts.append(Jacobian(rows, len(vector), self._block_names()))
        if self.sharded:
            self._passes.finish(losses.sum())
        return Jacobian.cat(parts)

    def block_names(self) -> dict[nn.Parameter, str] | None:
        """Return each trainable parameter's block, for a `Jacobian` of a step without rows; None without `blocks`."""
        self._coverage.read()
        return self._block_names()

    def _block_names(self) -> dict[nn.Parameter, str] | None:
        if self.blocks is None:
            return None
        names = self._coverage.names
        return dict(zip(names, blocks_of(self.blocks, names.values()), strict=True))

    def gradients(self, scalar: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the plain gradient of a scalar, by parameter; leave `.grad` and the graph unchanged.

        With sharded parameters, call `compute_jacobian` or `keep_up` afterwards.
        """
        self._coverage.read()
        return self._passes.gradients(scalar)

    def keep_up(self, scalar: Tensor) -> None:
        """Join the backward passes of the other processes, on a process without an objective in this batch.

        Sharded parameters are gathered in each backward pass, so all processes have to run the same number.

        Args:
            scalar: Any scalar that depends on the model in the same way as the losses would.
        """
        self._coverage.read()
        if self.sharded:
            self._passes.finish(scalar)
        self._coverage.finish_step()

    def accumulate_grad(self, weights: Tensor) -> None:
        """Add J^T w to the `.grad` of each trainable parameter; may be called several times.

        Args:
            weights: Shaped like the losses of the last `compute_gramian`; with `blocks`, [B, ...], one set per block.

        Raises:
            ValueError: No Gramian was computed, parameters have changed since, or the weights have another shape.
        """
        step = self._step
        if step is None:
            raise ValueError("accumulate_grad needs the rows of a batch: call compute_gramian(losses) first.")
        if weights.shape != step.shape:
            raise ValueError(
                f"weights have shape {list(weights.shape)}; the losses of the last Gramian have "
                f"{list(step.shape)}, and each takes one weight{'' if self.blocks is None else ' in each block'}."
            )
        changed = [self._coverage.names.get(p, "?") for p, version in step.versions if p._version != version]
        if changed:
            raise ValueError(
                f"{len(changed)} parameter(s) have changed since compute_gramian (first: {changed[0]}): call "
                "accumulate_grad before the optimizer's step, or compute the Gramian again."
            )
        if isinstance(step.source, Tensor):
            torch.autograd.backward(step.source, weights.to(step.source), retain_graph=True)
            return
        ordered = self._instances_last(weights, int(self.blocks is not None))
        for parameter, gradient in step.source.weighted_sum(ordered.flatten(int(self.blocks is not None))).items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def tiers(self) -> dict[str, int]:
        """Return the tier that formed each parameter's rows in the last step, by name.

        1: closed form; 2: module by module; 3: objective by objective; 0: no objective depended on it.
        """
        return {name: self._tiers.get(p, Tier.UNUSED) for p, name in self._coverage.names.items()}

    def detach(self) -> None:
        """Remove the engine's hooks from the model."""
        self._coverage.remove()
        self._step = None

    def _vectors(self, losses: Tensor, segments: Tensor | None) -> Iterator[tuple[Tensor, Batch | None]]:
        """Yield vectors of losses that take one backward each, with the instances they belong to."""
        self._coverage.read()
        _check_losses(losses, self.batch_dim, segments, bool(self._coverage.names))
        with torch.autocast(losses.device.type, enabled=False):
            if self.batch_dim is None:
                yield losses.flatten(), None
            else:
                batch = _batch(losses.shape[self.batch_dim], segments, losses.device)
                last = self._instances_last(losses)
                for vector in last.flatten(0, -2).unbind() if losses.dim() > 1 else [losses]:
                    yield vector, batch
        self._coverage.finish_step()

    def _gramian_only(self, losses: Tensor, segments: Tensor | None) -> Tensor:
        ((vector, batch),) = self._vectors(losses, segments)
        assert batch is not None
        outcome = self._passes.run(vector, batch, Keep.GRAMIAN, retain=True)
        if self.sharded:
            self._passes.finish(losses.sum())
        self._tiers = outcome.tiers
        rest = Jacobian({p: outcome.rows.get(p) for p in self._coverage.names}, len(vector)).gramian()
        return rest if outcome.gramian is None else (rest + outcome.gramian.to(rest))

    def _keep(self, losses: Tensor) -> Keep:
        """Decide what to store, by its size; several backwards always store rows."""
        if self.keep_rows is True or self.batch_dim is None or losses.dim() != 1:
            return Keep.ROWS
        if self.keep_rows is False:
            return Keep.GRAMIAN
        budget = self._budget(losses.device)
        parameters = self._coverage.names
        size = max((p.element_size() for p in parameters), default=4)
        if len(losses) * sum(p.nbytes for p in parameters) <= budget:
            return Keep.ROWS
        elements = [tap.elements for tap in self._coverage.taps]
        # Reentrant checkpointing hides forwards, and with them the size of the factors.
        fits = self.blocks is not None or (all(elements) and sum(elements) * size <= budget)
        return Keep.FACTORS if fits else Keep.GRAMIAN

    def _budget(self, device: torch.device) -> int:
        """Return the bytes that rows or factors may take."""
        if self.keep_rows == "auto":
            return int(_free_memory(device) * FREE_MEMORY_SHARE)
        return int(self.keep_rows)

    def _instances_last(self, tensor: Tensor, before: int = 0) -> Tensor:
        """Put a tensor that is shaped like the losses, after `before` other dimensions, in the order of rows."""
        if self.batch_dim is None:
            return tensor
        return tensor.movedim(self.batch_dim + before if self.batch_dim >= 0 else self.batch_dim, -1)

    def _generalized(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Reshape [R, R], in the order of rows, to shape(losses) + reversed(shape(losses))."""
        n, shape = losses.dim(), self._instances_last(losses).shape
        gramian = gramian.reshape([*shape, *shape])
        if self.batch_dim is not None:
            axis = self.batch_dim % n
            gramian = gramian.movedim([n - 1, 2 * n - 1], [axis, n + axis])
        return gramian.permute([*range(n), *reversed(range(n, 2 * n))])


def _check_losses(losses: Tensor, batch_dim: int | None, segments: Tensor | None, trainable: bool) -> None:
    if not trainable:
        raise ValueError(
            "the engine's modules have no trainable parameter: set requires_grad on some, or add an adapter."
        )
    if not losses.requires_grad:
        raise ValueError(
            "the losses depend on no trainable parameter: compute them with gradient enabled, from the engine's "
            "modules, and do not detach them."
        )
    if batch_dim is not None and losses.dim() == 0:
        raise ValueError(
            "losses is a scalar: give one loss per instance, [m] (reduction='none'), or Engine(..., batch_dim=None)."
        )
    if batch_dim is not None and not -losses.dim() <= batch_dim < losses.dim():
        raise ValueError(
            f"batch_dim is {batch_dim}, and losses have shape {list(losses.shape)}: give the dimension of their "
            f"instances, {-losses.dim()} to {losses.dim() - 1}, or None if they have none."
        )
    if batch_dim is None and segments is not None:
        raise ValueError("segments assign instances to objectives: they need a batch_dim, which is None here.")
    if losses.numel() == 0:
        raise ValueError(f"losses has shape {list(losses.shape)}: there is no objective.")
    finite = torch.isfinite(losses.detach())
    if not bool(finite.all()):
        where = (~finite).nonzero()[:5].squeeze(-1).tolist()
        raise ValueError(f"losses are not finite at {where}: leave those instances out before the Gramian is computed.")


def _batch(objectives: int, segments: Tensor | None, device: torch.device) -> Batch:
    """Build the instances of a step; without `segments`, each instance is an objective."""
    if segments is None:
        return Batch(objectives, Segments(objectives))
    if segments.dim() not in (1, 2) or segments.is_floating_point() or segments.dtype == torch.bool:
        raise ValueError(
            f"segments has shape {list(segments.shape)} and dtype {segments.dtype}; allowed are integer ids [B] or "
            "[B, T]."
        )
    if not segments.numel():
        raise ValueError(f"segments has shape {list(segments.shape)}: there is no instance. Leave out an empty batch.")
    low, high = int(segments.min()), int(segments.max())
    if low < -1 or high >= objectives:
        raise ValueError(
            f"segments has ids from {low} to {high}; with {objectives} losses, ids 0 to {objectives - 1} are allowed, "
            "and -1 for none."
        )
    segments = segments.long().to(device)
    if segments.dim() == 2 and bool((segments == segments[:, :1]).all()):
        segments = segments[:, 0].contiguous()
    if segments.shape == (objectives,) and bool((segments == torch.arange(objectives, device=segments.device)).all()):
        return Batch(objectives, Segments(objectives))
    return Batch(len(segments), Segments(objectives, segments))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
