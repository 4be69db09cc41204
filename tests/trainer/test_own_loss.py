"""The model's own loss, checked in each step; and a user's `compute_loss`, trained unchanged."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_jd import JDTrainer, JDTrainerMixin
from hf_jd.trainer.overrides import overridden
from tests.models import tiny_gpt2, tiny_llama
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_any
from tests.trainer.test_extra_losses import mixtral


class At(TrainerCallback):
    """A callback that changes the model after a given step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.change(model)


def with_loss(model, loss):
    """Return the model with its own loss replaced by `loss(its loss, its outputs, its inputs)`."""
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = loss(outputs.loss, outputs, kwargs)
        return outputs

    model.forward = changed
    return model


def penalised(model):
    """Add a penalty on the parameters, times a coefficient that starts at 0."""
    model.coefficient = 0.0
    return with_loss(
        model, lambda loss, *_: loss + model.coefficient * sum(p.square().sum() for p in model.parameters())
    )


def raised(model):
    model.coefficient = 0.1


def is_stock(build, directory, tolerance=1e-6, data=None, callbacks=(), **flags):
    """Check that the mean and the stock trainer give the same parameters; return the former trainer."""
    theirs_flags = {key: value for key, value in flags.items() if not key.startswith("jd_")}
    theirs = run(build(), arguments(directory, TrainingArguments, **theirs_flags), data, callbacks=list(callbacks))
    ours = run(build(), arguments(directory, jd_weighting="mean", **flags), data, callbacks=list(callbacks))
    assert relative(flat(ours.model), flat(theirs.model)) < tolerance
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < max(tolerance, 1e-6)
    return ours


@pytest.mark.parametrize("flags", [{}, {"gradient_accumulation_steps": 2}, {"jd_scope": "micro_batch"}], ids=str)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_penalty_that_grows_is_followed(build, flags, tmp_path):
    is_stock(lambda: penalised(build()), tmp_path, max_steps=6, optim="sgd", callbacks=[At(3, raised)], **flags)


def test_a_routers_coefficient_that_grows_is_followed(tmp_path):
    def grown(model):
        model.router_aux_loss_coef = 0.5

    flags = {"per_device_train_batch_size": 4, "max_steps": 4}
    args = (arguments(tmp_path, jd_weighting="mean", **flags), arguments(tmp_path, TrainingArguments, **flags))
    models = []
    for one in args:
        model = mixtral(0.5)
        model.router_aux_loss_coef = 0.0
        models.append(run(model, one, callbacks=[At(2, grown)]))
    assert relative(flat(models[0].model), flat(models[1].model)) < 1e-6
    assert relative(logged(models[0], "loss"), logged(models[1], "loss")) < 1e-6


@pytest.mark.parametrize("name", ["single-label", "token"])
def test_weights_of_classes_are_trained(name, tmp_path):
    task, weights = TABLE[name], torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)

    def build():
        model = model_of(task, adapted=False)
        assert isinstance(model, BertForSequenceClassification | BertForTokenClassification)
        torch.nn.init.zeros_(model.classifier.weight)
        return with_loss(
            model,
            lambda loss, out, kwargs: F.cross_entropy(out.logits.flatten(0, -2), kwargs["labels"].flatten(), weights),
        )

    models = []
    for args in (arguments(tmp_path, jd_weighting="mean"), arguments(tmp_path, TrainingArguments)):
        models.append(flat(run(build(), args, examples_of(task, 8), data_collator=collate_any).model))
    assert relative(*models) < 1e-6


def unshifted(loss, outputs, inputs):
    return F.cross_entropy(outputs.logits.flatten(0, 1).float(), inputs["labels"].flatten())


def of_a_prompt(loss, outputs, inputs):
    """Like an image captioning head: the first tokens belong to the picture."""
    return F.cross_entropy(outputs.logits[:, 2:-1].flatten(0, 1).float(), inputs["labels"][:, 3:].flatten())


