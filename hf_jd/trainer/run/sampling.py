"""Build the sampler of the training examples, if it is not Trainer's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_jd.groups import groups_of_each
from hf_jd.sampler import StratifiedSampler

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


def stratified_sampler(trainer: JDTrainerMixin, dataset: Any) -> StratifiedSampler:
    """Build the sampler of `--jd_sampler stratified`, for the updates that Trainer and accelerate will form.

    accelerate gives the processes whole batches in turn, or, with `split_batches`, a piece of each. It would fill up
    the last round of batches with the epoch's first examples; the sampler fills it with a share of every group.
    """
    args, accelerator, column = trainer.args, trainer.accelerator, trainer.jd_args.jd_group_column
    assert column is not None
    processes, batch = args.world_size, trainer._train_batch_size
    together = batch if accelerator.split_batches else batch * processes
    length = len(dataset)
    if args.dataloader_drop_last:
        length -= length % together
    elif processes > 1 and accelerator.even_batches:
        length += -length % together
    return StratifiedSampler(
        [name for (name,) in groups_of_each(dataset, column)],
        update_size=together * args.gradient_accumulation_steps,
        batch_size=batch // processes if accelerator.split_batches else batch,
        length=length,
        seed=args.seed if args.data_seed is None else args.data_seed,
        # accelerate sets a sampler's epoch, but not behind two of its wrappers, when resuming.
        epoch=lambda: int(trainer.state.epoch or 0),
    )
