"""Mean is Trainer, for every task: all go through rows and Gramian.

Most heads ignore the number of items that Trainer counts, and it does not divide by the number of micro-batches either:
there the reference is Trainer's step on one big batch. Each choice is met with each task, though not in every product.
"""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from tests.invariant.test_trainer_invariants import KINDS
from tests.trainer.runs import arguments, flat, logged, relative, run
from tests.trainer.tasks import TABLE, collate, examples_of, model_of

pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")

# kind of objectives, LoRA, accumulation, optimizer, clipping, label smoothing
CASES = {
    "instance-lora-adamw-clipped": ("instance", True, 1, "adamw_torch", 0.05, 0.0),
    "group-full-sgd-accumulated": ("group", False, 3, "sgd", 0.0, 0.0),
    "instance-full-sgd-accumulated-clipped-smoothed": ("instance", False, 3, "sgd", 0.05, 0.1),
    "group-lora-adamw-accumulated-smoothed": ("group", True, 3, "adamw_torch", 0.0, 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TABLE)
def test_mean_is_trainer(name, case, tmp_path):
    task = TABLE[name]
    kind, adapted, accumulation, optimizer, clipping, smoothing = CASES[case]
    flags = {"optim": optimizer, "max_grad_norm": clipping, "max_steps": 4}
    flags["label_smoothing_factor"] = smoothing if task.smoothed else 0.0
    # 22 examples are micro-batches of 4, 4, 4 and 4, 4, 2; or batches of 12 and 10.
    data = examples_of(task, 22)
    one_batch = task.normalises == "nothing"
    theirs_flags = {"per_device_train_batch_size": 4 * accumulation} if one_batch else _batches(accumulation)
    theirs = stock_run(task, adapted, data, tmp_path, **flags, **theirs_flags)
    args = arguments(tmp_path, jd_weighting="mean", **flags, **_batches(accumulation), **KINDS[kind])
    ours = run(model_of(task, adapted), args, data, data_collator=collate)
    # Trainer's label smoother divides in float32 in another order.
    tolerance = 1e-6 if flags["label_smoothing_factor"] else task.tolerance
    assert relative(flat(ours.model), flat(theirs.model)) < tolerance
    assert relative(flat(theirs.model), flat(model_of(task, adapted))) > 1e-5
    assert relative(logged(ours, "grad_norm"), logged(theirs, "grad_norm")) < 100 * tolerance
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert len(ours.jd_state.gramian) > 1
    assert not ours.has_extra, "what losses lack would be added to their mean, and hide that they are wrong"
    assert logged(ours, "jd/non_finite").sum() == 0


def _batches(accumulation):
    return {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}


def stock_run(task, adapted, data, directory, **flags):
    model = model_of(task, adapted)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)

    def with_decoder_inputs(batch):
        # With label smoothing Trainer takes the labels away, and leaves it to the collator to have shifted them.
        batch = collate([{key: value for key, value in example.items() if key != "task"} for example in batch])
        return batch if shift is None else {**batch, "decoder_input_ids": shift(labels=batch["labels"])}

    args = arguments(directory, TrainingArguments, remove_unused_columns=False, **flags)
    return run(model, args, data, data_collator=with_decoder_inputs)


def test_trainer_is_still_wrong_for_heads_that_ignore_the_number_of_items(tmp_path):
    # If this fails, upstream is mended: compare the table's heads of "nothing" with Trainer's own accumulation.
    task = TABLE["single-label"]
    data = examples_of(task, 12)
    flags = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    one = stock_run(task, False, data, tmp_path, per_device_train_batch_size=12, **flags)
    three = stock_run(task, False, data, tmp_path, **_batches(3), **flags)
    assert relative(logged(three, "loss"), 3 * logged(one, "loss")) < 1e-6
    assert relative(logged(three, "grad_norm"), 3 * logged(one, "grad_norm")) < 1e-6
