"""For each weighting, one big batch equals its accumulation, however its instances are split and ordered."""

from __future__ import annotations

import pytest
import torch

from hf_jd import JDTrainer
from hf_jd.weighting import WEIGHTINGS
from tests.invariant.test_trainer_invariants import KINDS
from tests.marks import in_turn
from tests.trainer.runs import arguments, examples, flat, lora, relative, run

# Left out: weightings that draw random numbers, remember objectives by position, or need arguments or more than three
# objectives.
LEFT_OUT = {"random", "rlw", "gradvac", "pcgrad", "cr_mogm", "pcd", "dwa", "preference", "constant", "krum"}
# Weightings that read losses get them from a sum of float32 numbers.
TOLERANCES = dict.fromkeys(("stch", "famo", "geometric_mean", "cosmos", "pbi"), 1e-6)


class InOrder(JDTrainer):
    """A JDTrainer that visits the examples in order."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("weighting, kind", in_turn(sorted(set(WEIGHTINGS) - LEFT_OUT), {kind: kind for kind in KINDS}))
def test_splits_and_orders_change_nothing(weighting, kind, tmp_path):
    data = examples(6, unlabelled=(4,))
    models = []
    for size, order in ((6, [0, 1, 2, 3, 4, 5]), (2, [4, 5, 2, 3, 0, 1]), (4, [3, 1, 0, 5, 4, 2])):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=-(-6 // size),
            jd_weighting=weighting,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            **KINDS[kind],
        )
        models.append(flat(run(lora("gpt2", warm=True), args, [data[i] for i in order], InOrder).model))
    start = flat(lora("gpt2", warm=True))
    for other in models[1:]:
        assert relative(other - start, models[0] - start) < TOLERANCES.get(weighting, 1e-8)
