"""Flags, or one YAML or JSON file and flags that override it, to dataclasses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_jd.finetune.sentences import first_sentence

_SUFFIXES = (".yaml", ".yml", ".json")


class Parser(HfArgumentParser):
    """Transformers' parser, which says in one sentence what is wrong.

    Args:
        prepare: Changes the flags, by name, before dataclasses are made of them: where one stands for another.
    """

    def __init__(self, *args: Any, prepare: Callable[[dict[str, Any]], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._prepare = prepare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the flags, and prepares them; see argparse."""
        found, unknown = super().parse_known_args(args, namespace)
        self._prepare(vars(found))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raises a ValueError instead of printing hundreds of flags and leaving.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    def parse(self, flags: Sequence[str], settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """Parses into the dataclasses.

        Args:
            flags: `--flag value ...`.
            settings: Values by the flags' names, which the flags override.

        Raises:
            ValueError: A flag is unknown or has a value that isn't allowed.
        """
        for name in settings:
            if name not in self._names():
                raise ValueError(f"Unknown flag `{name}` in the file{self._nearest(name)}.")
        self.set_defaults(**settings)
        try:
            parsed: tuple[Any, ...] = self.parse_args_into_dataclasses(
                list(flags), return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, ImportError) as error:  # ImportError: bf16 and the like, where they can't be had.
            raise ValueError(str(error)) from error
        if unknown := parsed[-1]:
            raise ValueError(f"Unknown flag `{unknown[0]}`{self._nearest(unknown[0].partition('=')[0])}.")
        return parsed[:-1]

    def _names(self) -> list[str]:
        return [action.dest for action in self._actions]

    def _nearest(self, name: str) -> str:
        near = get_close_matches(name.lstrip("-").replace("-", "_"), self._names(), n=1)
        return f"; the nearest is `--{near[0]}`" if near else "; --help lists all of them"


def split_settings(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Splits `[FILE] --flag value ...` into flags and the file, if there is one."""
    flags = list(argv)
    return (flags[1:], Path(flags[0])) if flags and flags[0].endswith(_SUFFIXES) else (flags, None)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a YAML or JSON file of settings by name.

    Raises:
        ValueError: It can't be read, or isn't such a file.
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
