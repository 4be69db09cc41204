"""All features that JDTrainer leaves to Trainer: with `mean`, each gives the same parameters and logs as in Trainer."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_jd import JDTrainer
from tests.invariant.test_trainer_invariants import KINDS
from tests.marks import slow
from tests.releases import needs
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run

SCHEDULES = {
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
    "greedy": {"eval_strategy": "steps", "eval_steps": 2},
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 2},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}},
}


def both(directory, kind="instance", settings=dict, **flags):
    """Return Trainer and JDTrainer after the same run; `settings` builds the arguments that aren't flags."""
    flags = {"max_steps": 6, "gradient_accumulation_steps": 2, **flags}
    trainers = []
    for cls, jd_flags in ((TrainingArguments, {}), (None, {"jd_weighting": "mean", **KINDS[kind]})):
        args = arguments(directory / str(len(trainers)), *filter(None, [cls]), **flags, **jd_flags)
        model = lora("gpt2", warm=True)
        extra = settings(model) if settings is not dict else {}
        trainers.append(run(model, args, eval_dataset=examples(4, seed=1), **extra))
    return trainers


def are_alike(theirs, ours, tolerance=1e-10):
    assert relative(flat(ours.model), flat(theirs.model)) < tolerance
    for key in ("loss", "learning_rate", "eval_loss"):
        assert logged(ours, key).tolist() == pytest.approx(logged(theirs, key).tolist(), rel=1e-6), key
    assert logged(ours, "grad_norm").tolist() == pytest.approx(logged(theirs, "grad_norm").tolist(), rel=1e-5)


@pytest.mark.parametrize("schedule", [s.value if s.value in SCHEDULES else slow(s.value) for s in SchedulerType])
def test_mean_equals_trainer_for_each_schedule(schedule, tmp_path):
    are_alike(*both(tmp_path, lr_scheduler_type=schedule, warmup_steps=2, **SCHEDULES.get(schedule, {})))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adagrad", "rmsprop", "adafactor"])
@pytest.mark.parametrize("kind", ["instance", slow("group")])
def test_mean_equals_trainer_for_each_optimizer(kind, optimizer, tmp_path):
    # Optimizers that divide by the size of a gradient amplify rounding errors.
    are_alike(*both(tmp_path, kind, optim=optimizer), tolerance=1e-8)


def test_mean_equals_trainer_with_lora_plus(tmp_path):
    def settings(model):
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
        return {"optimizers": (optimizer, None)}

    are_alike(*both(tmp_path, settings=settings))


class TwoModes(torch.optim.SGD):
    """Like schedule-free optimizers, it has to be put into training mode before it steps."""

    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        assert self.training
        return super().step(closure)


def test_mean_equals_trainer_with_a_schedule_free_optimizer(tmp_path):
    def settings(model):
        return {"optimizers": (TwoModes([p for p in model.parameters() if p.requires_grad], lr=0.1), None)}

    are_alike(*both(tmp_path, settings=settings, eval_strategy="steps", eval_steps=2))


