"""A loss that calls the model on parts of the batch: example by example, in halves, on some examples."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.trainer.own_losses import Case, trained, trainer_of
from tests.trainer.runs import flat, relative
from tests.trainer.split_runs import GROUP, Recorded, assert_rows, brute, grouped

# Positions [1, T] belong to no instance.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


def whole(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    return F.cross_entropy(model(**inputs).logits, labels), None


def in_parts(*bounds):
    """Return the same loss, from calls on the examples between the bounds."""

    def loss(trainer, model, inputs, number):
        labels = inputs.pop("labels")
        ends = [*bounds, len(labels)]
        parts = [{key: value[a:b] for key, value in inputs.items()} for a, b in zip([0, *bounds], ends, strict=True)]
        return F.cross_entropy(torch.cat([model(**part).logits for part in parts]), labels), None

    return loss


def trimmed(trainer, model, inputs, number):
    """Call the model once per example, without its padding."""
    labels, losses = inputs.pop("labels"), []
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        logits = model(**{key: value[i : i + 1, :length] for key, value in inputs.items()}).logits
        losses.append(F.cross_entropy(logits, labels[i : i + 1]))
    return torch.stack(losses).mean(), None


def twice(trainer, model, inputs, number):
    """Call the model on each half twice, and on all at the end."""
    losses = [in_parts(2)(trainer, model, dict(inputs), number)[0] for _ in range(2)]
    return sum(losses) + whole(trainer, model, inputs, number)[0], None


def some(trainer, model, inputs, number):
    """Skip some examples."""
    labels = inputs.pop("labels")
    mine = [i for i in range(len(labels)) if labels[i] != labels[0]]
    logits = [model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits for i in mine]
    return F.cross_entropy(torch.cat(logits), labels[mine], reduction="sum") / len(labels), None


def some_of_all(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
    return (losses * (labels != labels[0])).mean(), None


def three_times(trainer, model, inputs, number):
    return 3 * whole(trainer, model, inputs, number)[0], None


LOSSES = {
    "one by one": (in_parts(1, 2, 3, 4), whole),
    "one by one, trimmed": (trimmed, whole),
    "halves": (in_parts(3), whole),
    "the first alone": (in_parts(1), whole),
    "twice": (twice, three_times),
    "some": (some, some_of_all),
}


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_those_of_one_call(name, kind, tmp_path):
    loss, together = LOSSES[name]
    case, recorded = Case(loss), Recorded(Case(loss), tmp_path, **kind)
    rows, _ = brute(Case(together), case.build(), recorded.inputs, 5)
    rows = grouped(rows, recorded) if kind else rows
    assert_rows(recorded, rows[rows.norm(dim=1) > 0])


@pytest.mark.parametrize("backward", ["one_pass", "two_pass"])
def test_mean_is_trainer(backward, tmp_path):
    case, flags = Case(trimmed), {"gradient_accumulation_steps": 2, "optim": "sgd"}
    stock = trained(case, tmp_path, 12, trainer_of(case.loss), **flags)
    ours = trained(case, tmp_path, 12, jd_weighting="mean", jd_backward=backward, **flags, **GROUP)
    assert relative(flat(ours.model), flat(stock.model)) < 1e-10


def picked(*examples):
    def loss(trainer, model, inputs, number):
        labels = inputs.pop("labels")
        logits = model(**{key: value[list(examples)] for key, value in inputs.items()}).logits
        return F.cross_entropy(logits, labels[list(examples)]), None

    return loss


@pytest.mark.parametrize("examples", [(3, 1), (0, 2)])
def test_examples_in_another_order_are_refused(examples, tmp_path):
    with pytest.raises(ValueError, match=r"5 examples, but the loss reads outputs of \[2\] rows.*`jd_instances`"):
        Recorded(Case(picked(*examples)), tmp_path).step(None)


def test_equal_examples_are_refused_where_it_is_unclear_which_one_was_meant(tmp_path):
    case = Case(picked(2))
    data = [dict(case.examples(1)[0], labels=i % 3) for i in range(5)]
    with pytest.raises(ValueError, match=r"5 examples, but the loss reads outputs of \[1\] rows"):
        Recorded(case, tmp_path, data=data).step(None)
