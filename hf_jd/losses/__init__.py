"""What the tokens or instances of a batch lose, unreduced, by the model's kind of loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from hf_jd.losses.causal_lm import causal_lm
from hf_jd.losses.classification import classification
from hf_jd.losses.ctc import ctc
from hf_jd.losses.masked_lm import masked_lm
from hf_jd.losses.multiple_choice import multiple_choice
from hf_jd.losses.question_answering import question_answering, start_and_end
from hf_jd.losses.seq2seq_lm import seq2seq_lm
from hf_jd.losses.token_classification import token_classification

# By transformers' `loss_type`; "ForMultipleChoice" and "Seq2SeqLM" have none of their own.
LOSSES = {
    "ForCausalLM": causal_lm,
    "Seq2SeqLM": seq2seq_lm,
    "ForMaskedLM": masked_lm,
    "ForSequenceClassification": classification,
    "ForTokenClassification": token_classification,
    "ForQuestionAnswering": question_answering,
    "ForMultipleChoice": multiple_choice,
    "ForImageClassification": classification,
    "ForVideoClassification": classification,
    "ForAudioClassification": classification,
    "ForCTC": ctc,
}

NAMED_LOSSES = {"ForQuestionAnswering": start_and_end}
"""The kinds whose loss is a sum of several, by name."""

TARGETS = ("labels", "start_positions", "end_positions")
"""The keys of a batch from which a model would compute its own loss."""

__all__ = [
    "LOSSES",
    "NAMED_LOSSES",
    "TARGETS",
    "bare",
    "causal_lm",
    "check_targets",
    "differs",
    "is_summed",
    "known_kind",
    "loss_kind",
    "model_inputs",
    "reads_logits",
    "reduced",
]


def bare(model: nn.Module) -> Any:
    """The model without PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # ty: ignore[not-callable]


def loss_kind(model: nn.Module) -> str:
    """The key of `LOSSES` for a model, with or without PEFT's wrappers.

    Raises:
        ValueError: There is none.
    """
    kind = known_kind(model)
    if kind is None:
        raise ValueError(
            f"{type(bare(model)).__name__} has no built-in unreduced loss (there are: {', '.join(LOSSES)}): override "
            "`compute_losses` and return one loss for each instance or token."
        )
    return kind


def known_kind(model: nn.Module) -> str | None:
    """The key of `LOSSES` for a model; None where there is none."""
    core = bare(model)
    name, kind = type(core).__name__, getattr(core, "loss_type", None)
    answers = {
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    }
    if kind == "ForConditionalGeneration" or (kind is None and name in answers):
        kind = "Seq2SeqLM" if core.config.is_encoder_decoder else "ForCausalLM"
    elif kind is None and name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        kind = "ForMultipleChoice"
    elif kind is None and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        kind = "ForCausalLM"  # As GPT2LMHeadModel, whose name does not say it.
    elif kind is None and name in MODEL_FOR_CTC_MAPPING_NAMES.values():
        kind = "ForCTC"  # transformers 5.0 doesn't say it
    return kind if kind in LOSSES else None


def check_targets(kind: str, inputs: Mapping[str, Any]) -> None:
    """Makes sure that a batch has what the kind's losses are computed from.

    Raises:
        ValueError: It hasn't.
    """
    needed = TARGETS[1:] if kind == "ForQuestionAnswering" else TARGETS[:1]
    missing = [f"`{name}`" for name in needed if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"The batch has no {' and no '.join(missing)}, so there are no losses: use a collator that makes them."
        )


def model_inputs(kind: str, inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The inputs without the labels: the model's own loss would only cost time and memory.

    Encoder-decoders shift their labels to get the decoder's inputs; one that only does it inside keeps its labels.
    """
    without = {key: value for key, value in inputs.items() if key not in TARGETS}
    if kind == "Seq2SeqLM" and inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        shift = getattr(bare(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return dict(inputs)
        without["decoder_input_ids"] = shift(labels=inputs["labels"])
    return without


def is_summed(kind: str, model: nn.Module) -> bool:
    """Whether the model's own loss is the sum of its instances' losses, instead of their mean."""
    return kind == "ForCTC" and bare(model).config.ctc_loss_reduction == "sum"


def reduced(losses: Tensor, counted: Tensor, summed: bool = False) -> Tensor:
    """What the model's own loss is made of [], by the kind's unreduced losses.

    Args:
        losses: Unreduced.
        counted: Which of them count, the same shape.
        summed: Whether it is their sum, instead of their mean.
    """
    total = losses.masked_fill(~counted, 0).sum()
    return total if summed else total / counted.sum()


def differs(whole: Tensor, ours: Tensor, half: bool, at_every_step: bool = False) -> Tensor:
    """Whether the model's own loss is another one than ours, by more than rounding; not where one isn't finite.

    Args:
        whole: [] the model's own loss.
        ours: [] what it should be.
        half: Whether either is computed in half precision.
        at_every_step: Whether it is asked so often that what rounding rarely brings comes, too.

    Returns:
        [] (bool).
    """
    whole, ours = whole.detach().to(ours), ours.detach()
    # A loss in half precision has three digits, and one in float32 seven, of which a sum may lose one or two.
    once, often = ((1e-2, 1e-6), (3e-2, 1e-4)) if half else ((3e-5, 1e-6), (2e-4, 1e-5))
    relative, absolute = often if at_every_step else once
    return ours.isfinite() & whole.isfinite() & ~ours.isclose(whole, relative, absolute)


def reads_logits(left: Tensor, whole: Tensor, outputs: Mapping[str, Any]) -> bool:
    """Whether the gradient of a part of the model's own loss goes through its logits, by more than rounding.

    A penalty or a router's loss doesn't read them. What does is another loss of the tokens or instances than ours.

    Args:
        left: [] what is left of the model's own loss beside ours, with a graph.
        whole: [] the model's own loss, with a graph.
        outputs: Of the model. What it doesn't compute its loss from, but returns, tells nothing.
    """
    logits = [outputs.get(key) for key in ("logits", "start_logits", "end_logits")]
    edges = [_before_casts(found) for found in logits if isinstance(found, Tensor) and found.requires_grad]
    if not edges or not whole.requires_grad:
        return False
    of_left, of_whole = (
        [None if gradient is None else gradient.double().norm() for gradient in found]
        for found in (torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True) for loss in (left, whole))
    )
    return any(
        theirs is not None and mine is not None and bool(mine > 0.05 * theirs)
        for mine, theirs in zip(of_left, of_whole, strict=True)
    )


def _before_casts(tensor: Tensor) -> torch.autograd.graph.GradientEdge:
    """Where a tensor is in its graph, before it was cast: the model's own loss may read it there."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    while edge.node.name() == "ToCopyBackward0":
        node, index = edge.node.next_functions[0]
        if node is None:
            break
        edge = torch.autograd.graph.GradientEdge(node, index)
    return edge
