"""The flags of a fine-tuning run, besides those of `JDTrainingArguments`; each is described once, in its `help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from hf_jd.finetune.formats import HELP

MAIN_FLAGS = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "bf16",
    "per_device_eval_batch_size", "eval_strategy", "eval_steps", "logging_steps", "report_to", "save_steps",
    "resume_from_checkpoint", "do_train", "push_to_hub", "seed", "use_cpu",
)  # fmt: skip
"""The flags of TrainingArguments that `--help` lists."""

flag: Any = HfArg  # its declared type is a Field, which no flag is


@dataclass
class ModelArguments:
    """The model, and the parameters to train; with the names of TRL's `ModelConfig`."""

    model_name_or_path: str | None = flag(
        default=None, help="A model on the Hub, or a folder. Without it: the embedded example."
    )
    model_revision: str = flag(
        default="main", aliases="--revision", help="The model's branch, tag or commit on the Hub."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = flag(
        default="float32", help="The dtype to load weights in: `float32`, `bfloat16`, `float16`, `auto`."
    )
    attn_implementation: str | None = flag(
        default=None, help="The attention to use, such as `sdpa` or `flash_attention_2`."
    )
    trust_remote_code: bool = flag(default=False, help="Run code that comes with a model on the Hub.")
    load_in_4bit: bool = flag(
        default=False, help="Load the weights in 4 bits with bitsandbytes (QLoRA); only with LoRA."
    )
    full: bool = flag(default=False, help="Train all parameters, instead of a LoRA adapter.")
    lora_r: int = flag(default=8, help="The rank of the LoRA matrices.")
    lora_alpha: int = flag(default=16, help="LoRA's update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(default=0.0, help="Dropout before the LoRA matrices.")
    lora_target_modules: list[str] = flag(
        default_factory=lambda: ["all-linear"],
        help="The modules that get LoRA matrices; `all-linear`: all linear layers except the head.",
    )
    lora_modules_to_save: list[str] | None = flag(
        default=None, aliases="--modules_to_save", help="Modules to train in full, in addition to LoRA."
    )
    use_dora: bool = flag(default=False, help="Use DoRA: LoRA for the direction, plus a learned length per weight.")

    def __post_init__(self):
        """Raise a ValueError for a value that isn't allowed, and for flags that contradict each other."""
        if not self.full and self.lora_r < 1:
            raise ValueError(f"--lora_r is {self.lora_r}, so there is nothing to train: give at least 1, or --full.")
        if self.full and (self.load_in_4bit or self.use_dora or self.lora_modules_to_save):
            raise ValueError("--load_in_4bit, --use_dora and --lora_modules_to_save need LoRA: leave out --full.")


@dataclass
class DataArguments:
    """The examples, and the parts of them to learn."""

    train_file: list[str] | None = flag(
        default=None,
        help="Files, globs or folders of examples: .jsonl, .json, .csv or .parquet, with or without .gz. "
        f"Columns: {HELP}; only completions, outputs and the assistant's messages are learned, or all of a text. "
        "Without it and --dataset_name: an embedded example.",
    )
    validation_file: list[str] | None = flag(default=None, help="Examples to evaluate on, in the same form.")
    dataset_name: str | None = flag(default=None, help="A dataset on the Hub, or a folder.")
    dataset_config: str | None = flag(default=None, help="The dataset's configuration.")
    train_split: str = flag(default="train", help="The dataset's split to train on.")
    validation_split: str | None = flag(
        default=None, help="The dataset's split to evaluate on. Without it: `validation`, if it has one."
    )
    example: Literal["tasks", "lily"] = flag(
        default="tasks",
        help="The embedded example to train on without data: `tasks`, four tasks, one of them rare, or `lily`, "
        "stories about Lily and about others.",
    )
    task_column: str | None = flag(
        default=None,
        help="The column that names each example's task: it splits evaluation and metrics. Another name for "
        "--jd_group_column; the embedded examples have `task`.",
    )
    max_length: int = flag(
        default=512,
        help="The most tokens per example. A longer one loses the beginning of its prompt, then the end of its "
        "learned text; their number is logged.",
    )
    add_eos: bool = flag(
        default=True,
        help="Learn to end texts with the end-of-sequence token; chat templates end answers themselves.",
    )

    def __post_init__(self):
        """Raise a ValueError for a value that isn't allowed, and for flags that contradict each other."""
        for name in ("train_file", "validation_file"):  # A settings file may have a single name.
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else value)
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name are both given: choose one.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file is given without --train_file: give the file to train on, too.")
        if self.max_length < 2:
            raise ValueError(f"--max_length is {self.max_length}; to predict one token from another, give at least 2.")


@dataclass
class RunArguments:
    """How to run."""

    stock: bool = flag(
        default=False, help="Train with transformers' own Trainer, as a reference, ignoring the --jd_* flags."
    )
    overwrite_output_dir: bool = flag(
        default=False, help="Remove the run in --output_dir, instead of refusing to start."
    )
    time_steps: bool = flag(
        default=False, help="Time each step, from forward to optimizer; waits for the GPU after each step."
    )
