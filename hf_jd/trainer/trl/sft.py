"""`JDSFTTrainer`: Jacobian descent in TRL's SFTTrainer; needs `hf-jd[trl]`.

TRL's own `compute_loss` runs; this file only adds names, packing with groups, and support for a trained head.
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
from hf_jd.distributed.processes import process_count
from hf_jd.gramian.random_streams import random_state, set_random_state
from hf_jd.groups import group_names
from hf_jd.losses import bare, causal_lm
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.overrides import overridden

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
    sees it. If the head is trained, losses are computed from the logits instead, like in any other trainer.
    """

    args: JDSFTConfig

    def __init__(self, *args: Any, **kwargs: Any):
        config = kwargs.get("args", args[1] if len(args) > 1 else None)
        if not isinstance(config, JDSFTConfig):
            raise ValueError(
                f"The arguments of {type(self).__name__} are {type(config).__name__}, without the flags of both TRL's "
                "SFT and Jacobian descent: use JDSFTConfig."
            )
        _check_packing(config)
        self._jd_warned_of_logits = False
        super().__init__(*args, **kwargs)

    def follow_flags(self) -> None:
        """Apply the flags; see JDTrainerMixin."""
        _check_packing(self.args)
        super().follow_flags()

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Prepare a dataset like TRL; in packed rows, keep the documents' groups, which TRL drops."""
        column = args.jd_group_column if packing else None
        if column is not None and dataset_name == "train":
            group_names(dataset, column)  # checks the column while errors can still name the row
        if column is None or column not in (get_dataset_column_names(dataset) or []):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy(args)
        whole.max_length = None  # packing truncates
        tokens: Any = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        tokens = tokens.select_columns(["input_ids", "labels", column])
        tokens = tokens.map(lambda example: {column: [example[column]] * len(example["input_ids"])})
        packed = pack_dataset(tokens, args.max_length, args.packing_strategy)
        packed = packed.map(lambda row: {column: [row[column][end - 1] for end in accumulate(row["seq_lengths"])]})
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's own loss; if the head is trained, from logits, as with a `compute_loss_func`."""
        if not model.training or self.jd_loss_func is not None or not self._trains_head():
            return super().compute_loss(model, inputs, *args, **kwargs)
        streams = random_state(self.args.device)

        def loss_of_logits(*of_batch: Any, **settings: Any) -> Tensor:
            # TRL's further forward pass, for its metrics, must draw the same dropout and noise, and no more.
            set_random_state(streams, self.args.device)
            return self._loss_of_logits(*of_batch, **settings)

        self.compute_loss_func = loss_of_logits
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.compute_loss_func = None

    def forget_losses(self) -> None:
        """See JDTrainerMixin."""
        super().forget_losses()
        self.jd_compared = self.args.loss_type == "dft"  # The model's own loss is the plain one.

    @property
    def knows_losses(self) -> bool:
        """See JDTrainerMixin."""
        replaced = type(self).compute_loss is not JDSFTTrainer.compute_loss or "compute_loss" in vars(self)
        return not replaced and self.jd_loss_func is None and overridden(self) == "compute_loss"

    def read_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Read the tokens' losses according to TRL's `loss_type`, with or without logits; see JDTrainerMixin."""
        if outputs.get("log_probs") is not None:
            losses, counted = -outputs["log_probs"], outputs["label_mask"]
        else:
            assert self.model is not None
            losses, counted = causal_lm(outputs, inputs, self.model, self._smoothing(inputs))
        if self.args.loss_type == "dft":
            losses = losses * (-losses.detach()).exp()  # arXiv 2508.05629
        return losses, counted

    def _smoothing(self, inputs: Mapping[str, Any]) -> float:
        return self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0

    def _trains_head(self) -> bool:
        """Return whether TRL would read a trained weight without a tap; warn once about the cost of logits."""
        if self.label_smoother is not None and self.args.loss_type == "nll":
            return False  # TRL computes logits anyway
        core = bare(self.model)
        trained = any(p.requires_grad for p in core.get_output_embeddings().parameters())
        if trained and not self._jd_warned_of_logits:
            self._jd_warned_of_logits = True
            logger.warning(
                "The head of the language model is trained, but TRL's fused loss reads its weight without calling the "
                "module: losses are computed from the logits, which take memory, and TRL runs one more forward pass "
                "without gradient for its metrics. Freeze the head (and tied embeddings) if it matters little."
            )
        return trained

    def _loss_of_logits(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Compute TRL's loss of a batch from the logits, instead of its fused loss."""
        losses, counted = self.read_losses(outputs, {"labels": labels})
        shared = num_items_in_batch is not None
        divide_by = torch.as_tensor(num_items_in_batch if shared else counted.sum()).clamp(min=1)
        loss = losses.sum() / divide_by.to(losses.device)
        if self.aux_loss_enabled:
            # TRL multiplies a loss of tokens by the number of processes that share their count.
            averaged = self.current_gradient_accumulation_steps if shared else 1
            averaged *= process_count() if shared and self.args.average_tokens_across_devices else 1
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"] / averaged
        return loss


def _check_packing(args: JDSFTConfig) -> None:
    """Raise a ValueError for flags that need one group per row, if rows pack several examples."""
    if args.packing and args.jd_group_column is not None and args.packing_strategy == "wrapped":
        raise ValueError(
            f"--packing_strategy wrapped cuts documents anywhere, so no row has one group of the column "
            f"`{args.jd_group_column}`: use bfd."
        )
    if args.packing and args.jd_sampler != "trainer":
        raise ValueError(
            f"--jd_sampler {args.jd_sampler} orders the examples by their group, but a row of --packing holds several: "
            "leave one of the flags out."
        )
