"""Which --jd_* flags contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_jd.arguments import JDArguments


def check_flags(args: JDArguments) -> None:
    """Raises a ValueError for flags that contradict each other."""
    needs_column = {
        f"--jd_objectives {args.jd_objectives}": args.jd_objectives == "group",
        f"--jd_sampler {args.jd_sampler}": args.jd_sampler != "trainer",
        "--jd_ascend": args.jd_ascend,
    }
    for flag, given in needs_column.items():
        if given and args.jd_group_column is None:
            raise ValueError(
                f"{flag} needs --jd_group_column, the column of the training set that names each example's group."
            )
    if args.jd_objectives == "loss" and args.jd_group_column is not None:
        raise ValueError(
            "--jd_objectives loss weighs losses of whole batches, in which there are no groups: leave out "
            "--jd_group_column, or choose --jd_objectives instance_loss or group."
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if args.jd_sampler != "trainer" and strategy != "random":
        raise ValueError(
            f"--jd_sampler {args.jd_sampler} and --train_sampling_strategy {strategy} both order the examples: leave "
            "one of them out."
        )
