"""Run a TRL trainer from the command line: read flags and YAML like TRL, load the data, train, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers.utils import is_bitsandbytes_available

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
    script_args, args, model, mixture = parser.parse_args_and_config(list(argv))
    _check(model)
    args.model_init_kwargs = _loading(model, args)
    data = load(script_args, mixture)
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
    built.train(resume_from_checkpoint=args.resume_from_checkpoint)
    built.save_model(args.output_dir)
    if args.push_to_hub:
        built.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


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