def smoothed(loss, outputs, inputs):
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].flatten()
    return F.cross_entropy(outputs.logits.flatten(0, 1).float(), targets, label_smoothing=0.3)


def focal(loss, outputs, inputs):
    return loss * loss.detach().exp()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loss", [unshifted, of_a_prompt, smoothed, focal])
def test_a_head_with_another_loss_is_trained_unchanged(loss, bf16, tmp_path, caplog):
    data = examples()
    for example in data:
        example["labels"] = example["input_ids"]

    def build():
        return with_loss(tiny_llama().float(), loss)

    # bfloat16 rounds a gradient by 0.4 %, and SGD's steps are small.
    flags = {"bf16": bf16, "optim": "sgd", "jd_objectives": "group", "jd_group_column": "task"}
    ours = is_stock(build, tmp_path, 1e-3 if bf16 else 1e-5, data, **flags)
    assert "logs no `jd/loss/`" in caplog.text
    assert not any(key.startswith("jd/loss") for entry in ours.state.log_history[1:] for key in entry)
    with pytest.raises(ValueError, match="value of each objective is not known, which --jd_normalize loss needs"):
        run(build(), arguments(tmp_path, bf16=bf16, jd_normalize="loss"), data)


def test_a_penalty_from_the_first_step_is_added(tmp_path):
    def build():
        model = penalised(tiny_gpt2())
        model.coefficient = 0.01
        return model

    theirs = stock(build(), tmp_path, optim="sgd")
    ours = run(build(), arguments(tmp_path, jd_weighting="mean", optim="sgd"))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6


@pytest.mark.parametrize("flags", [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}], ids=str)
@pytest.mark.parametrize("name", [name for name, task in TABLE.items() if task.smoothed and name != "seq2seq"])
def test_values_are_known_in_ordinary_runs(name, flags, tmp_path):
    args = arguments(tmp_path, max_steps=8, **flags)
    ours = run(model_of(TABLE[name], True).float(), args, examples_of(TABLE[name], 8), data_collator=collate_any)
    assert ours.jd_state.losses.isfinite().all()


def test_a_nonfinite_loss_is_not_called_different(tmp_path):
    broken = []

    def nan(loss, *_):
        broken.append(loss)
        return loss * torch.nan if len(broken) == 3 else loss

    run(with_loss(tiny_gpt2(), nan), arguments(tmp_path))
    assert len(broken) > 3


# ---- A compute_loss of the user's own ----


def own(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs)
    return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class Doubled(Trainer):
    compute_loss = own


class Left(JDTrainerMixin, Doubled):
    pass


class Below(JDTrainer):
    compute_loss = own


class Further(Below):
    pass


class Behind(JDTrainer):
    """A trainer with `compute_losses` in a class further up than `compute_loss`."""

    def compute_losses(self, model, inputs):
        return super().compute_losses(model, inputs)


class BehindBelow(Behind):
    compute_loss = own


def doubled(directory):
    return run(lora("gpt2"), arguments(directory, TrainingArguments, optim="sgd"), cls=Doubled).model


def assert_is_doubled(trainer, directory):
    expected = flat(doubled(directory))
    assert relative(flat(trainer.model), expected) < 1e-10
    assert len(trainer.jd_state.weights) == 2


@pytest.mark.parametrize("cls", [Left, Below, Further, BehindBelow])
def test_a_loss_overridden_in_a_class_is_trained(cls, tmp_path):
    trainer = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", optim="sgd"), cls=cls)
    assert_is_doubled(trainer, tmp_path)


def test_a_loss_set_on_an_instance_is_trained(tmp_path):
    args = arguments(tmp_path, jd_weighting="mean", optim="sgd")
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)
    trainer.compute_loss = functools.partial(own, trainer)
    trainer.train()
    assert_is_doubled(trainer, tmp_path)


@pytest.mark.parametrize("cls", [Trainer, JDTrainerMixin, JDTrainer])
def test_a_patched_loss_is_trained(cls, tmp_path, monkeypatch):
    expected = doubled(tmp_path)
    monkeypatch.setattr(cls, "compute_loss", own, raising=False)
    trainer = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", optim="sgd"))
    assert relative(flat(trainer.model), flat(expected)) < 1e-10


