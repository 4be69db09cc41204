"""`JDSFTTrainer`: Jacobian descent inside TRL's SFTTrainer, for those who have installed `hf-jd[trl]`.

TRL's own `compute_loss` runs, so its metrics are its own; the tokens' losses are read from what the model returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.arguments import JDArguments
from hf_jd.groups import group_names
from hf_jd.losses import bare, causal_lm, reduced
from hf_jd.trainer.mixin import JDTrainerMixin

try:
    from trl import SFTConfig, SFTTrainer, pack_dataset
    from trl.data_utils import get_dataset_column_names
except ImportError as error:
    raise ImportError(f"JDSFTTrainer needs TRL ({error}): pip install 'hf-jd[trl]'.") from error

logger = logging.get_logger(__name__)


@dataclass
class JDSFTConfig(JDArguments, SFTConfig):
    """`SFTConfig` with the flags of Jacobian descent."""


class JDSFTTrainer(JDTrainerMixin, SFTTrainer):
    """`SFTTrainer` with Jacobian descent; its `args` are a `JDSFTConfig`, all else is SFTTrainer's.

    TRL multiplies the hidden states by the weight of the language model's head without calling that module, so no tap
    meets it. Where the head is trained, the losses are computed from the logits instead, as any other trainer does.
    """

    args: JDSFTConfig

    def __init__(self, *args: Any, **kwargs: Any):
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if not isinstance(given, JDSFTConfig):
            raise ValueError(
                f"The arguments of {type(self).__name__} are {type(given).__name__}, without the flags of both TRL's "
                "SFT and Jacobian descent: use JDSFTConfig."
            )
        _check_packing(given)
        self._jd_warned_of_logits = False
        super().__init__(*args, **kwargs)

    def follow_flags(self) -> None:
        """Makes what the flags decide; see JDTrainerMixin."""
        _check_packing(self.args)
        super().follow_flags()

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Prepares a dataset as TRL does; where it is packed, each row names its documents' groups, which TRL drops."""
        column = args.jd_group_column if packing else None
        if column is not None and dataset_name == "train":
            group_names(dataset, column)  # After the packing, rows could not be told.
        if column is None or column not in (get_dataset_column_names(dataset) or []):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy(args)
        whole.max_length = None  # The packing cuts.
        tokens: Any = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        tokens = tokens.select_columns(["input_ids", "labels", column])
        tokens = tokens.map(lambda example: {column: [example[column]] * len(example["input_ids"])})
        packed = pack_dataset(tokens, args.max_length, args.packing_strategy)
        packed = packed.map(lambda row: {column: [row[column][end - 1] for end in accumulate(row["seq_lengths"])]})
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of each token [B, T], as TRL's `loss_type` has it, and which of them count; see JDTrainerMixin."""
        core = bare(self.accelerator.unwrap_model(model))
        trains_head = self._trains_head(core, inputs)
        if self.jd_again:
            outputs = self._outputs_again(model, inputs, trains_head)
        else:
            outputs = self._outputs_of_trl(model, inputs, core, trains_head)
        if self.jd_loss_func is not None:
            return self.read_losses(outputs, inputs, core)
        losses, counted = self.read_losses(outputs, inputs, core)
        if "aux_loss" in outputs and not self._smoothing(inputs):
            aux = outputs["aux_loss"]
            found = {"loss": reduced(losses, counted) + self.router_aux_loss_coef * aux, "aux_loss": aux}
            self._jd_extra_loss = self.jd_own_loss.extra(losses, counted, found, core, self.args.jd_extra_losses)
        return losses, counted

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the update, with TRL's offloading of activations where that is on; see JDTrainerMixin."""
        with self.maybe_activation_offload_context:
            return super().training_step(*args, **kwargs)

    def read_losses(self, outputs: Any, inputs: Mapping[str, Any], core: nn.Module) -> Any:
        """What `compute_losses` reads from the outputs of the model, with or without logits; see JDTrainerMixin."""
        if self.jd_loss_func is not None:
            return super().read_losses(outputs, inputs, core)
        if outputs.get("log_probs") is not None:
            losses, counted = -outputs["log_probs"], outputs["label_mask"]
        else:
            losses, counted = causal_lm(outputs, inputs, core, self._smoothing(inputs))
        if self.args.loss_type == "dft":
            losses = losses * (-losses.detach()).exp()  # arXiv 2508.05629
        return losses, counted

    def _smoothing(self, inputs: Mapping[str, Any]) -> float:
        return self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0

    def _asks_for_logits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether TRL itself computes the loss from logits; it then leaves out a router's balancing loss."""
        return self.jd_loss_func is not None or self._smoothing(inputs) > 0

    def _trains_head(self, core: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether TRL would read a trained weight behind the taps' back; says once what the logits cost."""
        if self._asks_for_logits(inputs):
            return False
        trained = any(p.requires_grad for p in core.get_output_embeddings().parameters())
        if trained and not self._jd_warned_of_logits:
            self._jd_warned_of_logits = True
            logger.warning(
                "The head of the language model is trained, and TRL's fused loss reads its weight past the module: the "
                "losses are computed from the logits, which take memory, and TRL runs one more forward pass without "
                "gradient for its metrics. Freeze the head (and the embeddings, if they are tied) if it matters little."
            )
        return trained

    def _outputs_of_trl(self, model: nn.Module, inputs: Mapping[str, Any], core: Any, trains_head: bool) -> Any:
        """What the model returned to TRL's `compute_loss`, with a graph."""
        found: list[Any] = []
        hook = core.register_forward_hook(lambda _, __, out: found.append(out) if torch.is_grad_enabled() else None)
        own = self.compute_loss_func
        if trains_head:
            # A user's function is how TRL is asked for logits; what it returns is not used.
            self.compute_loss_func = lambda outputs, *_, **__: outputs["logits"].new_zeros(())
        try:
            SFTTrainer.compute_loss(self, model, dict(inputs))
        finally:
            hook.remove()
            self.compute_loss_func = own
        return found[0]

    def _outputs_again(self, model: nn.Module, inputs: Mapping[str, Any], trains_head: bool) -> Mapping[str, Any]:
        """What the model returns for a batch that TRL has counted: its metrics are gathered over processes, once."""
        call = {**inputs, "use_cache": False}
        if self.aux_loss_enabled:
            call["output_router_logits"] = True
        if trains_head or self._asks_for_logits(inputs):
            return model(**{key: value for key, value in call.items() if key != "labels"})
        return model(**call, fused_lm_head=True)


def _check_packing(args: JDSFTConfig) -> None:
    """Raises a ValueError for flags that need one group for each row, where a row packs several examples."""
    if args.packing and args.jd_group_column is not None and args.packing_strategy == "wrapped":
        raise ValueError(
            f"--packing_strategy wrapped cuts documents anywhere, so no row has one group of the column "
            f"`{args.jd_group_column}`: use bfd."
        )
    if args.packing and args.jd_sampler != "trainer":
        raise ValueError(
            f"--jd_sampler {args.jd_sampler} orders the examples by their group, and a row of --packing holds "
            "several: leave one of the two out."
        )
