"""Batches as objectives, and what can't be split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from hf_jd import JDTrainer, JDTrainerMixin
from tests.trainer import own_losses, tasks
from tests.trainer.own_losses import CASES, Case, ours_of, prepared, trained, trainer_of
from tests.trainer.runs import arguments, flat, logged, relative
from tests.trainer.split_runs import (
    AVERAGED,
    GROUP,
    Recorded,
    assert_rows,
    brute,
)

# GPT-2's positions [1, T] belong to no instance; heads are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


# ---- Batches ----


class Normalised(nn.Module):
    """A model whose instances depend on each other."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(own_losses.VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, tasks.CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embedding(input_ids).mean(1)).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return Normalised().double()


def cached(trainer, model, inputs, number):
    """Run the model once without a graph, and again in the backward of its loss, row by row."""
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    logits = logits.requires_grad_()
    z = F.normalize(logits, dim=-1)
    loss = F.cross_entropy(z @ z.flip(0).T / 0.1, torch.arange(len(z)))
    (cotangent,) = torch.autograd.grad(loss, logits)

    def again(scale: Tensor) -> None:
        with torch.enable_grad():
            for i in range(len(z)):
                one = {key: value[i : i + 1] for key, value in inputs.items()}
                (model(**one).logits * cotangent[i] * scale).sum().backward()

    value = loss.detach().requires_grad_()
    value.register_hook(again)
    return value, None


BATCHES = {"BatchNorm": Case(lambda t, m, i, n: ((o := m(**i))["loss"], o), normalised), "cached": Case(cached)}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_objectives_need_nothing_from_the_model(name, tmp_path):
    case = BATCHES[name]
    flags = {"optim": "sgd", "gradient_accumulation_steps": 2, "max_steps": 3, "per_device_train_batch_size": 4}
    theirs = trained(case, tmp_path, 26, trainer_of(case.loss), **flags)
    ours = trained(case, tmp_path, 26, jd_objectives="batch", jd_weighting="mean", **flags)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "grad_norm"), logged(theirs, "grad_norm")) < 1e-6
    assert relative(flat(theirs.model), flat(case.build())) > 1e-4
    assert len(ours.jd_state.gramian) == 2


def test_the_gramian_of_batches_is_of_their_gradients(tmp_path):
    case = BATCHES["cached"]
    gradients = []
    for part in (slice(0, 4), slice(4, 8)):
        model = case.build()
        batch = case.collate([{k: v for k, v in e.items() if k != "task"} for e in case.examples(8)[part]])
        case.loss(None, model, batch, None)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    rows = torch.stack(gradients)  # Each batch is one of two objectives, and half of the update's mean.
    flags = {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 4}
    flags |= {"train_sampling_strategy": "sequential", "jd_objectives": "batch"}
    trainer = trained(case, tmp_path, 8, ours_of(case.loss, **AVERAGED), **flags)
    assert relative(trainer.jd_state.gramian, rows @ rows.T) < 1e-10


def own_backward(trainer, model, inputs, number):
    """Half of its gradient bypasses accelerator.backward."""
    loss = model(**inputs).loss
    loss.backward()
    return model(**inputs).logits.square().mean(), None


def test_the_row_of_a_batch_includes_the_losss_own_backward(tmp_path):
    case = Case(own_backward)
    recorded = Recorded(case, tmp_path, jd_objectives="batch")
    model = case.build()
    (model(**recorded.inputs).loss + model(**recorded.inputs).logits.square().mean()).backward()
    row = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(recorded.step(None), row) < 1e-10
    assert relative(recorded.gramian, row.square().sum().view(1, 1)) < 1e-10


def test_trainers_may_read_their_collators_attributes(tmp_path):
    class Collator:
        columns = ("labels",)

        def __call__(self, examples):
            return case.collate(examples)

    class Asking(trainer_of(CASES["focal"].loss)):
        def get_train_dataloader(self):
            assert self.data_collator.columns == ("labels",)
            return super().get_train_dataloader()

    case = CASES["focal"]
    cls = type("Ours", (JDTrainerMixin, Asking), {})
    cls(
        case.build(), arguments(tmp_path, max_steps=1), train_dataset=case.examples(4), data_collator=Collator()
    ).train()


