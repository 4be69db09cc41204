"""`hf-jd`: find the command, and run it.

Nothing heavy is imported before the command is known, so `hf-jd --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from types import TracebackType

COMMANDS = {
    "finetune": ("hf_jd.finetune.run", "Fine-tune a causal language model with Jacobian descent."),
    "compare": ("hf_jd.finetune.compare", "Run the same fine-tuning with several methods, and compare them by task."),
    "sft": ("hf_jd.commands.sft", "Run TRL's SFT script with Jacobian descent."),
    "dpo": ("hf_jd.commands.dpo", "Run TRL's DPO script with Jacobian descent."),
    "reward": ("hf_jd.commands.reward", "Run TRL's reward model script with Jacobian descent."),
    "kto": ("hf_jd.commands.kto", "Run TRL's KTO script with Jacobian descent."),
    "grpo": ("hf_jd.commands.grpo", "Run TRL's GRPO script with Jacobian descent, also by reward."),
    "estimate": ("hf_jd.estimate.command", "Estimate what a step costs for a model and hardware, before running it."),
    "report": ("hf_jd.report.write_report", "Turn a run's logs into pictures and one page, even while it runs."),
    "doctor": ("hf_jd.finetune.doctor", "Check that every parameter's rows are right, and what they cost."),
}

NOISE = (
    "Setting accelerator to CPU",
    "mtime may not be reliable on this filesystem",
    "Warning: The following arguments do not match",  # a resumed run's shares of steps, and the numbers they stand for
)
"""Beginnings of other libraries' logs that don't concern users."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 2 for errors that the user can fix, explained in one sentence on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"hf-jd {version('hf-jd')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=len(COMMANDS), cutoff=0.0)
        print(f"hf-jd: error: Unknown command `{name}`; the commands are {', '.join(near)}.", file=sys.stderr)
        return 2
    _silence_libraries()
    try:
        return import_module(COMMANDS[name][0]).main(rest)
    except ValueError as error:
        if not _is_for_users(error.__traceback__):
            raise
        print(f"hf-jd {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nhf-jd {name}: {str(error) or 'Stopped.'}", file=sys.stderr)
        return 130


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return f"usage: hf-jd COMMAND ...\n\nCommands (each has its own --help):\n{commands}"


def _silence_libraries() -> None:
    """Hide what users can't fix: libraries' warnings about deprecated uses of each other, and logs in `NOISE`.

    Python's -W and PYTHONWARNINGS take precedence, so they still show the warnings.
    """
    libraries = r"(transformers|trl|peft|accelerate|datasets)\."
    warnings.filterwarnings("ignore", category=FutureWarning, module=libraries, append=True)
    for name in ("DeepSpeed", "transformers.trainer", "transformers.trainer_utils"):
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


def _is_for_users(traceback: TracebackType | None) -> bool:
    """Return whether this package or TRL raised the error: another library's may be a bug, which needs its traceback.

    TRL's trainers check settings and data themselves.
    """
    module = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.partition(".")[0] in ("hf_jd", "trl", "__main__")


if __name__ == "__main__":
    sys.exit(main())
