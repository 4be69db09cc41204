"""A user's own `training_step`: several backward passes for one batch, and `.grad` in between."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer, JDTrainerMixin
from tests.trainer.own_losses import CASES, prepared, trained, trainer_of
from tests.trainer.runs import arguments, flat, joined, logged, lora, relative, run
from tests.trainer.split_runs import GROUP, Recorded, assert_rows, grouped

# Positions [1, T] belong to no instance.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")
BATCH = {"jd_objectives": "batch"}
KINDS = pytest.mark.parametrize("kind", [{}, GROUP, BATCH], ids=["instance", "group", "batch"])


class Adversarial(trainer_of(CASES["focal"].loss)):
    """Adds the loss at embeddings that were moved along their gradient so far (FGM)."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs, weight = self._prepare_inputs(inputs), model.get_input_embeddings().weight
        loss = self.descend(model, inputs)
        before = weight.detach().clone()
        weight.data.add_(0.1 * weight.grad / weight.grad.norm())
        self.descend(model, inputs)
        weight.data.copy_(before)
        return loss

    def descend(self, model, inputs):
        loss = self.compute_loss(model, dict(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class Restarted(Adversarial):
    """Discards the first gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        self.descend(model, inputs)
        model.zero_grad()
        return self.descend(model, inputs)


class Clipped(Adversarial):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.descend(model, self._prepare_inputs(inputs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss


class Other(Adversarial):
    """The second loss has no part of the first example."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        self.descend(model, inputs)
        self.accelerator.backward(model(**inputs).logits[1:].square().mean())
        return torch.zeros(())


class OneGraph(Adversarial):
    def training_step(self, model, inputs, num_items_in_batch=None):
        outputs = model(**self._prepare_inputs(inputs))
        self.accelerator.backward(outputs.loss, retain_graph=True)
        self.accelerator.backward(outputs.logits.square().mean())
        return outputs.loss.detach()


class Inspected(Adversarial):
    """Differentiates the loss again after its backward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        outputs = model(**self._prepare_inputs(inputs))
        self.accelerator.backward(outputs.loss, retain_graph=True)
        self.slope = torch.autograd.grad(outputs.loss, model.get_input_embeddings().weight)[0]
        return outputs.loss.detach()


def ours(theirs):
    return type("Ours", (JDTrainerMixin, theirs), {})


@KINDS
@pytest.mark.parametrize("theirs", [Adversarial, OneGraph, Inspected])
def test_mean_is_trainer_with_two_backwards(theirs, kind, tmp_path):
    flags = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_steps": 3}
    stock = trained(CASES["focal"], tmp_path, 12, theirs, **flags)
    trainer = trained(CASES["focal"], tmp_path, 12, ours(theirs), jd_weighting="mean", **kind, **flags)
    assert relative(flat(trainer.model), flat(stock.model)) < 1e-10
    assert relative(logged(trainer, "loss"), logged(stock, "loss")) < 1e-6


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_rows_of_two_backwards_are_added(kind, tmp_path):
    case = CASES["focal"]
    recorded = Recorded(case, tmp_path, cls=ours(Adversarial), **kind)
    model, parts = case.build(), []
    moved = deepcopy(model)

    def losses(of):
        each = ({key: value[i : i + 1] for key, value in recorded.inputs.items()} for i in range(5))
        return [case.loss(None, of, one, None)[0] / 5 for one in each]

    sum(losses(moved)).backward()
    weight = moved.get_input_embeddings().weight
    weight.data.add_(0.1 * weight.grad / weight.grad.norm())
    for of in (model, moved):
        parameters = list(of.parameters())
        found = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses(of)]
        parts.append(torch.stack([joined(gradients, parameters) for gradients in found]))
    rows = sum(parts)
    assert_rows(recorded, grouped(rows, recorded) if kind else rows)


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_rows_of_two_losses_of_one_graph_are_added(kind, tmp_path):
    recorded = Recorded(CASES["focal"], tmp_path, cls=ours(OneGraph), **kind)
    model = CASES["focal"].build()
    parameters = list(model.parameters())
    outputs = model(**{key: value for key, value in recorded.inputs.items() if key != "labels"})
    losses = F.cross_entropy(outputs.logits, recorded.inputs["labels"], reduction="none")
    losses = (losses + outputs.logits.square().mean(1)) / len(losses)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    rows = torch.stack([joined(each, parameters) for each in gradients])
    assert_rows(recorded, grouped(rows, recorded) if kind else rows)


@pytest.mark.parametrize(
    "theirs, flags, match",
    [
        (Restarted, {}, r"Ours ran its own backward pass, .* or changed `\.grad` in its training_step"),
        (Clipped, {}, r"Ours ran its own backward pass, .* or changed `\.grad` in its training_step"),
        (Other, {}, "Ours called accelerator.backward 2 times for one batch.*the sum of the losses"),
        (Adversarial, {"jd_backward": "two_pass"}, "called accelerator.backward 2 times .*--jd_backward one_pass"),
        (Adversarial, {"jd_warmup_steps": 1}, "called accelerator.backward 2 times .*without .*--jd_warmup_steps"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_add_up_is_refused(theirs, flags, match, tmp_path):
    trainer = prepared(CASES["focal"], tmp_path, 6, ours(theirs), max_steps=1, **flags)
    with pytest.raises(ValueError, match=match):
        trainer.train()


class Once(Adversarial):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.descend(model, self._prepare_inputs(inputs))


def test_rows_of_batches_do_not_include_those_before(tmp_path):
    case, gradients = CASES["focal"], []
    for part in (slice(0, 4), slice(4, 8)):
        model = case.build()
        batch = case.collate([{k: v for k, v in e.items() if k != "task"} for e in case.examples(8)[part]])
        case.loss(None, model, batch, None)[0].backward()
        gradients.append(joined([p.grad for p in model.parameters()], model.parameters()))
    rows = torch.stack(gradients)
    flags = {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 4, **BATCH}
    trainer = trained(case, tmp_path, 8, ours(Once), train_sampling_strategy="sequential", **flags)
    assert relative(trainer.jd_state.gramian, rows @ rows.T) < 1e-10


# ---- `.grad` ----


class Scaled:
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= 2
        return loss


class Penalised:
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.norm = torch.autograd.grad(
            model(**self._prepare_inputs(inputs)).loss, [p for p in model.parameters() if p.requires_grad]
        )[0].norm()
        return super().training_step(model, inputs, num_items_in_batch)


class Watching:
    """Reads `.grad`, inside the mixin's step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.norms = [
            *getattr(self, "norms", []),
            sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None),
        ]
        return loss


@pytest.mark.parametrize("theirs, warns", [(Scaled, True), (Penalised, False)])
def test_a_step_around_the_mixins_that_uses_grad_is_warned(theirs, warns, tmp_path, caplog):
    ours = type("Ours", (theirs, JDTrainer), {})
    run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", max_steps=1), cls=ours)
    assert ("training_step uses `.grad`" in caplog.text) == warns


@pytest.mark.parametrize("flags", [{}, {"jd_monitor_every": 2}], ids=["measured", "at times"])
def test_a_step_inside_the_mixins_reads_trainers_gradients(flags, tmp_path, caplog):
    common = {"optim": "sgd", "gradient_accumulation_steps": 2, "max_steps": 2}
    theirs = type("Theirs", (Watching, Trainer), {})
    expected = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **common), cls=theirs)
    args = arguments(tmp_path, jd_weighting="mean", **flags, **common)
    trainer = run(lora("gpt2"), args, cls=type("Ours", (JDTrainerMixin, theirs), {}))
    assert len(trainer.norms) == 4
    assert relative(torch.stack(trainer.norms), torch.stack(expected.norms)) < 1e-10
    assert "training_step uses `.grad`" not in caplog.text
