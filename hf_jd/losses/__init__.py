"""What the tokens or instances of a batch lose, unreduced, by the model's kind of loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "is_summed",
    "loss_kind",
    "model_inputs",
    "rest",
]


def bare(model: nn.Module) -> Any:
    """The model without PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # ty: ignore[not-callable]


def loss_kind(model: nn.Module) -> str:
    """The key of `LOSSES` for a model, with or without PEFT's wrappers.

    Raises:
        ValueError: There is none.
    """
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
    if kind not in LOSSES:
        raise ValueError(
            f"{name} has no built-in unreduced loss (there are: {', '.join(LOSSES)}): override `compute_losses` and "
            "return one loss for each instance or token."
        )
    return kind


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


def rest(losses: Tensor, counted: Tensor, whole: Tensor, summed: bool = False) -> tuple[Tensor, bool]:
    """The part of the model's own loss that no token or instance owns, such as a router's balancing loss.

    Args:
        losses: Unreduced.
        counted: Which of them count, the same shape.
        whole: [] the model's own loss.
        summed: Whether that is their sum, instead of their mean.

    Returns:
        What is left of it [], with a graph, and whether that is more than rounding.
    """
    total = losses.masked_fill(~counted, 0).sum()
    ours = total if summed else total / counted.sum()
    left = whole.to(ours) - ours
    # A loss in half precision has three digits, and one in float32 seven, of which a sum may lose one or two.
    tolerance = 1e-2 if whole.dtype.itemsize == 2 else 3e-5
    found = ours.isfinite() & whole.isfinite() & ~ours.detach().isclose(whole.detach().to(ours), tolerance, 1e-6)
    return left, bool(found)
