"""All --jd_* flags, documented and validated in one place."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field
from difflib import get_close_matches

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_jd.contradictions import check_flags, check_weighting, listed
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


@dataclass
class JDArguments:
    """The flags of Jacobian descent; put it to the left of any dataclass of training arguments."""

    jd_weighting: str = field(
        default="upgrad",
        metadata={"help": f"The method that weighs objectives from their Gramian: {listed(WEIGHTINGS)}."},
    )
    jd_weighting_args: list[str] | None = field(
        default=None, metadata={"nargs": "*", "help": "Arguments of the weighting, as `name=value`."}
    )
    jd_preferences: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "How much each objective matters, as `name=value` with the groups' names; 1 for groups not listed. "
            "For weightings with a `pref_vector`, which gets the preferences of the update's objectives as shares.",
        },
    )
    jd_normalize: str = field(
        default="none",
        metadata={
            "help": "What to divide each objective's row by before weighing: nothing (`none`), its norm (`rows`), or "
            "its loss (`loss`, which gives the row of the loss's logarithm). The update combines the divided rows."
        },
    )
    jd_blocks: str = field(
        default="none",
        metadata={
            "help": "Weigh the objectives separately in each block of parameters, from the block's Gramian: `layer` "
            "(the outermost numbered module, such as `model.layers.3`; each module outside of these is a "
            "block), `module` (the one that owns the parameter), `parameter`, or `none`: all parameters at once. "
            "A non-conflicting weighting then conflicts with no objective in any block."
        },
    )
    jd_every: int = field(
        default=1,
        metadata={
            "help": "Weigh at every Nth update; updates in between reuse the last weights, by name, and cost a plain "
            "step. Not with objectives `instance`: they change at every update."
        },
    )
    jd_warmup_steps: int = field(
        default=0, metadata={"help": "Use the mean for this many updates first: Trainer's own steps."}
    )
    jd_monitor_every: int | None = field(
        default=None,
        metadata={
            "help": "With `--jd_weighting mean`, only watch: measure the objectives' conflicts at every Nth update. "
            "The other updates cost a plain step."
        },
    )
    jd_objectives: str = field(
        default="instance",
        metadata={
            "help": "What an objective is: `instance` (the loss of one example), `group` (the loss of all examples "
            "with the same value in `--jd_group_column`), `loss` (one of the losses that `compute_losses` or the model "
            "returns by name), `instance_loss` (each of these losses for each example), `batch` (the loss of one batch "
            "on one process, as it is) or `reward` (TRL's policy loss with the advantages of one reward function)."
        },
    )
    jd_group_column: str | None = field(
        default=None,
        metadata={
            "help": "The training set's column of strings or integers that names each example's group. With "
            "`--jd_objectives instance`, it only splits the logs."
        },
    )
    jd_groups: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "The names of all groups. By default, they are read from the training set; a stream's names can't "
            "be known in advance.",
        },
    )
    jd_group_reduction: str = field(
        default="share",
        metadata={
            "help": "`share` weights each group by its share of the tokens, so that the objectives' mean is Trainer's "
            "loss; `mean` gives each group its own mean, so that all groups count equally."
        },
    )
    jd_packed: str = field(
        default="auto",
        metadata={
            "help": "Whether a row of tokens holds several documents, each of them an instance: `auto`, if the batch "
            "says so as packing collators do (`cu_seq_lens_q`, `seq_idx`, or `position_ids` that restart, without an "
            "`attention_mask` or in a single row); `always`, wherever `position_ids` restart or don't grow; `never`: "
            "each row is one instance."
        },
    )
    jd_sampler: str = field(
        default="trainer",
        metadata={
            "help": "The order of the examples: `trainer` follows `--train_sampling_strategy`; `stratified` gives each "
            "update its share of every group of `--jd_group_column`, to within one example, across micro-batches and "
            "processes."
        },
    )
    jd_ascend: list[str] | None = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "Groups whose loss to raise instead of lower, as for unlearning: their rows are negated, but not "
            "their logged losses.",
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
            "help": "`true` stores every row until the update; `false` stores the layers' inputs and output gradients "
            "instead, if those are smaller; `auto` or a size such as `4GB`: rows, if they fit in half of the free "
            "memory or in that size. Several processes always store rows."
        },
    )
    jd_when_full: str = field(
        default="error",
        metadata={
            "help": "What to do if neither the rows of all micro-batches of an update nor their factors fit in what "
            "`--jd_keep_rows` allows: `error` stops; `micro_batch` weighs each micro-batch separately from then on, "
            "like `--jd_scope micro_batch`."
        },
    )
    jd_check: bool = field(
        default=True,
        metadata={
            "help": "Verify the Jacobian and the losses on the first step, with two or three extra backward passes."
        },
    )
    jd_check_processes: int = field(
        default=100,
        metadata={
            "help": "Compare the model's weights on all processes by hash, at the start and every so many updates, and "
            "stop if they differ; 0: never."
        },
    )
    jd_extra_losses: str = field(
        default="mean",
        metadata={
            "help": "What to do with the part of the model's own loss that belongs to no token or instance, such as a "
            "router's balancing loss: `mean` adds it to the objectives' mean, as Trainer does, and no weighting sees "
            "it; `objective` makes it one more objective; `error` stops."
        },
    )
    jd_max_non_finite: int = field(
        default=10,
        metadata={
            "help": "Stop after this many updates in a row with losses or gradients that aren't finite. These are left "
            "out, so the parameters stay finite."
        },
    )
    jd_scope: str = field(
        default="global",
        metadata={
            "help": "`global` weighs all objectives of an update together, across accumulation steps and processes, "
            "like one big batch; `micro_batch` weighs each forward pass separately, which is cheaper."
        },
    )

    def __post_init__(self):
        """Validate the flags.

        Raises:
            ValueError: See `validate`.
        """
        self.validate()
        super().__post_init__()  # ty: ignore[missing-attribute]  # TrainingArguments'

    def validate(self) -> None:
        """Validate the --jd_* flags as they are now: each trial of a hyperparameter search changes some.

        Raises:
            ValueError: A flag has a value that isn't allowed, or two flags contradict each other.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = get_close_matches(str(value), choices, n=len(choices), cutoff=0.0)
                raise ValueError(f"--{name} is `{value}`; choose one of {listed(near)}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; give {least} or more.")
        check_flags(self)
        check_weighting(self, self.build_weighting())
        self.keep_rows()

    @property
    def kind(self) -> Kind:
        """The kind of objectives."""
        return OBJECTIVES[self.jd_objectives]

    @property
    def own_mean(self) -> bool:
        """Whether each objective is the mean of its own losses, not a share of the whole loss."""
        return self.jd_objectives == "group" and self.jd_group_reduction == "mean"

    def build_weighting(self) -> Weighting:
        """Build the weighting from the flags.

        Raises:
            ValueError: The name or an argument is unknown, or an argument doesn't have the form `name=value`.
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
            ValueError: One doesn't have the form `name=value`, comes twice, or isn't a finite number of 0 or more.
        """
        preferences: dict[str, float] = {}
        for name, text in _pairs("jd_preferences", self.jd_preferences):
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 <= value < math.inf:
                raise ValueError(f"--jd_preferences has `{text}` for `{name}`; give a number of 0 or more.")
            if name in preferences:
                raise ValueError(f"--jd_preferences has two values for `{name}`: give one.")
            preferences[name] = value
        return preferences

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
    """Split the `name=value` arguments of a flag."""
    parts = [pair.rpartition("=") for pair in pairs or []]
    for name, equals, text in parts:
        if not (name and equals and text):
            raise ValueError(f"--{flag} has `{name}{equals}{text}`; write each argument as `name=value`.")
    return [(name, text) for name, _, text in parts]


@dataclass
class JDTrainingArguments(JDArguments, TrainingArguments):
    """`TrainingArguments` with the flags of Jacobian descent."""


@dataclass
class JDSeq2SeqTrainingArguments(JDArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the flags of Jacobian descent."""