def test_training_sets_by_name_are_accepted(tmp_path):
    case = CASES["focal"]

    class Joining(trainer_of(case.loss)):
        def get_train_dataloader(self):
            sets = self.train_dataset
            self.train_dataset = [example for one in sets.values() for example in one]
            try:
                return super().get_train_dataloader()
            finally:
                self.train_dataset = sets

    sets = DatasetDict({name: Dataset.from_list(case.examples(4)) for name in ("first", "second")})
    trainer = trained(case, tmp_path, 8, type("Ours", (JDTrainerMixin, Joining), {}), sets, max_steps=1)
    assert trainer.state.global_step == 1


def after_a_step(second_order: bool) -> Any:
    """Compute the loss after a gradient descent step on the batch, through `functional_call`."""

    def loss(trainer, model, inputs, number):
        parameters = dict(model.named_parameters())
        before = model(**inputs).loss
        slopes = torch.autograd.grad(before, list(parameters.values()), create_graph=second_order, retain_graph=True)
        moved = {name: p - 0.1 * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}
        return before + torch.func.functional_call(model, moved, (), inputs).loss, None

    return loss


def test_parameters_that_a_call_replaces_are_trained(tmp_path):
    case = Case(after_a_step(second_order=False))
    ours = trained(case, tmp_path, 12, optim="sgd", jd_weighting="mean")
    theirs = trained(case, tmp_path, 12, trainer_of(case.loss), optim="sgd")
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


# ---- Errors ----


def refused(directory: Any, match: str, loss: Any = None, cls: Any = None, case: Any = None, **flags: Any) -> None:
    case = case or Case(loss or CASES["focal"].loss)
    trainer = prepared(case, directory, 8, cls, per_device_train_batch_size=8, **flags)
    with pytest.raises(ValueError, match=match):
        trainer.train()


def of_parameters(trainer, model, inputs, number):
    return sum(p.square().sum() for p in model.parameters()), None


def past_forward(trainer, model, inputs, number):
    states = model.bert(inputs["input_ids"]).last_hidden_state
    return F.cross_entropy(model.classifier(states[:, 0]), inputs["labels"]), None


def without_graph(trainer, model, inputs, number):
    outputs = model(**inputs)
    return outputs.loss.detach(), outputs


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [(of_parameters, "none"), (past_forward, "none"), (cached, "none"), (without_graph, r"\[8, 3\]")],
    ids=["parameters", "past-forward", "own-backward", "without-graph"],
)
def test_a_loss_that_does_not_read_the_outputs_is_refused(loss, shapes, tmp_path):
    match = rf"does not depend on the model's outputs .*outputs of shapes {shapes}.*--jd_objectives batch"
    refused(tmp_path, match, loss)


def test_outputs_on_both_sides_of_a_reentrant_checkpoint_are_refused(tmp_path):
    flags = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "max_steps": 1}
    case = CASES["hidden-states"]
    refused(tmp_path, "reentrant .* allows no gradient there: set .*False}, or choose --jd_obj", case.loss, **flags)
    trained(case, tmp_path, 4, jd_objectives="batch", **flags)


class Flat(own_losses.Trunk):
    """A model that returns rows of tokens: [B * T, 3], or [T, B, 3]."""

    def __init__(self, transposed: bool):
        super().__init__(lambda kinds, size: kinds)
        self.transposed = transposed

    def forward(self, input_ids: Tensor) -> Tensor:
        kinds = self.kinds(self.hidden(self.embedding(input_ids)).tanh())
        return kinds.transpose(0, 1) if self.transposed else kinds.flatten(0, 1)


def of_tokens(trainer, model, inputs, number):
    ids = inputs["input_ids"][:, :1].expand(-1, 16)  # 16 tokens: a multiple of the 8 examples.
    return model(ids).square().mean(), None


def of_candidates(trainer, model, inputs, number):
    candidates = inputs["input_ids"]
    labels = torch.arange(len(candidates)) % candidates.shape[1]
    scores = model(input_ids=candidates.flatten(0, 1)).logits[:, 0].view(candidates.shape[:2])
    return F.cross_entropy(scores, labels), None


class Stacked(Case):
    @property
    def collate(self):
        """Collate three candidates per example."""
        return lambda batch: {"input_ids": torch.arange(len(batch) * 12).view(len(batch), 3, 4) % own_losses.VOCABULARY}


def made(build: Any) -> Any:
    return lambda: build().double()


