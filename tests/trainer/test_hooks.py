"""Hooks of the user's on what a backward computes: run as in Trainer, or refused."""

from __future__ import annotations

import pytest
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainerMixin
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
    """The logits depend on the states, which the loss reads, too."""
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
