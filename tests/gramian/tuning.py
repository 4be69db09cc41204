"""The methods of PEFT, on a small Llama.

Left out: AdaMSS (needs scikit-learn), Shadow (its two-stream carrier isn't a tensor, so Llama's rotary embedding
refuses it), X-LoRA (mixes adapters that were trained before).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.models import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _method(kind: str, **settings: Any) -> Callable[[], peft.PeftConfig]:
    """Return a function that builds a PEFT type's config; `target_modules` are `TARGETS` unless None."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    if "target_modules" in config.__dataclass_fields__ and "target_parameters" not in settings:
        settings = {"target_modules": TARGETS, **settings}
    if settings.get("target_modules", ()) is None:
        settings.pop("target_modules")
    return lambda: config(**{"task_type": TaskType.CAUSAL_LM, **settings})


# Lily averages its router's probabilities over the batch, so its instances mix.
MIXING: dict[str, Callable[[], peft.PeftConfig]] = {"lily": _method("LILY", r=3)}
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": _method("LORA", r=3),
    "lora-all-linear": _method("LORA", r=3, target_modules="all-linear"),
    "lora-bias": _method("LORA", r=3, lora_bias=True),
    "lora-embeddings": _method("LORA", r=3, target_modules=["embed_tokens", "q_proj"]),
    "lora-head": _method("LORA", r=3, target_modules=["lm_head", "q_proj"]),
    "lora-modules-to-save": _method("LORA", r=3, modules_to_save=["lm_head"]),
    "lora-norms-to-save": _method("LORA", r=3, modules_to_save=["norm"]),
    "lora-token-indices": _method("LORA", r=3, trainable_token_indices=[3, 5, 8]),
    "lora-replicated-layers": _method("LORA", r=3, layer_replication=[[0, 2], [0, 1]]),
    "rslora": _method("LORA", r=3, use_rslora=True),
    "pissa": _method("LORA", r=3, init_lora_weights="pissa"),
    "dora": _method("LORA", r=3, use_dora=True),
    "dora-embeddings": _method("LORA", r=3, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "alora": _method("LORA", r=3, alora_invocation_tokens=[4]),
    "adalora": _method("ADALORA", init_r=4, target_r=2, total_step=10),
    "adaption-prompt": _method("ADAPTION_PROMPT", adapter_len=3, adapter_layers=2, target_modules=None),
    "beft": _method("BEFT"),
    "boft": _method("BOFT", boft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "c3a": _method("C3A", block_size=4),
    "cartridge": _method("CARTRIDGE", num_virtual_tokens=4),
    "cpt": _method("CPT", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    "deft": _method("DEFT", r=3),
    "delora": _method("DELORA", r=3),
    "fourierft": _method("FOURIERFT", n_frequency=20),
    "frod": _method("FROD", sparse_rate=0.2, progressbar=False),
    "glora": _method("GLORA", r=3),
    "gralora": _method("GRALORA", r=4, gralora_k=2),
    "hira": _method("HIRA", r=3),
    "hra": _method("HRA", r=4),
    "ia3": _method("IA3", feedforward_modules=["down_proj"]),
    "ln-tuning": _method("LN_TUNING", target_modules=["input_layernorm", "norm"]),
    "loha": _method("LOHA", r=3),
    "lokr": _method("LOKR", r=3),
    "miss": _method("MISS", r=4),
    "multitask-prompt": _method("MULTITASK_PROMPT_TUNING", num_virtual_tokens=3, num_tasks=2),
    "oft": _method("OFT", oft_block_size=4),
    "osf": _method("OSF", effective_rank=4),
    "p-tuning": _method("P_TUNING", num_virtual_tokens=3, encoder_hidden_size=12),
    "peanut": _method("PEANUT", r=3),
    "poly": _method("POLY", r=2, n_tasks=2, n_skills=2),
    "prefix": _method("PREFIX_TUNING", num_virtual_tokens=3),
    "prefix-projected": _method("PREFIX_TUNING", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12),
    "prompt": _method("PROMPT_TUNING", num_virtual_tokens=3),
    "psoft": _method("PSOFT", r=3),
    "pvera": _method("PVERA", r=6),
    "randlora": _method("RANDLORA", r=3),
    "road": _method("ROAD", group_size=4),
    "shira": _method("SHIRA", r=1),
    "supertuning": _method("SUPERTUNING", sparsity=0.5),
    "tinylora": _method("TINYLORA", u=6),
    "trainable-tokens": _method("TRAINABLE_TOKENS", token_indices=[3, 5, 8], target_modules=["embed_tokens"]),
    "unilora": _method("UNILORA", r=2, theta_d_length=40),
    "vblora": _method("VBLORA", r=2, num_vectors=5, vector_length=8),
    "vera": _method("VERA", r=6),
    "waveft": _method("WAVEFT", n_frequency=20),
}


def tuned(method: str, tied: bool, seed: int = 0) -> PeftModel:
    """Build a small Llama with this method's adapters, in float64 and evaluation mode."""
    base = tiny_llama(seed, tie_word_embeddings=tied).float()  # Some methods start from decompositions in float32.
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Warnings about adapters that cannot be merged, and about CUDA extensions.
        return get_peft_model(base, (METHODS | MIXING)[method]()).double().eval()


def extra_inputs(method: str, batch: int) -> dict[str, torch.Tensor]:
    """Return further inputs that some methods need for each instance."""
    if method in ("multitask-prompt", "poly"):
        return {"task_ids": torch.arange(batch) % 2}
    return {}
