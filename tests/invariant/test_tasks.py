"""Mean is Trainer, for every task: all go through rows and Gramian.

Trainer's settings that meet here are six, of two values each: 64 products, too many to run them all for every task. Six
runs of a task meet every pair of values of every two settings: a setting that is wrong by itself, or together with
another one, fails for each task. (What a third one changes is met too, though not by each task: over all tasks, every
three values of three settings meet.) Two steps are an epoch, the second of which has an uneven micro-batch, and what
is wrong in a step is so in all that follow; one run of each task takes 20, over several epochs. `make test` has
one of a task's six runs.

Most heads ignore the number of items that Trainer counts, and it does not divide by the number of micro-batches either:
there the reference is Trainer's step on one big batch.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest
from transformers import Trainer, TrainingArguments

from tests.invariant.test_trainer_invariants import KINDS
from tests.marks import in_turn
from tests.releases import has, needs
from tests.trainer.runs import arguments, flat, logged, relative, run
from tests.trainer.tasks import TABLE, collate, examples_of, model_of

pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")

SETTINGS = {
    "accumulation": (1, 3),
    "adapted": (True, False),
    "optim": ("adamw_torch", "sgd"),
    "max_grad_norm": (0.05, 1e9),
    "label_smoothing_factor": (0.1, 0.0),
    "kind": ("group", "instance"),
}
CASES = 6


def settings_of(name: str, case: int) -> dict:
    """The settings of a task's run.

    Each setting has its second value in three of the first five runs, in another three than any other setting: any two
    share a run, each has one of its own, and the last run has neither. Which of its values is the second one depends on
    the task, so that the last runs, which are long, are not alike.
    """
    triples = list(combinations(range(CASES - 1), 3))
    first = list(TABLE).index(name)  # Other triples for each task.
    return {
        setting: values[(case in triples[(first + i) % len(triples)]) != bool(first >> i % 4 & 1)]
        for i, (setting, values) in enumerate(SETTINGS.items())
    }


def met(names, strength: int) -> set:
    """The values of so many settings that some run of these tasks has together."""
    runs = [settings_of(name, case) for name in names for case in range(CASES)]
    return {values for run in runs for values in combinations(run.items(), strength)}


def test_the_runs_of_a_task_meet_every_two_values_and_those_of_all_every_three():
    for strength, sets in ((2, [[name] for name in TABLE]), (3, [list(TABLE)])):
        every = {
            tuple(zip(chosen, values, strict=True))
            for chosen in combinations(SETTINGS, strength)
            for values in product(*(SETTINGS[setting] for setting in chosen))
        }
        for names in sets:
            assert met(names, strength) == every


@pytest.mark.parametrize("name, case", in_turn(TABLE, {str(case): case for case in range(CASES)}))
def test_mean_is_trainer(name, case, tmp_path):
    task, flags = TABLE[name], settings_of(name, case)
    kind, adapted, accumulation = (flags.pop(key) for key in ("kind", "adapted", "accumulation"))
    # Before transformers 5.15, the label smoother doesn't know the number of items.
    flags["label_smoothing_factor"] *= task.smoothed and has("transformers", "5.15")
    flags["max_steps"] = 20 if case == CASES - 1 else 2
    # 22 examples are micro-batches of 4, 4, 4 and 4, 4, 2; or batches of 12 and 10.
    data = examples_of(task, 22)
    theirs = stock_run(task, adapted, data, tmp_path, **flags, **batches_of(accumulation))
    args = arguments(tmp_path, jd_weighting="mean", **flags, **batches_of(accumulation), **KINDS[kind])
    model = model_of(task, adapted)
    ours = run(model, args, data, data_collator=shifting(model))
    # Trainer's label smoother divides in float32 in another order.
    tolerance = 1e-6 if flags["label_smoothing_factor"] else task.tolerance
    assert relative(flat(ours.model), flat(theirs.model)) < tolerance
    assert relative(flat(theirs.model), flat(model_of(task, adapted))) > 1e-6
    assert relative(logged(ours, "grad_norm"), logged(theirs, "grad_norm")) < 100 * tolerance
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert ours.state.total_flos == theirs.state.total_flos
    assert len(ours.jd_state.gramian) > 1
    assert logged(ours, "jd/non_finite").sum() == 0


def batches_of(accumulation):
    return {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}


def shifting(model):
    """A collator; with label smoothing Trainer takes the labels away, and leaves it to the collator to shift them."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)

    def with_decoder_inputs(batch):
        batch = collate(batch)
        return batch if shift is None else {**batch, "decoder_input_ids": shift(labels=batch["labels"])}

    return with_decoder_inputs


def stock_run(task, adapted, data, directory, **flags):
    model = model_of(task, adapted)
    args = arguments(directory, TrainingArguments, remove_unused_columns=False, **flags)
    data = [{key: value for key, value in example.items() if key != "task"} for example in data]
    return run(model, args, data, data_collator=shifting(model))


@needs("transformers", "5.19", "loss_is_scaled_for_ga")
@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name].normalises != "items"])
def test_mean_is_a_trainer_that_is_told_to_average_the_micro_batches(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "loss_is_scaled_for_ga", False)
    task, data = TABLE[name], examples_of(TABLE[name], 14)
    flags = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    theirs = stock_run(task, False, data, tmp_path, **flags)
    args = arguments(tmp_path, jd_weighting="mean", **flags, **KINDS["group"])
    ours = run(model_of(task, False), args, data, data_collator=collate)
    assert relative(flat(ours.model), flat(theirs.model)) < task.tolerance
    for key in ("loss", "grad_norm"):
        assert relative(logged(ours, key), logged(theirs, key)) < 1e-6
