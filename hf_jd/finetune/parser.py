"""Parse flags, and a YAML or JSON file that they override, into dataclasses."""

from __future__ import annotations

import json
from argparse import SUPPRESS, Action
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill, indent, shorten, wrap
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_jd.finetune.sentences import explained

# Names from other tools that people may type, and names of `hf-jd finetune` that `hf-jd estimate` has others for.
_SYNONYMS = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "grad_accum": "gradient_accumulation_steps",
    "rank": "lora_r",
    "data": "train_file",
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
            if isinstance(value, str) and action.choices and value not in action.choices:  # argparse trusts defaults
                raise ValueError(f"--{name} is `{value}`; choose one of {', '.join(map(str, action.choices))}.")
            alone = action.nargs in ("+", "*") and isinstance(value, str | int | float)  # a list of one
            self.set_defaults(**{action.dest: [value] if alone else value})
        try:
            return self.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
        except (ValueError, ImportError) as error:  # ImportError: bf16 and the like are not available
            raise ValueError(str(error)) from error

    def format_help(self, everything: bool = False) -> str:
        """Format the help: one line per flag, or whole descriptions."""
        actions = {action.dest: action for action in reversed(self._actions)}
        shown = {name for names in self._sections.values() for name in names}
        rest = [name for name in self._names() if name not in shown]
        sections = {**self._sections, **({"All others": rest} if everything and rest else {})}
        lines = [self.format_usage().strip(), "", *wrap(self.description or "", _WIDTH)]
        for title, names in sections.items():
            lines += ["", f"{title}:", *(_described(actions[name], everything) for name in names)]
        if not everything:
            more = f", and those of {len(rest)} more flags" if rest else ""
            lines += ["", f"--help-all shows whole descriptions{more}."]
        return "\n".join(lines) + "\n"

    def _names(self) -> list[str]:
        return list(dict.fromkeys(action.dest for action in self._actions if action.dest != "help"))

    def unknown(self, flag: str, where: str = "") -> ValueError:
        """Return the error for an unknown flag, with the nearest one: part of its name, or spelt alike."""
        name = flag.partition("=")[0].lstrip("-").replace("-", "_")
        names = list(dict.fromkeys([*(name for part in self._sections.values() for name in part), *self._names()]))
        near = [other for other in names if other == _SYNONYMS.get(name)]
        near += [other for other in names if len(name) > 2 and (name in other or other in name)]
        near += get_close_matches(name, names, n=1)
        advice = f"the nearest is `--{near[0]}`" if near else "--help lists all of them"
        return ValueError(f"Unknown flag `{flag}`{where}; {advice}.")


def names_of(dataclass: Any) -> list[str]:
    """Return the names of a dataclass's fields, which are those of its flags."""
    return [field.name for field in fields(dataclass)]


def _described(action: Action, everything: bool) -> str:
    text = " ".join((action.help or "").replace("%%", "%").replace("(default: %(default)s)", "").split())
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    end = "" if default in (None, SUPPRESS, False, "") else f" [{default}]"
    if everything:
        return f"  --{action.dest} \n" + indent(fill(text + end, _WIDTH - 8), " " * 8)
    first = shorten(text.partition(". ")[0].rstrip("."), _WIDTH - _INDENT - len(end), placeholder="...")
    return f"  --{action.dest} ".ljust(_INDENT) + first + end


def split_settings(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split `[FILE] --flag value ...` into flags and the file, if there is one."""
    flags = list(argv)
    return (flags[1:], Path(flags[0])) if flags and flags[0].endswith((".yaml", ".yml", ".json")) else (flags, None)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings by name.

    Raises:
        ValueError: The file can't be read, or doesn't hold settings.
    """
    unreadable = explained(f"The file {path} can't be read", OSError)
    with unreadable, explained(f"The file {path} is malformed", yaml.YAMLError, ValueError):
        text = path.read_text("utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"The file {path} has to hold settings as `name: value`.")
    return settings
