"""Run a TRL trainer from the command line: read flags and YAML like TRL, load the data, train, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers.utils import is_bitsandbytes_available

from hf_jd.finetune.facts import FactsWriter, training_facts

try:
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_dataset,
        get_peft_config,
        get_quantization_config,
    )
except ImportError as error:
    raise ValueError(f"This command needs TRL ({error}): pip install 'hf-jd[trl]'.") from error

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""The `datasets` builder for a local file, by its ending."""


COLUMNS = {
    "dpo": ("chosen", "rejected"),
    "reward": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",),
}
"""The columns that each command's trainer needs; SFT takes several forms."""


def run(
    name: str,
    argv: Sequence[str],
    trainer: Any,
    config: Any,
    script: Any = ScriptArguments,
    more: Callable[[Any, Any], dict[str, Any]] | None = None,
) -> int:
    """Runs a command.

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
    kinds: list[Any] = [script, config, ModelConfig, DatasetMixtureConfig]
    parser: Any = TrlParser(kinds, prog=f"hf-jd {name}")
    script_args, args, model, mixture = _parse(parser, argv)
    _check(model)
    args.model_init_kwargs = _loading(model, args)
    data = load(script_args, mixture)
    _check_columns(name, _split(data, script_args.dataset_train_split, "dataset_train_split"))
    built = trainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=_split(data, script_args.dataset_train_split, "dataset_train_split"),
        eval_dataset=None
        if args.eval_strategy == "no"
        else _split(data, script_args.dataset_test_split, "dataset_test_split"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        **({} if more is None else more(script_args, model)),
    )
    built.add_callback(_facts_writer(script_args, args, model))
    _train(built, args.resume_from_checkpoint)
    built.save_model(args.output_dir)
    if args.push_to_hub:
        built.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def _facts_writer(script: Any, args: Any, model: Any) -> FactsWriter:
    """Returns the callback that writes the run's settings, for its report."""
    source = Path(script.dataset_name).name if script.dataset_name else "a mixture"
    facts = {"data": source, "full": not model.use_peft, "lora_r": model.lora_r}
    return FactsWriter(Path(args.output_dir), facts | training_facts(model.model_name_or_path, args))


def _train(trainer: Any, checkpoint: str | None) -> None:
    """Trains, and says how to continue if it is stopped."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "Stopped. To continue from the last checkpoint (--save_steps), add --resume_from_checkpoint last."
        ) from None


def _parse(parser: Any, argv: Sequence[str]) -> Any:
    """Parses the arguments like TRL; raises a ValueError with the nearest flag for an unknown one."""
    *parsed, unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        flags = [f"--{field.name}" for kind in parser.dataclass_types for field in fields(kind)]
        nearest = get_close_matches(flag, flags, n=1)
        advice = f"; the nearest is `{nearest[0]}`" if nearest else ""
        raise ValueError(f"Unknown flag `{flag}`{advice}.")
    return parsed


def _check_columns(command: str, rows: Any) -> None:
    """Raises a ValueError for texts without the columns that the command's trainer reads."""
    columns, needed = getattr(rows, "column_names", None) or [], COLUMNS.get(command, ())
    missing = [f"`{name}`" for name in needed if name not in columns]
    # Streams may not know their columns; token ids have other names; and KTO takes pairs apart.
    pairs = command == "kto" and {"chosen", "rejected"} <= {*columns}
    fits = pairs or not columns or any(name.endswith("_ids") for name in columns)
    if missing and not fits:
        raise ValueError(
            f"The data has no column {', '.join(missing)}; hf-jd {command} reads {', '.join(needed)}, and the data has "
            f"{', '.join(columns)}: rename its columns, or choose another command (`hf-jd --help`)."
        )


def _check(model: Any) -> None:
    """Raises a ValueError for a model that can't be loaded."""
    if model.model_name_or_path is None:
        raise ValueError("No model is given: name it, or its folder, with --model_name_or_path.")
    if (model.load_in_4bit or model.load_in_8bit) and not is_bitsandbytes_available():
        bits = 4 if model.load_in_4bit else 8
        raise ValueError(
            f"--load_in_{bits}bit needs bitsandbytes, which is not installed or can't run here: pip install "
            "bitsandbytes on a machine whose device it supports, or leave the flag out."
        )


def _loading(model: Any, args: Any) -> dict[str, Any]:
    """Returns the arguments for loading the model, like TRL's scripts."""
    defaults = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {**defaults, **(args.model_init_kwargs or {})}


def load(script: Any, mixture: Any) -> Any:
    """Loads the data: a mixture, a dataset from the Hub or a folder, or a local file.

    Raises:
        ValueError: No data is given, or the file has an unknown ending.
    """
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError(
            "No data is given: set --dataset_name (on the Hub, a folder or a file), or `datasets` in YAML."
        )
    path = Path(script.dataset_name)
    if path.suffix in BUILDERS and not path.exists():
        raise ValueError(f"--dataset_name {path} can't be read: there is no such file.")
    if not path.is_file():
        return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    if path.suffix not in BUILDERS:
        raise ValueError(
            f"--dataset_name {path} ends in `{path.suffix}`; give a file that ends in {', '.join(BUILDERS)}."
        )
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=script.dataset_streaming)


def _split(data: Any, name: str, flag: str) -> Any:
    if name not in data:
        raise ValueError(f"The data has no split `{name}`; its splits are {', '.join(data)}: choose one with --{flag}.")
    return data[name]
