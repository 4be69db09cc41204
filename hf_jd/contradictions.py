"""Refuse --jd_* flags that contradict each other, or that the weighting doesn't support."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_jd._compat import ordering_flag
from hf_jd.weighting import WEIGHTINGS, MeanWeighting

if TYPE_CHECKING:
    from hf_jd.arguments import JDArguments


def check_flags(args: JDArguments) -> None:
    """Raise a ValueError for flags that contradict each other, whatever the weighting."""
    needs_column = {
        f"--jd_objectives {args.jd_objectives}": args.jd_objectives == "group",
        f"--jd_sampler {args.jd_sampler}": args.jd_sampler != "trainer",
        "--jd_ascend": args.jd_ascend,
    }
    for flag, is_set in needs_column.items():
        if is_set and args.jd_group_column is None:
            raise ValueError(
                f"{flag} needs --jd_group_column, the training set's column that names each example's group."
            )
    if args.jd_objectives == "loss" and args.jd_group_column is not None:
        raise ValueError(
            "--jd_objectives loss weighs losses of whole batches, which have no groups: leave out "
            "--jd_group_column, or choose --jd_objectives instance_loss or group."
        )
    check_blocks(args, args.jd_blocks)
    if args.jd_sampler != "trainer" and (ordering := ordering_flag(args)) is not None:
        raise ValueError(
            f"--jd_sampler {args.jd_sampler} and {ordering} both order the examples: leave one of them out."
        )


def check_blocks(args: JDArguments, blocks: Any) -> None:
    """Raise a ValueError for flags that need one weight per objective, if parameters are weighed by `blocks`."""
    one_weight = {
        f"--jd_backward {args.jd_backward}": args.jd_backward != "one_pass",
        f"--jd_every {args.jd_every}": args.jd_every > 1,
    }
    for flag, is_set in one_weight.items():
        if is_set and blocks not in (None, "none"):
            raise ValueError(
                f"{flag} descends weighted losses, each with one weight for all parameters, and with --jd_blocks each "
                "block has separate weights: leave one of them out."
            )


def check_weighting(args: JDArguments, weighting: Any) -> None:
    """Raise a ValueError for flags that the weighting, which may be any callable, can't follow."""
    ours = type(weighting) is WEIGHTINGS[args.jd_weighting]
    name = args.jd_weighting if ours else getattr(weighting, "__name__", type(weighting).__name__)
    _check_preferences(args, weighting, name)
    _check_schedule(args, isinstance(weighting, MeanWeighting), name)
    if args.jd_normalize != "none" and getattr(weighting, "reads", "gramian") == "losses":
        raise ValueError(
            f"--jd_normalize {args.jd_normalize} divides rows, but the weighting `{name}` reads only losses: leave it "
            "at none."
        )
    if args.jd_normalize == "loss" and args.jd_ascend:
        raise ValueError("--jd_normalize loss needs positive losses, but --jd_ascend negates some: use rows or none.")


def _check_preferences(args: JDArguments, weighting: Any, name: str) -> None:
    preferences = args.preferences()
    if not preferences:
        return
    # Groups differ between updates, so the weighting is rebuilt with their preferences: it has to be a dataclass.
    if not is_dataclass(weighting) or not hasattr(weighting, "pref_vector"):
        takers = [key for key, cls in WEIGHTINGS.items() if "pref_vector" in inspect.signature(cls).parameters]
        raise ValueError(
            f"--jd_preferences needs a weighting that takes preferences, and `{name}` does not: use one of "
            f"{listed(takers)}."
        )
    if weighting.pref_vector is not None:
        raise ValueError("--jd_preferences and the weighting's pref_vector say the same: leave one of them out.")
    if not args.kind.shared:
        raise ValueError(
            f"--jd_preferences needs objectives with names, and objectives `{args.jd_objectives}` have none: use "
            "--jd_objectives group or loss."
        )
    replace(weighting, pref_vector=[*preferences.values(), 1.0])  # validates them: some weightings refuse a 0


def _check_schedule(args: JDArguments, mean: bool, name: str) -> None:
    """Check the flags for when to weigh and when to measure."""
    if args.jd_every > 1:
        flag = f"--jd_every {args.jd_every}"
        if mean:
            raise ValueError(
                f"{flag}, but the mean's weights are the same at every update: use --jd_monitor_every to measure only "
                "some updates."
            )
        if not args.kind.shared:
            raise ValueError(
                f"{flag} reuses weights by name, and objectives `{args.jd_objectives}` have none: use --jd_objectives "
                "group or loss."
            )
        if args.jd_scope != "global":
            raise ValueError(f"{flag} needs updates that are weighed as a whole: leave --jd_scope at global.")
    if args.jd_warmup_steps and mean:
        raise ValueError(
            "--jd_warmup_steps starts with the mean, and --jd_weighting mean always uses it: leave it at 0."
        )
    if args.jd_monitor_every is None:
        return
    if not mean:
        raise ValueError(
            f"--jd_monitor_every only watches, but the weighting `{name}` changes the steps: use it with "
            "--jd_weighting mean, or use --jd_every."
        )
    changes = {"--jd_normalize": args.jd_normalize != "none", "--jd_ascend": args.jd_ascend}
    changes["--jd_group_reduction mean"] = args.own_mean
    for flag, is_set in changes.items():
        if is_set:
            raise ValueError(f"--jd_monitor_every only watches, but {flag} changes the steps: leave one of them out.")


def listed(names: Iterable[str]) -> str:
    """Format names for a message: in backticks, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)