ORDERS = {
    "flat": (Case(of_tokens, made(lambda: Flat(False))), r"\[128, 3\]"),
    "time-first": (Case(of_tokens, made(lambda: Flat(True))), r"\[16, 8, 3\]"),
    "candidates": (Stacked(of_candidates), r"\[24, 3\]"),
}


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("name", ORDERS)
def test_rows_in_an_ambiguous_order_are_refused(name, kind, tmp_path):
    case, shape = ORDERS[name]
    match = rf"8 examples, but the loss reads an output of shape {shape}, whose row n may belong to .*`jd_instances`"
    refused(tmp_path, match, case=case, **kind)


def test_an_order_set_in_jd_instances_is_used(tmp_path):
    class Said(JDTrainerMixin, trainer_of(of_candidates)):
        def jd_instances(self, output, instances):
            return torch.arange(len(output)) // 3

    case = Stacked(of_candidates, lambda: own_losses.classifier(initializer_range=0.3))
    recorded = Recorded(case, tmp_path, cls=Said)
    assert_rows(recorded, *brute(case, case.build(), recorded.inputs, 5, lambda tensor: torch.arange(len(tensor)) // 3))


def test_a_step_that_mixes_instances_through_the_parameters_is_refused(tmp_path):
    refused(tmp_path, "instances of the batch mix", after_a_step(second_order=True))


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_a_separate_backward_is_refused(kind, tmp_path):
    refused(tmp_path, "Ours ran its own backward pass, .*--jd_objectives batch", own_backward, **kind)


@pytest.mark.parametrize("kind", [{}, GROUP, {"jd_objectives": "batch"}], ids=["instance", "group", "batch"])
def test_a_step_without_a_backward_is_refused(kind, tmp_path):
    class Steps(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return torch.zeros(())

    match = r"training step of Ours didn't call accelerator.backward: call it, or super\(\).training_step"
    refused(tmp_path, match, cls=ours_of(CASES["focal"].loss, Steps), **kind)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"jd_normalize": "loss"}, "--jd_normalize loss"),
        ({"jd_weighting": "dwa", **GROUP}, "the weighting `dwa`"),
    ],
    ids=str,
)
def test_flags_that_need_values_are_refused(flags, named, tmp_path):
    refused(tmp_path, f"{named} needs the value of each objective, but the loss of Ours is one for the whole", **flags)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_two_passes_equal_one(kind, accumulation, tmp_path):
    case, updates = CASES["R-Drop"], []
    for backward in ("one_pass", "two_pass"):
        flags = {"jd_backward": backward, "gradient_accumulation_steps": accumulation, "max_steps": 3, **kind}
        updates.append(flat(trained(case, tmp_path, 9, **flags).model))
    assert relative(updates[1], updates[0]) < 1e-9


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_a_penalty_may_be_an_objective(kind, tmp_path):
    case, models = CASES["penalised"], []
    for asked in ("mean", "objective"):
        trainer = trained(case, tmp_path, 8, jd_weighting="mean", jd_extra_losses=asked, max_steps=3, **kind)
        models.append(flat(trainer.model))
    assert trainer.jd_state.names[-1] == "extra"
    assert relative(models[1], models[0]) < 1e-9


def test_a_penalty_is_refused_on_request(tmp_path):
    with pytest.raises(ValueError, match="part that belongs to no token.*--jd_extra_losses mean"):
        trained(CASES["penalised"], tmp_path, 8, jd_extra_losses="error")


def test_batch_objectives_have_no_values(tmp_path):
    match = "--jd_normalize loss needs the value of each objective, but --jd_objectives batch takes one"
    refused(tmp_path, match, cls=JDTrainer, jd_objectives="batch", jd_normalize="loss")


@pytest.mark.parametrize("objectives", ["loss", "instance_loss"])
def test_losses_by_name_are_refused(objectives, tmp_path):
    match = f"--jd_objectives {objectives} weighs several losses by name, but Ours.compute_loss returns one"
    refused(tmp_path, match, jd_objectives=objectives)


def test_unreduced_losses_take_precedence_over_compute_loss(tmp_path):
    class Both(JDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise AssertionError("in training, the unreduced losses count")

        def compute_losses(self, model, inputs):
            return F.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")

    case = CASES["focal"]
    flags = {"jd_normalize": "loss", "max_steps": 1}
    with pytest.raises(AssertionError, match="unreduced losses count"):
        prepared(case, tmp_path, 4, Both, **flags).evaluate(case.examples(4))
    trainer = trained(case, tmp_path, 4, Both, **flags)
    assert trainer.jd_state.losses.isfinite().all()
