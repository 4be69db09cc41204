"""Hooks of the user's on what a backward computes: run as in Trainer, or refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer, JDTrainerMixin
from tests.trainer.own_losses import Case, classifier, trainer_of
from tests.trainer.runs import arguments, flat, relative

KINDS = {"instance": {}, "group": {"jd_objectives": "group", "jd_group_column": "task"}}


def doubled(gradient):
    return 2 * gradient


def of_logits(trainer, model, inputs, number):
    outputs = model(**inputs)
    outputs.logits.register_hook(doubled)
    return F.cross_entropy(outputs.logits, inputs["labels"]), outputs


def of_states(trainer, model, inputs, number):
    """Compute a loss that reads both the logits and the states on which they depend."""
    outputs = model(**inputs, output_hidden_states=True)
    outputs.hidden_states[0].register_hook(doubled)
    return F.cross_entropy(outputs.logits, inputs["labels"]) + outputs.hidden_states[0].square().mean(), outputs


def trained(cls, directory, loss=None, prepare=None, **flags) -> Trainer:
    case = Case(loss)
    config = arguments.__defaults__[0] if issubclass(cls, JDTrainerMixin) else TrainingArguments
    args = arguments(directory, config, optim="sgd", learning_rate=0.1, gradient_accumulation_steps=2, **flags)
    trainer = cls(classifier(), args, train_dataset=case.examples(14), data_collator=case.collate)
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [of_logits, of_states])
def test_hooks_on_outputs_run_once(loss, kind, tmp_path):
    stock = trainer_of(loss)
    theirs = trained(stock, tmp_path, loss)
    ours = trained(type("Ours", (JDTrainerMixin, stock), {}), tmp_path, loss, jd_weighting="mean", **KINDS[kind])
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


def of_retained(trainer, model, inputs, number):
    outputs = model(**inputs)
    outputs.logits.retain_grad()
    return F.cross_entropy(outputs.logits, inputs["labels"]), outputs


def test_outputs_that_retain_gradients_get_a_warning(tmp_path, caplog):
    cls = type("Ours", (JDTrainerMixin, trainer_of(of_retained)), {})
    trained(cls, tmp_path, of_retained, jd_weighting="mean", max_steps=1)
    assert "`retain_grad` was called on an output" in caplog.text


def of_model(trainer, model, inputs, number):
    outputs = model(**inputs)
    return outputs.loss, outputs


def hooked(hook, name="register_hook"):
    """Set a hook on each parameter."""

    def prepare(trainer):
        for p in trainer.model.parameters():
            getattr(p, name)(lambda gradient, p=p: hook(gradient, p))

    return prepare


def masked(gradient, p):
    """Train every other row, as for added tokens."""
    return gradient * (torch.arange(len(p)) % 2).view(-1, *[1] * (p.dim() - 1))


@pytest.mark.filterwarnings("ignore:.*further passes now")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", [masked, lambda gradient, p: None], ids=["mask", "watch"])
def test_linear_hooks_on_parameters_are_applied(hook, kind, tmp_path):
    stock, prepare = trainer_of(of_model), hooked(hook)
    theirs = trained(stock, tmp_path, of_model, prepare)
    cls = type("Ours", (JDTrainerMixin, stock), {})
    ours = trained(cls, tmp_path, of_model, prepare, jd_weighting="mean", **KINDS[kind])
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


UNLIKE_SUMS = {
    "clamp": lambda gradient, p: gradient.clamp(-0.5, 0.5),
    "decay": lambda gradient, p: gradient + 0.01 * p.detach(),
    "norm": lambda gradient, p: gradient / gradient.norm().clamp(min=1),
    "largest": lambda gradient, p: torch.where(gradient.abs() == gradient.abs().max(), gradient, 0),
}


@pytest.mark.parametrize("name", UNLIKE_SUMS)
def test_other_hooks_on_parameters_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"embeddings.weight has a hook .* isn't linear"):
        trained(JDTrainer, tmp_path, None, hooked(UNLIKE_SUMS[name]))


def test_the_row_of_a_batch_takes_any_hook(tmp_path):
    prepare = hooked(UNLIKE_SUMS["clamp"])
    theirs = trained(Trainer, tmp_path, None, prepare)
    ours = trained(JDTrainer, tmp_path, None, prepare, jd_weighting="mean", jd_objectives="batch")
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_post_accumulate_hooks_are_refused(kind, tmp_path):
    def halve(p, _):
        p.grad.mul_(0.5)

    prepare = hooked(halve, "register_post_accumulate_grad_hook")
    with pytest.raises(ValueError, match=r"register_post_accumulate_grad_hook.*on_pre_optimizer_step"):
        trained(JDTrainer, tmp_path, None, prepare, jd_objectives=kind)
