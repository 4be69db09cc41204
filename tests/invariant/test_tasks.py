"""`mean` equals Trainer for every task, and always goes through rows and Gramian.

Six of Trainer's settings are combined here, with two values each: 64 combinations, too many to run for every task. Six
runs per task cover every pair of values of every two settings, so a setting that is wrong by itself, or together with
another one, fails for each task. (Combinations of three are covered, too, though not by each task: all tasks together
cover every three values of three settings.) An epoch has two steps, the second of which has an uneven micro-batch, and
an error in one step persists in all later ones; one run of each task takes 20 steps, over several epochs. `make test`
runs one of a task's six runs.

Most heads ignore the number of items that Trainer counts, and Trainer does not divide by the number of micro-batches
either: for these, the reference is Trainer's step on one big batch.
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
    """Return the settings of a task's run.

    Each setting has its second value in three of the first five runs, a different three for each setting: any two
    settings share a run with both second values, each has a run without the other's, and the last run has none. Which
    value is the second one depends on the task, so that the last runs, which are long, differ.
    """
    triples = list(combinations(range(CASES - 1), 3))
    first = list(TABLE).index(name)  # Each task has different triples.
    return {
        setting: values[(case in triples[(first + i) % len(triples)]) != bool(first >> i % 4 & 1)]
        for i, (setting, values) in enumerate(SETTINGS.items())
    }


def covered(names, strength: int) -> set:
    """Return the values of `strength` settings together that some run of these tasks has."""
    runs = [settings_of(name, case) for name in names for case in range(CASES)]
    return {values for run in runs for values in combinations(run.items(), strength)}


def test_the_runs_cover_all_pairs_per_task_and_all_triples_overall():
    for strength, sets in ((2, [[name] for name in TABLE]), (3, [list(TABLE)])):
        every = {
            tuple(zip(chosen, values, strict=True))
            for chosen in combinations(SETTINGS, strength)
            for values in product(*(SETTINGS[setting] for setting in chosen))
        }
        for names in sets:
            assert covered(names, strength) == every


@pytest.mark.parametrize("name, case", in_turn(TABLE, {str(case): case for case in range(CASES)}))
def test_mean_equals_trainer_for_every_task(name, case, tmp_path):
    task, flags = TABLE[name], settings_of(name, case)
    kind, adapted, accumulation = (flags.pop(key) for key in ("kind", "adapted", "accumulation"))
    # Before transformers 5.15, the label smoother ignores the number of items.
    flags["label_smoothing_factor"] *= task.smoothed and has("transformers", "5.15")
    flags["max_steps"] = 20 if case == CASES - 1 else 2
    # 22 examples make micro-batches of 4, 4, 4 and 4, 4, 2; or batches of 12 and 10.
    data = examples_of(task, 22)
    theirs = stock_run(task, adapted, data, tmp_path, **flags, **batches_of(accumulation))
    args = arguments(tmp_path, jd_weighting="mean", **flags, **batches_of(accumulation), **KINDS[kind])
    model = model_of(task, adapted)
    ours = run(model, args, data, data_collator=shifting(model))
    # Trainer's label smoother divides in float32, in a different order.
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
    """Return a collator; with label smoothing, Trainer removes the labels, and the collator has to shift them."""
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
def test_mean_equals_a_trainer_told_to_average_micro_batches(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "loss_is_scaled_for_ga", False)
    task, data = TABLE[name], examples_of(TABLE[name], 14)
    flags = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    theirs = stock_run(task, False, data, tmp_path, **flags)
    args = arguments(tmp_path, jd_weighting="mean", **flags, **KINDS["group"])
    ours = run(model_of(task, False), args, data, data_collator=collate)
    assert relative(flat(ours.model), flat(theirs.model)) < task.tolerance
    for key in ("loss", "grad_norm"):
        assert relative(logged(ours, key), logged(theirs, key)) < 1e-6
