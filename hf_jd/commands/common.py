"""Run a TRL trainer from the command line: read flags and YAML like TRL, load the data, train, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import is_bitsandbytes_available

from hf_jd.arguments import JDArguments
from hf_jd.finetune.console import hide_bars
from hf_jd.finetune.facts import FactsWriter, training_facts
from hf_jd.finetune.flags import MAIN_FLAGS
from hf_jd.finetune.model import model_path
from hf_jd.finetune.parser import Parser, names_of, read_settings
from hf_jd.finetune.sentences import first_sentence

try:
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        get_peft_config,
        get_quantization_config,
        is_conversational,
    )
except ImportError as error:
    raise ValueError(f"This command needs TRL ({error}): pip install 'hf-jd[trl]'.") from error

from hf_jd.commands.data import check_data, load, split


def run(
    name: str,
    argv: Sequence[str],
    trainer: Any,
    config: Any,
    script: Any = ScriptArguments,
    more: Callable[[Any, Any], dict[str, Any]] | None = None,
) -> int:
    """Run a command.

    Args:
        name: The command's name.
        argv: Its arguments: flags, and `--config FILE.yaml`.
        trainer: The trainer class.
        config: The class of the trainer's arguments.
        script: TRL's class of script arguments.
        more: Builds further arguments of the trainer, from the script's and the model's arguments.

    Returns:
        The exit code.
    """
    script_args, args, model, mixture = parse(name, argv, script, config)
    _check(model)
    hide_bars(args)
    args.model_init_kwargs = _loading(model, args)
    if name == "reward":
        model.lora_task_type = "SEQ_CLS"  # the only one that fits its model; TRL's default is CAUSAL_LM
    data = load(script_args, mixture)
    rows = split(data, script_args.dataset_train_split, "dataset_train_split")
    check_data(name, rows, args)
    further = {} if more is None else more(script_args, model)
    _check_tokenizer(rows, args, model)
    built = trainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=rows,
        eval_dataset=None
        if args.eval_strategy == "no"
        else split(data, script_args.dataset_test_split, "dataset_test_split"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        **further,
    )
    built.add_callback(_facts_writer(script_args, args, model))
    _train(built, args.resume_from_checkpoint)
    built.save_model(args.output_dir)
    built.accelerator.print(f"Saved in {args.output_dir}.")
    if args.push_to_hub:
        built.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def _facts_writer(script: Any, args: Any, model: Any) -> FactsWriter:
    """Return the callback that writes the run's settings, for its report."""
    source = Path(script.dataset_name).name if script.dataset_name else "a mixture"
    facts = {"data": source, "full": not model.use_peft, "lora_r": model.lora_r}
    return FactsWriter(Path(args.output_dir), facts | training_facts(model.model_name_or_path, args))


def _train(trainer: Any, checkpoint: str | None) -> None:
    """Train, and say how to continue if it is stopped."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Stopped. To continue from the last checkpoint (--save_steps), add --resume_from_checkpoint last."
        ) from None


def parse(name: str, argv: Sequence[str], script: Any, config: Any) -> Any:
    """Parse the arguments like TRL.

    Raises:
        ValueError: A flag is unknown or has a value that isn't allowed, or the file can't be read.
    """
    kinds: list[Any] = [script, config, ModelConfig, DatasetMixtureConfig]
    parser = Parser(
        kinds,
        prog=f"hf-jd {name}",
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
        description="TRL's script of this name, with Jacobian descent. The file holds flags as `name: value`.",
        allow_abbrev=False,
        sections={
            "Jacobian descent": names_of(JDArguments),
            "Model": names_of(ModelConfig),
            "Data and rewards": names_of(script),
            "Training, as in transformers' TrainingArguments": MAIN_FLAGS,
        },
    )
    if not torch.accelerator.is_available():
        # TRL's configs turn bf16 on, and are then refused on a CPU; torch warns of memory pinned for no accelerator.
        parser.set_defaults(bf16=False, dataloader_pin_memory=False)
    flags, settings = _split_config(argv)
    return parser.parse(flags, settings)


def _split_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split off the settings in `--config FILE`, and set the environment variables in its `env`, like TRL."""
    flags = list(argv)
    if "--config" not in flags:
        return flags, {}
    at = flags.index("--config")
    if at + 1 == len(flags):
        raise ValueError("--config is given without a file.")
    settings = read_settings(Path(flags[at + 1]))
    os.environ.update({name: str(value) for name, value in (settings.pop("env", None) or {}).items()})
    return flags[:at] + flags[at + 2 :], settings


def _check_tokenizer(rows: Any, args: Any, model: Any) -> None:
    """Raise a ValueError for a model that isn't there, and for chats that no template can write."""
    name, source = model_path(model), {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        processor: Any = AutoProcessor.from_pretrained(name, **source)  # as TRL loads it
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of `{name}` can't be loaded: {first_sentence(error)}") from error
    if getattr(args, "chat_template_path", None) or getattr(processor, "chat_template", None) is not None:
        return
    if is_conversational(next(iter(rows), {})):
        raise ValueError(
            f"The data holds chats, and the tokenizer of `{name}` has no chat template: choose a chat model, name a "
            "template with --chat_template_path (SFT), or use `hf-jd finetune`, which has a plain one."
        )


def _check(model: Any) -> None:
    """Raise a ValueError for a model that can't be loaded."""
    if model.model_name_or_path is None:
        raise ValueError("No model is given: name it, or its folder, with --model_name_or_path.")
    if (model.load_in_4bit or model.load_in_8bit) and not is_bitsandbytes_available():
        bits = 4 if model.load_in_4bit else 8
        raise ValueError(
            f"--load_in_{bits}bit needs bitsandbytes, which is not installed or can't run here: pip install "
            "bitsandbytes on a machine whose device it supports, or leave the flag out."
        )


def _loading(model: Any, args: Any) -> dict[str, Any]:
    """Return the arguments for loading the model, like TRL's scripts."""
    defaults = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {**defaults, **(args.model_init_kwargs or {})}
