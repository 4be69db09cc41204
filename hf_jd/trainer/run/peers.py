"""The other processes: check that they train the same, and explain what to do if one of them ends."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_jd.checkpoints import newest_whole
from hf_jd.distributed.agreement import check_alike, check_weights
from hf_jd.distributed.processes import process_count, rank
from hf_jd.trainer.run.resuming import needed_files

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

_SIGNS = ("connection", "timed out", "timeout", "nccl", "gloo", "broken pipe", "socket")


def check_given(trainer: JDTrainerMixin, resumed: str | bool | None) -> None:
    """Raise a ValueError if processes differ in seeds, flags, groups, examples or the checkpoint to resume."""
    args = trainer.args
    flags = {name: value for name, value in vars(trainer.jd_args).items() if name.startswith("jd_")}
    names = ["seed", "data_seed", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate"]
    trainers = {name: getattr(args, name) for name in names}
    data = {"groups": trainer.jd_group_names, "examples": _examples(trainer.train_dataset)}
    check_alike({**trainers, **flags, **data, "resume_from_checkpoint": resumed})


def check_same_weights(trainer: JDTrainerMixin) -> None:
    """Compare all processes' weights every `--jd_check_processes` updates; raise a ValueError if they differ."""
    every, step = trainer.jd_args.jd_check_processes, trainer.state.global_step
    if every and step % every == 0:
        assert trainer.model is not None
        named = trainer.model.named_parameters()
        check_weights({name: p for name, p in named if p.requires_grad}, step)


@contextmanager
def lost_peers(trainer: JDTrainerMixin) -> Generator[None]:
    """Explain what happened, and what to do, if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        directory = trainer.args.output_dir
        newest = None if directory is None else newest_whole(Path(directory), needed_files(trainer))[0]
        saved = f"The last complete checkpoint is `{newest}`" if newest else "There is no complete checkpoint yet"
        raise RuntimeError(
            f"Process {rank()} of {process_count()} ends in update {trainer.state.global_step + 1}, because another "
            f"one has ended or didn't answer in time (--ddp_timeout): see the others' logs. {saved}; restart all "
            "processes with --resume_from_checkpoint to continue from there."
        ) from error


def _examples(dataset: Any) -> Any:
    """Return the number of examples, and a few of them if they can be read without side effects."""
    if isinstance(dataset, Mapping):  # Several training sets by name.
        return {name: _examples(one) for name, one in dataset.items()}
    if not hasattr(dataset, "__len__"):
        return None
    n = len(dataset)
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)  # Without transforms, which may be random.
    elif not isinstance(dataset, list):
        return n
    return n, [dataset[i] for i in sorted({0, 1, n // 2, n - 1}) if 0 <= i < n]