def test_a_wrapped_trainer_loss_is_trained(tmp_path, monkeypatch):
    @functools.wraps(Trainer.compute_loss)
    def traced(self, *args, **kwargs):
        return 2 * inner(self, *args, **kwargs)

    inner = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", traced)
    theirs = stock(lora("gpt2"), tmp_path, optim="sgd")
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", optim="sgd"))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


class Stepping(Trainer):
    """A Trainer that computes its loss in its own `training_step`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 3 * model(**self._prepare_inputs(inputs)).loss / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class Timed(Doubled):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("theirs", [Stepping, Timed])
def test_an_overridden_training_step_runs(theirs, tmp_path):
    flags = {"optim": "sgd", "gradient_accumulation_steps": 2}
    ours = type("Ours", (JDTrainerMixin, theirs), {})
    expected = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), cls=theirs)
    trainer = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags), cls=ours)
    assert relative(flat(trainer.model), flat(expected.model)) < 1e-10
    assert relative(logged(trainer, "loss"), logged(expected, "loss")) < 1e-6
    assert getattr(trainer, "steps", None) == getattr(expected, "steps", None)


class Backward(Trainer):
    """A Trainer whose backward pass bypasses accelerate."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("theirs", [Stepping, Backward])
def test_a_step_that_hides_the_mixin_is_refused(theirs, tmp_path):
    cls = type("Ours", (JDTrainer,), {"training_step": theirs.training_step})
    with pytest.raises(ValueError, match="training_step of Ours doesn't call super"):
        run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean"), cls=cls)


def test_a_mixin_to_the_right_of_a_trainer_is_refused():
    with pytest.raises(TypeError, match=r"Wrong names Stepping before JDTrainerMixin.*\(JDTrainerMixin, Stepping\)"):
        type("Wrong", (Stepping, JDTrainerMixin), {})


class WithHead(Trainer):
    """A Trainer whose loss has parameters, which its optimizer also trains."""

    def create_optimizer(self, *args):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(tiny_gpt2().config.vocab_size, 4).double()
        optimizer = super().create_optimizer(*args)
        optimizer.add_param_group({"params": list(self.head.parameters())})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        return F.cross_entropy(self.head(logits).flatten(0, 1), inputs["input_ids"].flatten() % 4)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_parameters_of_a_loss_are_trained(kind, tmp_path):
    flags = {"optim": "sgd", "gradient_accumulation_steps": 2}
    ours = type("Ours", (JDTrainerMixin, WithHead), {})
    expected = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), cls=WithHead)
    trainer = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", jd_objectives=kind, **flags), cls=ours)
    assert relative(flat(trainer.head), flat(expected.head)) < 1e-10
    assert relative(flat(trainer.model), flat(expected.model)) < 1e-10


def test_unreduced_losses_take_precedence_in_training(tmp_path):
    class Both(Below):
        def compute_losses(self, model, inputs):
            return super().compute_losses(model, inputs)

    flags = {"max_steps": 2, "optim": "sgd"}
    trainer = run(tiny_gpt2(), arguments(tmp_path, jd_weighting="mean", **flags), cls=Both)
    assert relative(flat(trainer.model), flat(stock(tiny_gpt2(), tmp_path, **flags).model)) < 1e-6


def test_a_loss_function_may_return_one_number(tmp_path):
    def one(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.square().sum() / num_items_in_batch

    flags = {"optim": "sgd", "gradient_accumulation_steps": 3}
    theirs = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), compute_loss_func=one)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags), compute_loss_func=one)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert len(ours.jd_state.weights) > 2


def test_trls_sft_counts_as_a_custom_loss():
    pytest.importorskip("trl")
    from hf_jd import JDSFTTrainer

    assert overridden(JDSFTTrainer.__new__(JDSFTTrainer)) == "compute_loss"
