"""The flags of a fine-tuning run, beside those of `JDTrainingArguments`; each is described once, in its `help`."""

from __future__ import annotations

from dataclasses import dataclass, field

EXAMPLES = ("tasks", "lily")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Which model, and which of its parameters are trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model of the Hub, or a folder. Without it: the embedded example."}
    )
    dtype: str = field(
        default="float32", metadata={"help": f"What the weights are loaded as: {', '.join(f'`{d}`' for d in DTYPES)}."}
    )
    full: bool = field(default=False, metadata={"help": "Train all parameters, instead of a LoRA adapter."})
    lora_r: int = field(default=8, metadata={"help": "The rank of the LoRA matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get LoRA matrices; `all-linear`: all linear layers but the head."},
    )

    def __post_init__(self):
        """Validate the flags.

        Raises:
            ValueError: A flag has a value that isn't allowed.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is `{self.dtype}`; choose one of {', '.join(DTYPES)}.")
        if not self.full and self.lora_r < 1:
            raise ValueError(f"--lora_r is {self.lora_r}, so there is nothing to train: give at least 1, or --full.")


@dataclass
class DataArguments:
    """Which examples, and what of them is learnt."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A file of examples: .jsonl, .json, .csv or .parquet, with the columns `prompt` and `completion` "
            "(only the completion is learnt), or `text`. Without it and --dataset_name: an embedded example."
        },
    )
    example: str = field(
        default="tasks",
        metadata={
            "help": "The embedded example to train on, where no data is named: `tasks`, four tasks of which one is "
            "rare, or `lily`, stories about Lily and about others."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Examples to evaluate on, of the same form."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The data set's split to evaluate on. Without it: `validation`, if it has one."}
    )
    task_column: str | None = field(
        default=None,
        metadata={
            "help": "The column that names each example's task: evaluation and metrics are split by it. The same as "
            "--jd_group_column, and each stands for the other; the embedded examples have `task`."
        },
    )
    max_length: int = field(
        default=512,
        metadata={
            "help": "The most tokens of an example. A longer one loses the beginning of its prompt, then the end of "
            "its completion."
        },
    )
    add_eos: bool = field(
        default=True, metadata={"help": "End each example with the end-of-sequence token, so that the end is learnt."}
    )

    def __post_init__(self):
        """Validate the flags.

        Raises:
            ValueError: A flag has a value that isn't allowed, or two flags contradict each other.
        """
        if self.example not in EXAMPLES:
            raise ValueError(f"--example is `{self.example}`; choose one of {', '.join(EXAMPLES)}.")
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name are both given: choose one.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file is given without --train_file, so it is unclear what to train on.")
        if self.max_length < 2:
            raise ValueError(f"--max_length is {self.max_length}; to predict one token from another, give at least 2.")


@dataclass
class RunArguments:
    """How the run is done."""

    stock: bool = field(
        default=False,
        metadata={"help": "Train with transformers' own Trainer, as a reference; the --jd_* flags are then not used."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove the run that --output_dir holds, instead of refusing to start."}
    )
    time_steps: bool = field(
        default=False,
        metadata={"help": "Measure how long a step takes, forward to optimizer; waits for the GPU after each."},
    )
