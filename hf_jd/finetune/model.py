"""Names and folders -> a model whose trainable parameters are set, and its tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_jd.finetune.arguments import ModelArguments
from hf_jd.finetune.example import MODEL, example_path
from hf_jd.finetune.sentences import first_sentence


def model_path(model: ModelArguments) -> str:
    """The model's name or folder.

    Raises:
        ValueError: It is a folder without a model.
    """
    name = model.model_name_or_path or str(example_path(MODEL))
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise ValueError(f"The folder {name} holds no model: it has no config.json.")
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; --model_name_or_path takes the name of a model, or its folder.")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"There is no folder {name}.")
    return name


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; one that has no padding token pads with the end-of-sequence token.

    Raises:
        ValueError: There is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)  # ty: ignore[invalid-assignment]
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of `{path}` can't be loaded: {first_sentence(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(path: str, model: ModelArguments) -> nn.Module:
    """Loads a causal language model, and adds a LoRA adapter unless all parameters are to be trained.

    Raises:
        ValueError: There is no such model, or none of its modules is to get an adapter.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model `{path}` can't be loaded: {first_sentence(error)}") from error
    if model.full:
        return loaded
    targets = model.lora_target_modules
    config = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # PEFT 0.21 reads a name that transformers 5 has replaced.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return get_peft_model(loaded, config)
    except ValueError as error:
        raise ValueError(f"LoRA can't be added to `{path}`: {first_sentence(error)}") from error
