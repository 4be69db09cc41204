"""Unreduced losses of a batch's tokens or instances, by the model's kind of loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from hf_jd.losses.causal_lm import causal_lm
from hf_jd.losses.classification import classification
from hf_jd.losses.cross_entropy import aligned
from hf_jd.losses.ctc import ctc
from hf_jd.losses.question_answering import question_answering, start_and_end

# Keys are transformers' `loss_type`, plus two that it lacks: "ForMultipleChoice" and "Seq2SeqLM".
LOSSES = {
    "ForCausalLM": causal_lm,
    "Seq2SeqLM": aligned,
    "ForMaskedLM": aligned,
    "ForSequenceClassification": classification,
    "ForTokenClassification": aligned,
    "ForQuestionAnswering": question_answering,
    "ForMultipleChoice": aligned,
    "ForImageClassification": classification,
    "ForVideoClassification": classification,
    "ForAudioClassification": classification,
    "ForCTC": ctc,
}

NAMED_LOSSES = {"ForQuestionAnswering": start_and_end}
"""The kinds whose loss is a sum of several named losses."""

__all__ = [
    "LOSSES",
    "NAMED_LOSSES",
    "bare",
    "causal_lm",
    "check_targets",
    "known_kind",
]


def bare(model: nn.Module | None) -> Any:
    """Return the model without the wrappers of torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # ty: ignore[not-callable]


def known_kind(core: Any, name: str) -> str | None:
    """Return the key of `LOSSES` for a bare model of a class with this name; None if there is none."""
    kind = getattr(core, "loss_type", None)
    answers = {
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    }
    if kind == "ForConditionalGeneration" or (kind is None and name in answers):
        kind = "Seq2SeqLM" if core.config.is_encoder_decoder else "ForCausalLM"
    elif kind is None and name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        kind = "ForMultipleChoice"
    elif kind is None and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        kind = "ForCausalLM"  # for example GPT2LMHeadModel, whose name does not match
    elif kind is None and name in MODEL_FOR_CTC_MAPPING_NAMES.values():
        kind = "ForCTC"  # transformers 5.0 sets no `loss_type`
    return kind if kind in LOSSES else None


def check_targets(kind: str, inputs: Mapping[str, Any]) -> None:
    """Check that a batch has the targets that this kind of loss needs.

    Raises:
        ValueError: Some are missing.
    """
    needed = ("start_positions", "end_positions") if kind == "ForQuestionAnswering" else ("labels",)
    missing = [f"`{name}`" for name in needed if inputs.get(name) is None]
    if missing:
        raise ValueError(
            f"The batch has no {' and no '.join(missing)}, so there are no losses: use a collator that adds them."
        )
