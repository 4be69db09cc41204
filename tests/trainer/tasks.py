"""One tiny float64 model and its batches for each task of Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.models import VOCABULARY, tiny_gpt2

TASKS = ("code", "docs", "chat")
CLASSES = 3


def _bert(cls: type) -> Callable[..., nn.Module]:
    def build(**config: Any) -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        positions = {"max_position_embeddings": 16}
        return cls(BertConfig(vocab_size=VOCABULARY, **sizes, **dropout, **positions, **config))

    return build


def _distilbert(**config: Any) -> nn.Module:
    sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCABULARY, **sizes, **dropout, **config))


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0))


def _whisper() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4, "max_source_positions": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    others = {"max_target_positions": 16, "begin_suppress_tokens": None, "suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=VOCABULARY, **sizes, **heads, **tokens, **others))


def _vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **sizes, num_labels=CLASSES))


def _wav2vec2(**config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 2), "num_feat_extract_layers": 2}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}
    others = {"layerdrop": 0.0, "activation_dropout": 0.0, "mask_time_prob": 0.0, "num_conv_pos_embeddings": 2}
    norm = {"feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 2}
    config = {**sizes, **convolutions, **dropout, **others, **norm, **config}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=VOCABULARY, **config))


def _text(g: torch.Generator) -> dict[str, Any]:
    length = int(torch.randint(4, 9, (1,), generator=g))
    return {"input_ids": _ids(g, length), "attention_mask": [1] * length}


def _ids(g: torch.Generator, n: int, high: int = VOCABULARY) -> list[int]:
    return torch.randint(3, high, (n,), generator=g).tolist()


def _some(g: torch.Generator, labels: list[int]) -> list[int]:
    """Keep some of the labels, including the first; set the others to -100."""
    keep = torch.rand(len(labels), generator=g) < 0.5
    return [label if i == 0 or keep[i] else -100 for i, label in enumerate(labels)]


def _with(label: Callable[[torch.Generator], Any]) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda g: {**_text(g), "labels": label(g)}


def _masked(g: torch.Generator) -> dict[str, Any]:
    text = _text(g)
    return {**text, "labels": _some(g, text["input_ids"])}


def _tagged(g: torch.Generator) -> dict[str, Any]:
    text = _text(g)
    return {**text, "labels": _some(g, torch.randint(CLASSES, (len(text["input_ids"]),), generator=g).tolist())}


def _answered(g: torch.Generator) -> dict[str, Any]:
    # 20 is beyond every input's end: such a start or end is ignored.
    start, end = torch.randint(4, (2,), generator=g).tolist()
    return {**_text(g), "start_positions": start, "end_positions": end if torch.rand(1, generator=g) < 0.8 else 20}


def _choices(g: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": [_ids(g, 5) for _ in range(CLASSES)],
        "attention_mask": [[1] * 5] * CLASSES,
        "labels": int(torch.randint(CLASSES, (1,), generator=g)),
    }


def _image(g: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 4, 4, generator=g).tolist(), "labels": _class(g)}


def _sound(g: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(96, generator=g).tolist(), "labels": _ids(g, 2 + _class(g))}


def _speech(g: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(4, 16, generator=g).tolist(), "labels": _ids(g, 3 + _class(g))}


def _class(g: torch.Generator) -> int:
    return int(torch.randint(CLASSES, (1,), generator=g))


@dataclass(frozen=True)
class Task:
    """A task: its model, its examples, and what LoRA adapts.

    Attributes:
        build: Makes the model.
        example: Draws an example.
        targets: The modules that LoRA adapts.
        normalises: What the stock Trainer divides by over accumulation: the update's number of items ("items"); each
            micro-batch's number of items, and the number of micro-batches ("batches"); or, in a known error, only each
            micro-batch's number of items ("nothing").
        tolerance: 1e-10, or 1e-6 where the model's own loss computes in float32.
        smoothed: Whether label smoothing makes sense.
    """

    build: Callable[[], nn.Module]
    example: Callable[[torch.Generator], dict[str, Any]]
    targets: list[str]
    normalises: str = "nothing"
    tolerance: float = 1e-10
    smoothed: bool = False


QUERY = ["query", "value"]
TABLE = {
    "causal": Task(tiny_gpt2, _masked, ["c_attn"], "items", smoothed=True),
    "seq2seq": Task(_t5, lambda g: {**_text(g), "labels": _ids(g, 3 + _class(g))}, ["q", "v"], smoothed=True),
    "masked": Task(_bert(BertForMaskedLM), _masked, QUERY, smoothed=True),
    "single-label": Task(
        lambda: _bert(BertForSequenceClassification)(num_labels=CLASSES), _with(_class), QUERY, smoothed=True
    ),
    "multi-label": Task(
        lambda: _bert(BertForSequenceClassification)(num_labels=CLASSES),
        _with(lambda g: (torch.rand(CLASSES, generator=g) < 0.5).double().tolist()),
        QUERY,
    ),
    "regression": Task(
        lambda: _bert(BertForSequenceClassification)(num_labels=1),
        _with(lambda g: float(torch.rand(1, generator=g))),
        QUERY,
    ),
    "regression-of-three": Task(
        lambda: _bert(BertForSequenceClassification)(num_labels=CLASSES, problem_type="regression"),
        _with(lambda g: torch.rand(CLASSES, generator=g).tolist()),
        QUERY,
    ),
    "distilbert": Task(lambda: _distilbert(num_labels=CLASSES), _with(_class), ["q_lin", "v_lin"]),
    "token": Task(lambda: _bert(BertForTokenClassification)(num_labels=CLASSES), _tagged, QUERY, smoothed=True),
    "question-answering": Task(_bert(BertForQuestionAnswering), _answered, QUERY, "batches"),
    "multiple-choice": Task(_bert(BertForMultipleChoice), _choices, QUERY),
    "image": Task(_vit, _image, [*QUERY, "q_proj", "v_proj"], "items"),
    "ctc": Task(lambda: _wav2vec2(ctc_loss_reduction="mean"), _sound, ["q_proj", "v_proj"], tolerance=1e-6),
    "ctc-sum": Task(lambda: _wav2vec2(ctc_loss_reduction="sum"), _sound, ["q_proj", "v_proj"], tolerance=1e-6),
    "speech": Task(_whisper, _speech, ["q_proj", "v_proj"]),
}


def model_of(task: Task, adapted: bool) -> nn.Module:
    """Build the task's float64 model, with or without LoRA; always the same."""
    torch.manual_seed(0)
    model = task.build().double()
    if not adapted:
        return model
    torch.manual_seed(1)
    head = [n for n in ("classifier", "qa_outputs") if hasattr(model, n)]
    conv1d = "c_attn" in task.targets  # GPT-2's weights are transposed.
    config = LoraConfig(
        r=2, target_modules=task.targets, modules_to_save=head or None, init_lora_weights=False, fan_in_fan_out=conv1d
    )
    return get_peft_model(model, config).double()


def examples_of(task: Task, n: int) -> list[dict[str, Any]]:
    """Return n examples of a task, with the groups in turn."""
    generator = torch.Generator().manual_seed(3)
    return [{**task.example(generator), "task": TASKS[i % len(TASKS)]} for i in range(n)]


PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad lists of numbers to the longest one."""
    collated = {}
    for key in batch[0]:
        values = [example[key] for example in batch]
        ragged = isinstance(values[0], list) and key in PADDING and not isinstance(values[0][0], list | float)
        if ragged:
            length = max(map(len, values))
            values = [value + [PADDING[key]] * (length - len(value)) for value in values]
        collated[key] = torch.tensor(values)
        if collated[key].is_floating_point():
            collated[key] = collated[key].double()
    return collated
