"""Parse flags, and a YAML or JSON file that they override, into dataclasses."""

from __future__ import annotations

import json
from argparse import SUPPRESS, Action
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_jd.finetune.sentences import first_sentence

_SUFFIXES = (".yaml", ".yml", ".json")


# Names from other tools that people may type.
_COMMON_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "data": "train_file",
    "dataset": "dataset_name",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
    "cpu": "use_cpu",
    "weighting": "jd_weighting",
    "objectives": "jd_objectives",
    "preferences": "jd_preferences",
    # Names of `hf-jd finetune`, for `hf-jd estimate`.
    "lora_r": "lora",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "max_length": "tokens",
    "jd_backward": "two_pass",
    "bf16": "dtype",
}
_TEXTS = {
    "output_dir": "The folder for the result, checkpoints and logs.",
    "resume_from_checkpoint": "Continue from the run's newest complete checkpoint, `last`, or from a folder.",
}
"""Descriptions of transformers' flags that say what they mean here."""
_WIDTH, _INDENT = 110, 34


class Parser(HfArgumentParser):
    """Transformers' parser with errors of one sentence and a help of two screens.

    Args:
        prepare: Changes the flags, by name, before they become dataclasses.
        sections: The flags that `--help` lists, by heading; `--help-all` lists the others, too. None: all flags, under
            one heading.
        texts: Descriptions that replace those of other libraries' flags, by name.
    """

    def __init__(
        self,
        *args: Any,
        prepare: Callable[[dict[str, Any]], None] = lambda flags: None,
        sections: Mapping[str, Sequence[str]] | None = None,
        texts: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            action.help = {**_TEXTS, **(texts or {})}.get(action.dest, action.help)
        self._prepare = prepare
        self._sections = sections or {"Flags": self._names()}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the flags, and prepare them, as argparse does; raise a ValueError for an unknown one."""
        if args and "--help-all" in args:
            print(self.format_help(everything=True))
            self.exit()
        flags, unknown = super().parse_known_args(args, namespace)
        if unknown:  # Check this first: a missing flag may be misspelt.
            raise self.unknown(unknown[0])
        self._prepare(vars(flags))
        return flags, unknown

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError instead of printing hundreds of flags and exiting."""
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    def parse(self, flags: Sequence[str], settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """Parse into the dataclasses.

        Args:
            flags: `--flag value ...`.
            settings: Values by the flags' names, which the flags override.

        Raises:
            ValueError: A flag is unknown or has a value that isn't allowed.
        """
        for name, value in settings.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None or action.nargs == 0:  # `--no_x` is only for the command line
                raise self.unknown(name, " in the file")
            self.set_defaults(**{action.dest: value})
        try:
            return self.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
        except (ValueError, ImportError) as error:  # ImportError: bf16 and the like are not available
            raise ValueError(str(error)) from error

    def format_help(self, everything: bool = False) -> str:
        """Format the help: one line per flag, or whole descriptions."""
        shown = [name for names in self._sections.values() for name in names]
        rest = [name for name in self._names() if name not in shown and name != "help"]
        sections = {**self._sections, **({"All others": rest} if everything and rest else {})}
        actions = {action.dest: action for action in reversed(self._actions)}
        lines = [self.format_usage().strip(), "", *wrap(self.description or "", _WIDTH)]
        for title, names in sections.items():
            lines += ["", f"{title}:"]
            lines += [line for name in names for line in _described(actions[name], everything)]
        more = f", and those of {len(rest)} more flags" if rest else ""
        return "\n".join([*lines, *([] if everything else ["", f"--help-all shows whole descriptions{more}."])]) + "\n"

    def _names(self) -> list[str]:
        return list(dict.fromkeys(action.dest for action in self._actions))

    def unknown(self, flag: str, where: str = "") -> ValueError:
        """Return the error for an unknown flag, with the nearest one."""
        name, names = flag.partition("=")[0].lstrip("-").replace("-", "_"), self._names()
        common = _COMMON_NAMES.get(name)
        near = [common] if common in names else get_close_matches(name, names, n=1)
        advice = f"; the nearest is `--{near[0]}`" if near else "; --help lists all of them"
        return ValueError(f"Unknown flag `{flag}`{where}{advice}.")


def names_of(dataclass: Any) -> list[str]:
    """Return the names of a dataclass's fields, which are those of its flags."""
    return [field.name for field in fields(dataclass)]


def _described(action: Action, everything: bool) -> list[str]:
    text = " ".join((action.help or "").replace("%%", "%").replace("(default: %(default)s)", "").split())
    default = action.default if action.default not in (None, SUPPRESS, False, [], "") else None
    default = " ".join(map(str, default)) if isinstance(default, list) else default
    end = "" if default is None else f" [{default}]"
    head = f"  --{action.dest} "
    width = _WIDTH - _INDENT
    if everything:
        return [head, *wrap(text + end, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    first = text.partition(". ")[0].rstrip(".")
    return [f"{head:<{_INDENT}}{shorten(first, width - len(end), placeholder='...')}{end}"]


def split_settings(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split `[FILE] --flag value ...` into flags and the file, if there is one."""
    flags = list(argv)
    return (flags[1:], Path(flags[0])) if flags and flags[0].endswith(_SUFFIXES) else (flags, None)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings by name.

    Raises:
        ValueError: The file can't be read, or doesn't hold settings.
    """
    try:
        text = path.read_text("utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"The file {path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The file {path} is malformed: {first_sentence(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The file {path} has to hold settings as `name: value`.")
    return settings
