"""`hf-jd grpo`: TRL's GRPO script with JDGRPOTrainer, and reward functions by import path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from transformers import AutoConfig

from hf_jd.commands.common import run
from hf_jd.finetune.sentences import explained
from hf_jd.trainer.trl.trainers import JDGRPOConfig, JDGRPOTrainer


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    from trl.scripts.grpo import GRPOScriptArguments

    return run("grpo", argv, JDGRPOTrainer, JDGRPOConfig, GRPOScriptArguments, _rewards)


def _rewards(script: Any, model: Any) -> dict[str, Any]:
    """Return the reward model, if there is one, and the reward functions."""
    judge = script.reward_model_name_or_path
    if judge:
        with explained(f"The reward model `{judge}` can't be loaded", OSError, ValueError):
            AutoConfig.from_pretrained(judge)
    rewards = [judge] if judge else []
    rewards += [reward_function(name) for name in script.reward_funcs or []]
    if not rewards:
        raise ValueError(
            "No reward is given: set --reward_funcs to the import paths of functions, such as `my_rewards.length`."
        )
    return {"reward_funcs": rewards}


def reward_function(name: str) -> Callable[..., Any]:
    """Return one of TRL's reward functions by name, or any function by import path, also from the current folder.

    Raises:
        ValueError: There is no such function.
    """
    from trl import rewards

    if name == "get_soft_overlong_punishment":
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    module, _, function = name.rpartition(".")
    if not module and function in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"):
        return getattr(rewards, function)
    sys.path.insert(0, "")
    try:
        relative = not module or module.startswith(".")
        reward = None if relative else getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"--reward_funcs names `{name}`, and {error}: give the import path of a function.") from error
    finally:
        sys.path.remove("")
    if not callable(reward) or isinstance(reward, type):
        raise ValueError(f"--reward_funcs names `{name}`, which is no function: give an import path, `module.name`.")
    return reward
