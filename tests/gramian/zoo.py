"""The model families of transformers that a tiny config can build, as float64 models with inputs and losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY, WIDTH = 37, 16

# Sizes under all names that configs use for them. Only names that a config has are passed.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "n_embed"], WIDTH),
    **dict.fromkeys(["word_embed_proj_dim", "attention_hidden_size"], WIDTH),
    **dict.fromkeys(["n_layer", "n_layers", "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers", "type_vocab_size", "num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "d_kv", "head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["state_size", "time_step_rank", "num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_window"], 4),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "sliding_window"], 8),
    **dict.fromkeys(["intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim"], 24),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 24),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 12),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 32),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
}

OF_KIND: dict[str, dict[str, Any]] = {
    "image": {
        "hidden_sizes": [16, 24],
        "depths": [1, 1],
        "embed_dim": 16,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
    },
    "audio": {
        **dict.fromkeys(["conv_dim"], [16, 16]),
        **dict.fromkeys(["conv_kernel"], [3, 3]),
        **dict.fromkeys(["conv_stride"], [2, 2]),
        **dict.fromkeys(["num_feat_extract_layers", "num_conv_pos_embedding_groups"], 2),
        "num_conv_pos_embeddings": 4,
        "num_labels": 5,
    },
    "classification": {"num_labels": 5},
    "tokens": {"num_labels": 5},
}

HEADS = {
    "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokens": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "questions": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Head:
    """One model of the zoo.

    Attributes:
        kind: A key of `HEADS`.
        family: The config's model_type.
        overrides: Further arguments of the config, besides `SIZES`.
    """

    kind: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.family}"

    def config(self) -> PretrainedConfig:
        known = AutoConfig.for_model(self.family)
        sizes = {k: v for k, v in (SIZES | OF_KIND.get(self.kind, {})).items() if hasattr(known, k)}
        config = AutoConfig.for_model(self.family, **{**sizes, **self.overrides})
        config._experts_implementation = "eager"  # Grouped products of experts don't support float64.
        return config

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model in float64, in evaluation mode: without dropout, since the oracle repeats forwards."""
        name = HEADS[self.kind][self.family]
        torch.manual_seed(seed)
        model = getattr(transformers, name if isinstance(name, str) else name[0])(self.config())
        return model.double().eval()

    def inputs(self, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
        """Return a batch's keyword inputs."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64)}
        if self.kind == "audio":
            return {"input_values": torch.randn(batch, 400 + 10 * length, generator=generator, dtype=torch.float64)}
        shape = (batch, 2, length) if self.kind == "choice" else (batch, length)
        ids = torch.randint(3, VOCABULARY, shape, generator=generator)
        if self.kind == "encoder-decoder":
            return {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1)[:, : max(length - 2, 1)]}
        return {"input_ids": ids}


def instance_losses(output: Any, columns: int | None = None) -> Tensor:
    """Compute one loss per instance [B] from all numbers that the model outputs for it; or [B, columns] losses.

    It is a squared distance to fixed targets, which no final norm makes constant.
    """
    parts = [output[k] for k in ("logits", "start_logits", "end_logits") if getattr(output, k, None) is not None]
    values = torch.cat([part.double().flatten(1) for part in parts], dim=1)
    n = values.shape[1]
    targets = torch.sin(torch.arange(n * max(columns or 1, 1), dtype=torch.float64)).view(-1, n)
    losses = torch.stack([(values - target).square().mean(1) for target in targets], dim=1)
    return losses[:, 0] if columns is None else losses


@functools.lru_cache(maxsize=1)
def _state(head: Head) -> tuple[nn.Module, dict[str, Tensor]]:
    model = head.build()
    return model, {k: v.clone() for k, v in model.state_dict().items()}


def model_of(head: Head) -> nn.Module:
    """Return the head's model with its initial weights; built once for consecutive tests."""
    model, state = _state(head)
    model.load_state_dict(state)
    model.zero_grad()
    return model


def losses_of(model: nn.Module, head: Head, shapes: list[tuple[int, int]]) -> Callable[[int], Tensor]:
    """Compute the losses of a step, on a new batch of the step's shape."""

    def losses(step: int) -> Tensor:
        batch, length = shapes[step]
        return instance_losses(model(**head.inputs(batch, length, seed=step)))

    return losses
