"""Every --jd_* flag, documented and validated once."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field
from difflib import get_close_matches

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_jd.contradictions import check_flags, check_weighting
from hf_jd.objectives import OBJECTIVES, Kind
from hf_jd.packing import PACKED
from hf_jd.weighting import WEIGHTINGS, Weighting, build_weighting

_CHOICES = {
    "jd_objectives": tuple(OBJECTIVES),
    "jd_group_reduction": ("share", "mean"),
    "jd_backward": ("one_pass", "two_pass"),
    "jd_scope": ("global", "micro_batch"),
    "jd_when_full": ("error", "micro_batch"),
    "jd_extra_losses": ("mean", "objective", "error"),
    "jd_sampler": ("trainer", "stratified"),
    "jd_packed": PACKED,
    "jd_normalize": ("none", "rows", "loss"),
    "jd_blocks": ("none", "layer", "module", "parameter"),
}
_LEAST = {"jd_max_non_finite": 1, "jd_every": 1, "jd_warmup_steps": 0, "jd_monitor_every": 1}
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@dataclass
class JDArguments:
    """The flags of Jacobian descent, to be placed left of any dataclass of training arguments."""

    jd_weighting: str = field(
        default="upgrad",
        metadata={"help": f"How the objectives are weighted from their Gramian: {_listed(tuple(WEIGHTINGS))}."},
    )
    jd_weighting_args: list[str] | None = field(
        default=None, metadata={"nargs": "*", "help": "Arguments of the weighting, as `name=value`."}
    )
    jd_preferences: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "How much each objective is wanted, as `name=value` by the names of groups; 1 for those not named. "
            "For weightings that take a `pref_vector`, which becomes their shares among the objectives that are there.",
        },
    )
    jd_normalize: str = field(
        default="none",
        metadata={
            "help": "What each objective's row is divided by before it is weighed: nothing (`none`), its norm "
            "(`rows`), or its loss (`loss`: that is the row of the loss's logarithm). The update is that of the "
            "divided rows."
        },
    )
    jd_blocks: str = field(
        default="none",
        metadata={
            "help": "Weigh the objectives in each block of parameters by itself, from the block's own Gramian: `layer` "
            "(the outermost numbered module, such as `model.layers.3`; modules outside of any are blocks of their "
            "own), `module` (the one that owns the parameter), `parameter`, or `none`: all parameters at once. No "
            "objective is gone against in any block, for weightings that promise it."
        },
    )
    jd_every: int = field(
        default=1,
        metadata={
            "help": "Weigh at every Nth update; those between take the last weights, by name, and cost a plain step. "
            "Not for objectives `instance`, which are others at every update."
        },
    )
    jd_warmup_steps: int = field(
        default=0, metadata={"help": "Take the mean for this many updates first: Trainer's own steps."}
    )
    jd_monitor_every: int | None = field(
        default=None,
        metadata={
            "help": "With `--jd_weighting mean`, watch only: measure the objectives' conflicts at every Nth update. "
            "The others cost a plain step."
        },
    )
    jd_objectives: str = field(
        default="instance",
        metadata={
            "help": "What an objective is: `instance` (the loss of one example), `group` (the loss of all the examples "
            "that share a value of `--jd_group_column`), `loss` (one of the losses that `compute_losses` or the model "
            "returns by name), `instance_loss` (each of these of each example), `batch` (the loss of one batch of one "
            "process, as it is) or `reward` (TRL's policy loss with the advantages of one reward function)."
        },
    )
    jd_group_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of the training set, of strings or integers, that names each example's group. With "
            "`--jd_objectives instance` it only splits what is logged."
        },
    )
    jd_groups: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "The names of all groups. Read from the training set, except for a stream, whose names can't be "
            "known beforehand.",
        },
    )
    jd_group_reduction: str = field(
        default="share",
        metadata={
            "help": "`share` keeps each group's share of the tokens, so that the objectives' mean is the loss of "
            "Trainer; `mean` gives each group its own mean, so that all groups count the same."
        },
    )
    jd_packed: str = field(
        default="auto",
        metadata={
            "help": "Whether a row of tokens holds several documents, each of them an instance: `auto`, where the "
            "batch says so as packing collators do (`cu_seq_lens_q`, `seq_idx`, or `position_ids` that begin again, "
            "without an `attention_mask` or in one row); `always`, wherever `position_ids` begin again or don't grow; "
            "`never`: each row is one instance."
        },
    )
    jd_sampler: str = field(
        default="trainer",
        metadata={
            "help": "The order of the examples: `trainer` is that of `--train_sampling_strategy`; `stratified` gives "
            "each update its share of every group of `--jd_group_column`, within one example, over micro-batches and "
            "processes."
        },
    )
    jd_ascend: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "Groups whose loss is to be raised instead of lowered, as for unlearning: their rows are negated, "
            "and what is logged of their losses is not.",
        },
    )
    jd_backward: str = field(
        default="one_pass",
        metadata={
            "help": "`one_pass` forms the update from the recorded rows; `two_pass` weighs the losses and calls "
            "accelerator.backward on their sum: slower, the same update."
        },
    )
    jd_keep_rows: str = field(
        default="auto",
        metadata={
            "help": "`true` keeps every row until the update; `false` keeps the layers' inputs and output gradients "
            "instead, where those are smaller; `auto` or a size such as `4GB`: rows, if they fit in half of the free "
            "memory or in that size. Several processes always keep rows."
        },
    )
    jd_when_full: str = field(
        default="error",
        metadata={
            "help": "What happens where neither the rows of all micro-batches of an update nor what they are made of "
            "fit in what `--jd_keep_rows` allows: `error` stops; `micro_batch` weighs each micro-batch by itself from "
            "then on, as `--jd_scope micro_batch` does."
        },
    )
    jd_check: bool = field(
        default=True,
        metadata={
            "help": "Prove on the first step, with one more backward pass, that the Jacobian and losses are right."
        },
    )
    jd_check_processes: int = field(
        default=100,
        metadata={
            "help": "Compare the weights of all processes by hash, at the start and every so many updates, and stop "
            "where they differ; 0: never."
        },
    )
    jd_extra_losses: str = field(
        default="mean",
        metadata={
            "help": "What becomes of the part of the model's own loss that no token or instance owns, such as a "
            "router's balancing loss: `mean` adds it to the objectives' mean, as Trainer does, and no weighting sees "
            "it; `objective` makes it one objective more; `error` stops."
        },
    )
    jd_max_non_finite: int = field(
        default=10,
        metadata={
            "help": "Stop when losses or gradients weren't finite in this many updates in a row. What isn't finite is "
            "left out, so the parameters stay finite."
        },
    )
    jd_scope: str = field(
        default="global",
        metadata={
            "help": "`global` weighs all objectives of an update together, over accumulation steps and processes, as "
            "one big batch would; `micro_batch` weighs each forward pass by itself, which is cheaper."
        },
    )

    def __post_init__(self):
        """Validate the flags.

        Raises:
            ValueError: See `validate`.
        """
        self.validate()
        super().__post_init__()  # ty: ignore[missing-attribute]  # that of TrainingArguments

    def validate(self) -> None:
        """Validate the --jd_* flags as they are now: each trial of a hyperparameter search sets other ones.

        Raises:
            ValueError: A flag has a value that isn't allowed, or two flags contradict each other.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = get_close_matches(str(value), choices, n=len(choices), cutoff=0.0)
                raise ValueError(f"--{name} is `{value}`; choose one of {_listed(tuple(near))}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; give {least} or more.")
        check_flags(self)
        check_weighting(self, self.build_weighting())
        self.keep_rows()

    @property
    def kind(self) -> Kind:
        """What the objectives are."""
        return OBJECTIVES[self.jd_objectives]

    @property
    def own_mean(self) -> bool:
        """Whether each objective is its own mean, instead of its share of the whole."""
        return self.jd_objectives == "group" and self.jd_group_reduction == "mean"

    def build_weighting(self) -> Weighting:
        """Builds the weighting that the flags name.

        Raises:
            ValueError: The name or an argument is unknown, or an argument isn't of the form `name=value`.
        """
        arguments = {}
        for name, text in _pairs("jd_weighting_args", self.jd_weighting_args):
            try:
                arguments[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                arguments[name] = text
        return build_weighting(self.jd_weighting, **arguments)

    def preferences(self) -> dict[str, float]:
        """Read `jd_preferences`, by name.

        Raises:
            ValueError: One isn't of the form `name=value`, comes twice, or has no finite value of 0 or more.
        """
        found: dict[str, float] = {}
        for name, text in _pairs("jd_preferences", self.jd_preferences):
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 <= value < math.inf:
                raise ValueError(f"--jd_preferences has `{text}` for `{name}`; give a number of 0 or more.")
            if name in found:
                raise ValueError(f"--jd_preferences has two values for `{name}`.")
            found[name] = value
        return found

    def keep_rows(self) -> str | bool | int:
        """Read `jd_keep_rows`: "auto", True, False, or a number of bytes.

        Raises:
            ValueError: It is none of these.
        """
        text = self.jd_keep_rows.strip().lower()
        if text in ("auto", "true", "false"):
            return {"auto": "auto", "true": True, "false": False}[text]
        unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
        try:
            return int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
        except ValueError:
            raise ValueError(
                f"--jd_keep_rows is `{self.jd_keep_rows}`; give `auto`, `true`, `false`, or a size such as `4GB`."
            ) from None


def _pairs(flag: str, pairs: list[str] | None) -> list[tuple[str, str]]:
    """The names and values of a flag that holds `name=value ...`."""
    found = [pair.rpartition("=") for pair in pairs or []]
    for name, equals, text in found:
        if not (name and equals and text):
            raise ValueError(f"--{flag} holds `{name}{equals}{text}`; each argument is given as `name=value`.")
    return [(name, text) for name, _, text in found]


@dataclass
class JDTrainingArguments(JDArguments, TrainingArguments):
    """`TrainingArguments` with the flags of Jacobian descent."""


@dataclass
class JDSeq2SeqTrainingArguments(JDArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the flags of Jacobian descent."""
