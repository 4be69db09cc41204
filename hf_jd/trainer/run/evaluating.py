"""Evaluation: the loss of each group, in addition to Trainer's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.batches import group_ids, without_groups
from hf_jd.packing import by_document, packed_documents
from hf_jd.trainer.overrides import overridden
from hf_jd.trainer.splitting.unreduced import LossesMixin, by_name


class EvaluationMixin(LossesMixin):
    """The part of `JDTrainerMixin` that adds `eval_<group>_loss`, the mean over a group's tokens (or instances)."""

    jd_group_names: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # For each batch: its instances' groups [B], and the sums and counts of their losses [B, K], by K names.
        self._jd_evaluated: list[tuple[Tensor, Tensor, Tensor]] = []

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict without the group ids, and store the losses of the instances; see Trainer."""
        groups, inputs = group_ids(inputs), without_groups(inputs)
        if groups is None or not self._tells_losses:  # a trainer's own scalar loss can't be split by group
            return super().prediction_step(model, inputs, *args, **kwargs)
        seen: dict[str, Any] = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # Keep the last output with logits: generation comes before it, and TRL's metrics after.
            if isinstance(output, Mapping) and ("logits" in output or "logits" not in seen.get("output", {})):
                seen["output"] = output

        hook = model.register_forward_hook(keep)
        try:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            hook.remove()
        if result[0] is not None and "output" in seen:
            self._keep_losses(model, self._prepare_inputs(inputs), seen["output"], groups.to(self.args.device))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the groups' losses to the metrics; see Trainer."""
        self._jd_evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = args[4] if len(args) > 4 else kwargs.get("metric_key_prefix", "eval")
        if self._jd_evaluated:
            groups, sums, counts = (torch.cat(parts) for parts in zip(*self._jd_evaluated, strict=True))
            self._jd_evaluated = []
            assert output.metrics is not None
            for k in groups[(groups >= 0) & (counts > 0).any(1)].unique().tolist():
                members = groups == k
                means = sums[members].sum(0) / counts[members].sum(0).clamp(min=1)
                output.metrics[f"{prefix}_{self.group_name(k)}_loss"] = means.sum().item()
        return output

    def group_name(self, k: int) -> str:
        """Return the name of the group with the id k."""
        return str(k) if self.jd_group_names is None else self.jd_group_names[k]

    @torch.no_grad()
    def _keep_losses(self, model: nn.Module, inputs: Any, outputs: Any, groups: Tensor) -> None:
        losses, counted = by_name(self._evaluated_losses(model, inputs, outputs))
        documents = packed_documents(inputs, self.jd_args.jd_packed)
        if documents is not None:
            of_tokens = [name for name, values in losses.items() if values.ndim > 1]
            losses, counted = (by_document({n: part[n] for n in of_tokens}, documents) for part in (losses, counted))
        names = [name for name, values in losses.items() if len(values.shape[:1]) and len(values) == len(groups)]
        if not names:
            return  # losses of whole batches, or of rows with several documents, belong to no group
        masked = [losses[name].double().masked_fill(~counted[name], 0) for name in names]
        sums = torch.stack([values.reshape(len(groups), -1).sum(1) for values in masked], dim=1)
        numbers = torch.stack([counted[name].reshape(len(groups), -1).sum(1) for name in names], dim=1)
        # This leaves out the examples that fill up the last round of batches.
        self._jd_evaluated.append(self.accelerator.gather_for_metrics((groups, sums, numbers)))

    @property
    def _tells_losses(self) -> bool:
        """Whether the instances' losses are known."""
        return self.knows_losses or self.jd_loss_func is not None or overridden(self) == "compute_losses"

    def _evaluated_losses(self, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> Any:
        """Compute the unreduced losses from a batch's outputs; only the user's own losses take another pass."""
        if overridden(self) == "compute_losses":
            with self.compute_loss_context_manager():
                return self.compute_losses(model, inputs)
        if self.jd_loss_func is not None:
            return self.jd_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None)
        return self.read_losses(outputs, inputs)
