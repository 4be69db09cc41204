"""Names and folders -> a model with its trainable parameters set, and its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from hf_jd.finetune.example import MODEL, example_path
from hf_jd.finetune.flags import ModelArguments
from hf_jd.finetune.sentences import explained

ADAPTER_CONFIG = "adapter_config.json"


def model_path(model: ModelArguments) -> str:
    """Return the model's name or folder; raise a ValueError for a folder without a model or an adapter."""
    name = model.model_name_or_path or str(example_path(MODEL))
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(f"The folder {name} holds no model: it has no config.json.")
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; --model_name_or_path takes the name of a model, or its folder.")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no folder {name}.")
    return name


def load_tokenizer(path: str, model: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or raise a ValueError; without a padding token, it pads with the end-of-sequence token."""
    with explained(f"The tokenizer of `{path}` can't be loaded", OSError, ValueError):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, **_source(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(path: str, model: ModelArguments) -> nn.Module:
    """Load a causal language model, and add a LoRA adapter unless all parameters are trained.

    A folder with an adapter is loaded with its base model, and training continues with that adapter.

    Raises:
        ValueError: The model can't be loaded, or LoRA can't be added to it.
    """
    settings: dict[str, Any] = _source(model) | {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if model.load_in_4bit:
        settings["quantization_config"] = _four_bits(model)
    adapted = (Path(path) / ADAPTER_CONFIG).exists()
    if adapted and model.full:
        raise ValueError(f"`{path}` is an adapter: leave out --full to train it, or merge it into its model first.")
    # ImportError: the attention isn't installed.
    with explained(f"The model `{path}` can't be loaded", OSError, ValueError, ImportError):
        if adapted:
            return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **settings)
        loaded = AutoModelForCausalLM.from_pretrained(path, **settings)
    return loaded if model.full else _with_lora(loaded, path, model)


def _with_lora(loaded: nn.Module, path: str, model: ModelArguments) -> nn.Module:
    targets = model.lora_target_modules
    config = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=model.lora_modules_to_save,
        use_dora=model.use_dora,
        task_type="CAUSAL_LM",
    )
    if model.load_in_4bit:
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    with explained(f"LoRA can't be added to `{path}`", ValueError):
        return get_peft_model(loaded, config)


def _source(model: ModelArguments) -> dict[str, Any]:
    return {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}


def _four_bits(model: ModelArguments) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit needs bitsandbytes, which isn't installed: `pip install bitsandbytes`.")
    compute = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
