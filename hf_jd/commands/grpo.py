"""`hf-jd grpo`: TRL's script of that name, with JDGRPOTrainer and reward functions by their import paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from hf_jd.commands.common import run
from hf_jd.trainer.trl import JDGRPOConfig, JDGRPOTrainer


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    from trl.scripts.grpo import GRPOScriptArguments

    return run("grpo", argv, JDGRPOTrainer, JDGRPOConfig, GRPOScriptArguments, _rewards)


def _rewards(asked: Any, model: Any) -> dict[str, Any]:
    """The reward model, if there is one, and the reward functions."""
    found = [asked.reward_model_name_or_path] if asked.reward_model_name_or_path else []
    found += [reward_function(name) for name in asked.reward_funcs or []]
    if not found:
        raise ValueError(
            "No reward is named: give the import paths of functions with --reward_funcs, as `my_rewards.length`."
        )
    return {"reward_funcs": found}


def reward_function(name: str) -> Callable[..., Any]:
    """One of TRL's reward functions by its name, or any by its import path, also from the current folder.

    Raises:
        ValueError: There is none of that name.
    """
    from trl import rewards

    if name == "get_soft_overlong_punishment":
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    module, _, function = name.rpartition(".")
    if not module and function in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"):
        return getattr(rewards, function)
    sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), function, None) if module else None
    except ModuleNotFoundError as error:
        raise ValueError(f"--reward_funcs names `{name}`, and {error}: give the import path of a function.") from error
    finally:
        sys.path.remove("")
    if found is None:
        raise ValueError(f"--reward_funcs names `{name}`, which is no function: give its import path, `module.name`.")
    return found
