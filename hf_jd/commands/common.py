"""What all commands of TRL's trainers do: read flags and YAML as TRL does, load the data, train, and save."""

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
"""How a file of one's own is read, by its ending."""


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
        name: Of the command.
        argv: Its arguments: flags, and `--config FILE.yaml`.
        trainer: The class of the trainer.
        config: The class of its arguments.
        script: TRL's class of the arguments of its script.
        more: More arguments of the trainer, from the script's and the model's.

    Returns:
        The exit code.
    """
    kinds: list[Any] = [script, config, ModelConfig, DatasetMixtureConfig]
    parser: Any = TrlParser(kinds, prog=f"hf-jd {name}")
    asked, args, model, mixture = parser.parse_args_and_config(list(argv))
    _check(model)
    args.model_init_kwargs = _loading(model, args)
    data = load(asked, mixture)
    made = trainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=_split(data, asked.dataset_train_split, "dataset_train_split"),
        eval_dataset=None
        if args.eval_strategy == "no"
        else _split(data, asked.dataset_test_split, "dataset_test_split"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        **({} if more is None else more(asked, model)),
    )
    made.train(resume_from_checkpoint=args.resume_from_checkpoint)
    made.save_model(args.output_dir)
    if args.push_to_hub:
        made.push_to_hub(dataset_name=asked.dataset_name)
    return 0


def _check(model: Any) -> None:
    """Raises a ValueError for a model that can't be loaded."""
    if model.model_name_or_path is None:
        raise ValueError("No model is named: give its name or folder with --model_name_or_path.")
    if (model.load_in_4bit or model.load_in_8bit) and not is_bitsandbytes_available():
        bits = 4 if model.load_in_4bit else 8
        raise ValueError(
            f"--load_in_{bits}bit needs bitsandbytes, which is not installed or can't run here: pip install "
            "bitsandbytes on a machine whose device it supports, or leave the flag out."
        )


def _loading(model: Any, args: Any) -> dict[str, Any]:
    """How the trainer loads the model, as TRL's scripts have it."""
    given = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {**given, **(args.model_init_kwargs or {})}


def load(asked: Any, mixture: Any) -> Any:
    """Loads the data: a mixture, a dataset of the Hub or a folder by its name, or a file of one's own.

    Raises:
        ValueError: None is named, or the file has another ending.
    """
    if mixture.datasets:
        return get_dataset(mixture)
    if not asked.dataset_name:
        raise ValueError(
            "No data is named: give --dataset_name (of the Hub, a folder or a file), or `datasets` in YAML."
        )
    path = Path(asked.dataset_name)
    if not path.is_file():
        return load_dataset(asked.dataset_name, name=asked.dataset_config, streaming=asked.dataset_streaming)
    if path.suffix not in BUILDERS:
        raise ValueError(
            f"--dataset_name {path} is a file of kind `{path.suffix}`; those that are read are {', '.join(BUILDERS)}."
        )
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=asked.dataset_streaming)


def _split(data: Any, name: str, flag: str) -> Any:
    if name not in data:
        raise ValueError(f"The data has no split `{name}`; its splits are {', '.join(data)}: name one with --{flag}.")
    return data[name]
