"""Several named losses as objectives, of batches or instances, and the part that belongs to no token as one more."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer
from hf_jd.losses import causal_lm
from tests.models import tiny_gpt2
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_any
from tests.trainer.test_extra_losses import mixtral

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
KINDS = ["loss", "instance_loss"]


def two_losses(model, inputs):
    """Return the cross-entropy of the tokens, and the size of each instance's logits."""
    outputs = model(**inputs)
    mask = inputs["attention_mask"].to(outputs.logits.dtype)
    size = (outputs.logits.square().mean(2) * mask).sum(1) / mask.sum(1)
    return {"nll": causal_lm(outputs, inputs, model, 0.0), "size": size}


class Two(JDTrainer):
    def compute_losses(self, model, inputs):
        return two_losses(model, inputs)


class Whole(JDTrainer):
    """A trainer that returns batch means instead."""

    def compute_losses(self, model, inputs):
        (nll, counted), size = two_losses(model, inputs).values()
        return {"nll": nll[counted].mean(), "size": size.mean()}


class StockTwo(Trainer):
    """The sum of both means."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        (nll, counted), size = two_losses(model, inputs).values()
        return nll[counted].mean() + size.mean()


def in_order(cls):
    """Visit the examples in order."""
    return type(
        "InOrder", (cls,), {"_get_train_sampler": lambda self, data=None: torch.utils.data.SequentialSampler(data)}
    )


def started(**settings):
    return lora("gpt2", warm=True, **settings)


@pytest.mark.parametrize("flags", [{}, {"optim": "sgd", "learning_rate": 0.1}, {"jd_backward": "two_pass"}], ids=str)
@pytest.mark.parametrize(("kind", "cls"), [("loss", Two), ("loss", Whole), ("instance_loss", Two)])
def test_mean_equals_the_sum_of_the_losses(kind, cls, flags, tmp_path):
    stock = {key: value for key, value in flags.items() if not key.startswith("jd_")}
    theirs = run(started(), arguments(tmp_path, TrainingArguments, **stock), examples(8), StockTwo)
    ours = run(started(), arguments(tmp_path, jd_weighting="mean", jd_objectives=kind, **flags), examples(8), cls)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert relative(logged(ours, "grad_norm"), logged(theirs, "grad_norm")) < 1e-5
    assert ours.jd_state.names == (["nll", "size"] if kind == "loss" else ["0/nll", "1/nll", "0/size", "1/size"])


def brute_force(data, kind):
    """Compute the objectives and their rows, in one batch of all examples."""
    model, batch = started(), collate(data)
    (nll, counted), size = two_losses(model, batch).values()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "loss":
        objectives = [2 * nll[counted].mean(), 2 * size.mean()]
    else:
        labelled = counted.any(1)
        m = int(labelled.sum()) + len(data)
        objectives = [m * x.sum() / counted.sum() for x in nll[labelled]] + [m * x / len(data) for x in size]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)]) for x in objectives]
    return torch.stack([x.detach() for x in objectives]), torch.stack(rows)


@pytest.mark.parametrize("sizes", [(6, 1), (4, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_equals_brute_force_whatever_the_accumulation(kind, sizes, tmp_path):
    size, accumulation = sizes
    data = examples(6, unlabelled=(4,))
    flags = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    objectives, rows = brute_force(data, kind)
    seen = []

    def weighting(gramian):
        seen.append(gramian)
        return torch.linspace(0.5, 2, len(gramian), dtype=torch.float64)

    args = arguments(tmp_path, jd_objectives=kind, **flags, **SGD)
    ours = run(started(), args, data, in_order(Two), weighting=weighting)
    order = _as_one_batch(ours.jd_state.names, kind)
    assert relative(seen[0][order][:, order], rows @ rows.T) < 1e-6
    assert relative(ours.jd_state.losses[order], objectives) < 1e-6
    step = (flat(started()) - flat(ours.model)) / 0.1
    assert relative(step, weighting(seen[0])[order] @ rows) < 1e-6


def _as_one_batch(names, kind):
    """Reorder the objectives of accumulated micro-batches as in one batch: by loss, then by instance."""
    if kind == "loss":
        return [0, 1]
    pairs = [name.split("/") for name in names]
    # Instance 4 has no tokens that count, so it has only one of the two losses.
    return sorted(range(len(names)), key=lambda i: (pairs[i][1], int(pairs[i][0])))


@pytest.mark.parametrize("kind", KINDS)
def test_upgrad_is_the_same_over_accumulation_and_two_passes(kind, tmp_path):
    data, models = examples(7), []
    for flags in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "jd_backward": "two_pass"},
    ):
        args = arguments(tmp_path, jd_objectives=kind, **flags)
        models.append(run(started(), args, data, in_order(Two)).model)
    for other in models[1:]:
        assert relative(flat(other), flat(models[0])) < 1e-6
    stock = run(
        started(), arguments(tmp_path, TrainingArguments, per_device_train_batch_size=6), data, in_order(StockTwo)
    )
    assert relative(flat(stock.model), flat(models[0])) > 1e-4


def test_losses_are_named_in_the_log(tmp_path):
    ours = run(started(), arguments(tmp_path, jd_objectives="loss"), examples(), Two)
    for key in ("weight", "against", "loss", "grad_norm"):
        assert len(logged(ours, f"jd/{key}/nll")) == len(logged(ours, f"jd/{key}/size")) == 4
    total = logged(ours, "jd/loss/nll") + logged(ours, "jd/loss/size")
    assert relative(total, logged(ours, "loss")) < 1e-6


def test_groups_and_losses_are_both_logged(tmp_path):
    args = arguments(tmp_path, jd_objectives="instance_loss", jd_group_column="task", per_device_train_batch_size=6)
    ours = run(started(), args, examples(), Two)
    assert {"jd/weight/nll", "jd/weight/size", "jd/weight/code", "jd/loss/docs"} <= ours.state.log_history[0].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nonfinite_loss_is_left_out(kind, tmp_path):
    data = examples(8)

    class Broken(Two):
        def compute_losses(self, model, inputs):
            losses = super().compute_losses(model, inputs)
            bad = (inputs["input_ids"][:, :4] == torch.tensor(data[3]["input_ids"][:4])).all(1)
            return {**losses, "size": losses["size"] * torch.where(bad, torch.inf, 1.0)}

    args = arguments(tmp_path, jd_objectives=kind, per_device_train_batch_size=4, max_steps=2)
    ours = run(started(), args, data, in_order(Broken))
    assert flat(ours.model).isfinite().all()
    assert logged(ours, "jd/non_finite").tolist() == [1, 0]
    assert ours.jd_state.names[:1] == (["nll"] if kind == "loss" else ["0/nll"])


def test_a_nonfinite_batch_loss_is_left_out(tmp_path):
    class Broken(Whole):
        def compute_losses(self, model, inputs):
            losses = super().compute_losses(model, inputs)
            return {**losses, "size": losses["size"] * torch.nan}

    ours = run(started(), arguments(tmp_path, jd_objectives="loss"), examples(8), Broken)
    assert flat(ours.model).isfinite().all()
    assert ours.jd_state.names == ["nll"]
    assert logged(ours, "jd/non_finite").tolist() == [1, 1, 1, 1]


class Answering(nn.Module):
    """A model that returns its losses by name."""

    def __init__(self):
        super().__init__()
        self.gpt2 = tiny_gpt2()

    def forward(self, input_ids, attention_mask, labels, **kwargs):
        logits = self.gpt2(input_ids=input_ids, attention_mask=attention_mask).logits
        nll, counted = causal_lm({"logits": logits}, {"labels": labels}, self, 0.0)
        size = logits.square().mean((1, 2))
        return {"loss": nll[counted].mean() + size.mean(), "losses": {"nll": (nll, counted), "size": size}}


@pytest.mark.filterwarnings("ignore:.*further passes now")
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_may_return_losses_by_name(kind, tmp_path):
    models = [Answering(), Answering()]
    theirs = run(models[0], arguments(tmp_path, TrainingArguments))
    ours = run(models[1], arguments(tmp_path, jd_weighting="mean", jd_objectives=kind))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert len(ours.jd_state.names) == (2 if kind == "loss" else 4)


def test_a_loss_function_may_return_losses_by_name(tmp_path):
    def function(outputs, labels, num_items_in_batch=None):
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), shifted, reduction="none")
        return {"nll": (losses, shifted != -100), "size": outputs.logits.square().mean()}

    args = arguments(tmp_path, jd_objectives="loss", eval_strategy="steps", eval_steps=2)
    ours = run(started(), args, compute_loss_func=function, eval_dataset=examples(2))
    assert ours.jd_state.names == ["nll", "size"]
    assert logged(ours, "eval_loss").isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_start_and_end_are_losses_of_question_answering(kind, accumulation, tmp_path):
    task = TABLE["question-answering"]
    data, flags = examples_of(task, 22), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    stripped = [{key: value for key, value in example.items() if key != "task"} for example in data]
    theirs = run(
        model_of(task, True), arguments(tmp_path, TrainingArguments, **flags), stripped, data_collator=collate_any
    )
    args = arguments(tmp_path, jd_weighting="mean", jd_objectives=kind, **flags)
    ours = run(model_of(task, True), args, stripped, data_collator=collate_any)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert {name.split("/")[-1] for name in ours.jd_state.names} == {"start", "end"}


EXTRA = {
    "instance": {},
    "group": {"jd_objectives": "group", "jd_group_column": "task"},
    "group-means": {"jd_objectives": "group", "jd_group_column": "task", "jd_group_reduction": "mean"},
    "loss": {"jd_objectives": "loss"},
    "two-pass": {"jd_backward": "two_pass"},
}


@pytest.mark.filterwarnings("ignore:.*backward pass")
@pytest.mark.filterwarnings("ignore:.*further passes now")
@pytest.mark.parametrize("kind", EXTRA)
def test_a_balancing_loss_may_be_an_objective(kind, tmp_path):
    flags = {"per_device_train_batch_size": 4, "max_steps": 3}
    ours = run(mixtral(), arguments(tmp_path, jd_weighting="mean", jd_extra_losses="objective", **flags, **EXTRA[kind]))
    names = ours.jd_state.names
    assert names[-1] == "aux_loss"
    assert names.count("aux_loss") == 1
    assert len(ours.jd_state.gramian) == len(names) > 1
    assert ours.jd_state.gramian[-1, -1] > 0
    assert logged(ours, "jd/weight/aux_loss").isfinite().all()
    if kind != "group-means":
        theirs = stock(mixtral(), tmp_path, **flags)
        assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
        assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


@pytest.mark.filterwarnings("ignore:.*backward pass")
@pytest.mark.filterwarnings("ignore:.*further passes now")
@pytest.mark.parametrize("kind", EXTRA)
def test_a_balancing_loss_is_one_objective_over_accumulation(kind, tmp_path):
    """The micro-batches' balancing losses form one objective, since Trainer adds them up."""
    data, flags = examples(2) * 3, {"gradient_accumulation_steps": 3, "max_steps": 1, **SGD}
    args = arguments(tmp_path, jd_weighting="mean", jd_extra_losses="objective", **flags, **EXTRA[kind])
    ours = run(mixtral(), args, data, in_order(JDTrainer))
    m = len(ours.jd_state.names)
    assert m == {"instance": 7, "two-pass": 7, "loss": 2}.get(kind, m)
    if kind == "group-means":
        return
    theirs = run(mixtral(), arguments(tmp_path, TrainingArguments, **flags), data, in_order(Trainer))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert ours.jd_state.losses.mean().item() == pytest.approx(logged(theirs, "loss")[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("returned", "flags", "message"),
    [
        (
            lambda a, b: {"a": a},
            {"jd_objectives": "loss"},
            "only one loss .`a`.*compute_losses.*jd_extra_losses objective",
        ),
        (lambda a, b: a, {"jd_objectives": "loss"}, "only one loss .`loss`"),
        (lambda a, b: {"a": a, "b": b}, {}, "several losses .`a`, `b`.*--jd_objectives instance takes one"),
        (
            lambda a, b: {"a": a.mean(), "b": b},
            {"jd_objectives": "instance_loss"},
            "`a` is one loss for the whole batch",
        ),
        (lambda a, b: a.mean(), {}, "`loss` is one loss for the whole batch"),
        (lambda a, b: {}, {"jd_objectives": "loss"}, "an empty dict"),
        (lambda a, b: {"a": a, "b": 3.0}, {"jd_objectives": "loss"}, "`b` is float; give a tensor"),
        (lambda a, b: {"a": a, "b": (b, b, b)}, {"jd_objectives": "loss"}, "`b` is tuple; give a tensor"),
        (lambda a, b: {"a": a, "b": (b, b[:1] > 0)}, {"jd_objectives": "loss"}, "`b` has shape .2., and its mask"),
        (lambda a, b: {"a": a, "b": b[:1]}, {"jd_objectives": "loss"}, "different numbers of instances"),
    ],
)
def test_bad_losses_are_refused(returned, flags, message, tmp_path):
    class Bad(JDTrainer):
        def compute_losses(self, model, inputs):
            (nll, counted), size = two_losses(model, inputs).values()
            return returned((nll * counted).sum(1), size)

    before = started()
    with pytest.raises(ValueError, match=message):
        run(before, arguments(tmp_path, **flags), cls=Bad)
    assert torch.equal(flat(before), flat(started()))


def test_losses_that_change_their_names_are_refused(tmp_path):
    class Changing(Two):
        def compute_losses(self, model, inputs):
            nll, size = super().compute_losses(model, inputs).values()
            return {"nll": nll, f"size {self.state.global_step}": size}

    with pytest.raises(ValueError, match=r"The losses were `nll`, `size 0`, but in another batch they are .*`size 1`"):
        run(started(), arguments(tmp_path, jd_objectives="loss"), cls=Changing)


def test_a_group_column_with_batch_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave out --jd_group_column"):
        arguments(tmp_path, jd_objectives="loss", jd_group_column="task")
