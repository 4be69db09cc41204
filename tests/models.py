"""Tiny models, built from configs: no download, and small enough for float64 on one core."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 37


def tiny_llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """Build a Llama with two layers, in float64 (except that its norms compute in float32)."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).double()


def tiny_gpt2(seed: int = 0, dropout: float = 0.0, **config) -> GPT2LMHeadModel:
    """Build a GPT-2 with two layers, which computes in float64 up to its logits."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
    }
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **config})).double()


def with_lora(model: nn.Module, seed: int = 0, dropout: float = 0.0, warm: bool = False, **config) -> nn.Module:
    """Add LoRA adapters of rank 3.

    Args:
        model: A tiny model.
        seed: The adapters' seed.
        dropout: LoRA's dropout.
        warm: Whether B starts with random values, so that A has gradients from the first step on.
        config: Further arguments of LoraConfig.
    """
    torch.manual_seed(seed)
    targets = ["c_attn", "c_fc"] if isinstance(model, GPT2LMHeadModel) else ["q_proj", "v_proj", "down_proj"]
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": targets, "task_type": "CAUSAL_LM"}
    if isinstance(model, GPT2LMHeadModel):
        settings["fan_in_fan_out"] = True
    peft_model = get_peft_model(model, LoraConfig(**{**settings, **config})).double()
    if warm:
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return peft_model
