"""Small models: what a step of the engine really costs on them, and the matching case for the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)

from hf_jd.estimate.cases import Case
from hf_jd.gramian import Engine

VOCABULARY = 211
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_TOKENS,
    ),
    "llama, tied": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TOKENS),
    "bart": BartConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=80,
        decoder_ffn_dim=64,
        **_TOKENS,
    ),
    "t5": T5Config(d_model=40, d_kv=12, d_ff=80, num_layers=2, num_decoder_layers=3, num_heads=4, **_TOKENS),
    "mixtral": MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        **_TOKENS,
    ),
}
FIRST_MAPS = {
    "llama": [(48, 48), (24, 48), (24, 48)],
    "llama, tied": [(64, 64)] * 3,
    "gpt2": [(96, 32)],
    "bart": [(48, 48)] * 6,
    "t5": [(48, 40)] * 6,
    "mixtral": [(32, 32), (16, 32), (16, 32)],
}
"""[p, d] of the maps that get an adapter and read the embeddings."""


def _mv_flop(matrix: Any, vector: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _bmm_flop(left: Any, right: Any, out_shape: Any = None, **kwargs: Any) -> int:
    outer = left[0] == 1 and left[2] == 1  # frequency times position: later transformers don't use bmm for it
    return 0 if outer else 2 * left[0] * left[1] * left[2] * right[2]


class Counter(FlopCounterMode):
    """Also counts w^T J, a product that torch's counter doesn't know; leaves out the rotary angles."""

    def __init__(self):
        super().__init__(display=False, custom_mapping={torch.ops.aten.mv: _mv_flop, torch.ops.aten.bmm: _bmm_flop})


def build(config: PretrainedConfig, lora: int | None, seed: int = 0) -> nn.Module:
    """Build the model with plain products, since the counter doesn't know fused ones."""
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", experts_implementation="eager")
    if lora is not None:
        settings = {"target_modules": "all-linear", "fan_in_fan_out": isinstance(config, GPT2Config)}
        model = get_peft_model(model, LoraConfig(r=lora, init_lora_weights=False, **settings))
    return model.eval()


@dataclass
class Counted:
    """Operations of a plain step, and of the engine's step in two parts, and the bytes of its rows."""

    plain: int
    jacobian_and_gramian: int
    update: int
    row_bytes: int


def count(model: nn.Module, case: Case) -> Counted:
    """Count a plain step and the engine's step, with one micro-batch on one process."""
    ids = _ids(case)
    segments = None if case.groups is None else torch.arange(case.batch) * case.groups // case.batch
    plain = count_plain(model, case)
    engine = Engine(model, check=False)
    engine.compute_jacobian(_losses(model, ids, segments, case), segments, case.materialise)  # Looks up the rules.
    with Counter() as rows:
        jacobian = engine.compute_jacobian(_losses(model, ids, segments, case), segments, case.materialise)
        held = jacobian.nbytes
        jacobian.gramian()
    with Counter() as update:
        jacobian.weighted_sum(torch.ones(len(jacobian)))
    engine.detach()
    return Counted(plain, rows.get_total_flops(), update.get_total_flops(), held)


def count_plain(model: nn.Module, case: Case) -> int:
    """Count the operations of a plain step."""
    with Counter() as plain:
        _losses(model, _ids(case), None, case).mean().backward()
    model.zero_grad()
    return plain.get_total_flops()


def _ids(case: Case) -> Tensor:
    return torch.arange(case.batch * case.tokens).view(case.batch, case.tokens) % VOCABULARY


def _losses(model: nn.Module, ids: Tensor, segments: Tensor | None, case: Case) -> Tensor:
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, use_cache=False, **both).logits
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)
    if segments is None or case.groups is None:
        return losses
    return losses.new_zeros(case.groups).index_add(0, segments, losses)


def numbers(**settings: Any) -> Mapping[str, Any]:
    """Compute the cost model's numbers for a case with float32 tensors, like the small models'."""
    return {"number_bytes": 4, "trained_bytes": 4, **settings}