@pytest.mark.parametrize(
    "flags",
    [
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        {"average_tokens_across_devices": False},
        {"label_names": ["labels"], "eval_strategy": "steps", "eval_steps": 3},
        {"prediction_loss_only": True, "eval_strategy": "steps", "eval_steps": 3},
        {"include_num_input_tokens_seen": "all"},
        {"logging_first_step": True, "logging_steps": 2},
        {"num_train_epochs": 2, "max_steps": -1},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda flags: next(iter(flags)),
)
@pytest.mark.parametrize("kind", [slow("instance"), "group"])
def test_mean_equals_trainer_for_each_flag(kind, flags, tmp_path):
    theirs, ours = both(tmp_path, kind, learning_rate=0.1, **flags)
    are_alike(theirs, ours, 1e-8)
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    assert ours.state.global_step == theirs.state.global_step
    assert (theirs.state.best_model_checkpoint is not None) == ("load_best_model_at_end" in flags)
    assert ours.state.best_global_step == theirs.state.best_global_step


@pytest.mark.parametrize("kind", [slow("instance"), "group"])
def test_a_batch_that_is_too_large_is_made_smaller(kind, tmp_path):
    def settings(model):
        def full(module, args, kwargs):
            if len(kwargs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")

        model.register_forward_pre_hook(full, with_kwargs=True)
        return {}

    flags = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    theirs, ours = both(tmp_path, kind, settings, **flags)
    are_alike(theirs, ours)
    assert ours._train_batch_size == theirs._train_batch_size < 4


def test_callbacks_are_called_as_by_trainer(tmp_path):
    class Calls(TrainerCallback):
        def __init__(self):
            self.names = []

        def __getattribute__(self, name):
            if name.startswith("on_"):
                self.names.append(name)
            return super().__getattribute__(name)

    calls = []

    def settings(model):
        calls.append(Calls())
        return {"callbacks": [calls[-1]]}

    both(tmp_path, settings=settings, eval_strategy="steps", eval_steps=2)
    assert calls[0].names == calls[1].names
    assert {"on_step_end", "on_evaluate", "on_substep_end", "on_pre_optimizer_step"} <= set(calls[0].names)


def test_inputs_are_prepared_by_trainer(tmp_path, monkeypatch):
    prepare, batches = Trainer._prepare_inputs, []

    def shifted(self, inputs):
        batches.append(inputs)
        return {**prepare(self, inputs), "input_ids": inputs["input_ids"] % 30}

    plain, _ = both(tmp_path / "plain")
    monkeypatch.setattr(Trainer, "_prepare_inputs", shifted)
    theirs, ours = both(tmp_path)
    are_alike(theirs, ours)
    assert relative(flat(theirs.model), flat(plain.model)) > 1e-4
    assert all(batch["input_ids"].max() < 37 and "labels" in batch for batch in batches), "batches are left as they are"


def test_dropout_continues_after_an_evaluation(tmp_path):
    flags = {"eval_strategy": "steps", "eval_steps": 2}
    theirs, ours = (
        run(lora("gpt2", dropout=0.2), args, eval_dataset=examples(4, seed=1))
        for args in (
            arguments(tmp_path, TrainingArguments, **flags),
            arguments(tmp_path, jd_weighting="mean", **flags),
        )
    )
    are_alike(theirs, ours)
    assert ours.model.training == theirs.model.training


@pytest.mark.parametrize("every", [1, 2])
def test_the_device_cache_is_cleared_as_often(every, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *args: calls.append(args))
    both(tmp_path, torch_empty_cache_steps=every)
    theirs = len(calls) // 2
    assert len(calls) == 2 * theirs >= 22 // every


def size(prediction, compute_result=True):
    """Compute a metric that depends on each logit, and on the other outputs."""
    logits = torch.as_tensor(prediction.predictions)
    extra = [value for value in (prediction.inputs, prediction.losses) if value is not None]
    total = sum(torch.as_tensor(value).double().sum().item() for value in extra)
    return {"size": float(logits.abs().sum()) + float(torch.as_tensor(prediction.label_ids).sum()) + total}


class Interrupts(TrainerCallback):
    """A callback that evaluates, ends an epoch, and ends the run, whatever the flags are."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 1
        control.should_epoch_stop = state.global_step == 3
        control.should_training_stop = state.global_step == 5
        return control


class Freezes(TrainerCallback):
    """A callback that freezes some parameters for two steps."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(state.global_step not in (2, 3))


EVALUATE = {"eval_strategy": "steps", "eval_steps": 2}
REBALANCED = "batches of equal work"
FEATURES = {
    "evaluation at the start": ({**EVALUATE, "eval_on_start": True, "eval_delay": 3}, {}),
    "metrics": ({**EVALUATE, "include_for_metrics": ["inputs", "loss"]}, {"compute_metrics": size}),
    "metrics by batch": ({**EVALUATE, "batch_eval_metrics": True}, {"compute_metrics": size}),
    "logits kept apart": ({**EVALUATE, "eval_accumulation_steps": 1}, {"compute_metrics": size}),
    "logits made smaller": (
        {**EVALUATE, "bf16_full_eval": True},
        {"compute_metrics": size, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    ),
    "the best one saved": ({**EVALUATE, "save_strategy": "best", "metric_for_best_model": "eval_loss"}, {}),
    "only the model saved": ({"save_strategy": "steps", "save_steps": 2, "save_only_model": True}, {}),
    "control": ({}, {"callbacks": [Interrupts()]}),
    "freezing": ({"optim": "sgd"}, {"callbacks": [Freezes()]}),
    "an optimizer's class": ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})}),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {},
    ),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "part of an epoch": ({"num_train_epochs": 1.5, "max_steps": -1, "data_seed": 7}, {}),
    REBALANCED: ({"train_sampling_strategy": "batch_rebalance", "logging_nan_inf_filter": False}, {}),
}


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(name, marks=needs("transformers", "5.17", "batch_rebalance")) if name == REBALANCED else name
        for name in FEATURES
    ],
)
def test_mean_equals_trainer_for_each_feature(feature, tmp_path):
    flags, extra = FEATURES[feature]
    theirs, ours = both(tmp_path, "group", lambda model: extra, learning_rate=0.01, **flags)
    are_alike(theirs, ours, 1e-8)
    assert ours.state.global_step == theirs.state.global_step
    assert logged(ours, "eval_size").tolist() == pytest.approx(logged(theirs, "eval_size").tolist(), rel=1e-5)
    assert len(logged(ours, "eval_size")) or "compute_metrics" not in extra
    saved = [sorted(path.name for path in (tmp_path / run).glob("checkpoint-*")) for run in "01"]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("flags", [{}, {"ignore_data_skip": True}], ids=["skipping", "not skipping"])
def test_resuming_equals_trainer(flags, tmp_path):
    flags = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3, **flags}
    both(tmp_path, max_steps=3, **flags)
    resumed = []
    for folder, jd_flags in (("0", [TrainingArguments]), ("1", [])):
        settings = {} if jd_flags else {"jd_weighting": "mean"}
        args = arguments(tmp_path / folder, *jd_flags, max_steps=6, gradient_accumulation_steps=2, **flags, **settings)
        trainer = (Trainer if jd_flags else JDTrainer)(
            lora("gpt2", warm=True), args, train_dataset=examples(), data_collator=collate
        )
        trainer.train(resume_from_checkpoint=True)
        resumed.append(trainer)
    are_alike(*resumed)
