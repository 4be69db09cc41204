"""A split loss that isn't finite for some instance: the other instances' rows are right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.models import tiny_llama
from tests.trainer.own_losses import CASES, Case
from tests.trainer.runs import lora
from tests.trainer.split_runs import (
    GROUP,
    Recorded,
    assert_rows,
    brute,
    grouped,
)

# GPT-2's positions [1, T] belong to no instance; heads are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


def spoiled(trainer, model, inputs, number):
    """Make the third example's loss NaN; the others are unchanged."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    return (losses * torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0]).double()).mean(), outputs


def spoiled_inside(trainer, model, inputs, number):
    """Make the model itself compute infinities for the third example."""
    factors = torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0]).double()[:, None, None]
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")) * factors
    labels = inputs.pop("labels")
    outputs = model(inputs_embeds=embedded, **inputs)
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]), outputs


def plain(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits, labels, reduction="none").mean(), outputs


def plain_text(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]), outputs


SPOILED = {
    "loss": (Case(spoiled), Case(plain), 1e-10),
    "lora": (*(Case(f, lambda: lora("gpt2", warm=True), text=True) for f in (spoiled_inside, plain_text)), 1e-10),
    # Llama's norms compute in float32.
    "full": (*(Case(f, tiny_llama, text=True) for f in (spoiled_inside, plain_text)), 1e-6),
}


@pytest.mark.parametrize("keep", ["true", "false"])
@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("name", SPOILED)
def test_a_nonfinite_instance_is_left_out(name, kind, keep, tmp_path):
    case, healthy, tolerance = SPOILED[name]
    recorded = Recorded(case, tmp_path, jd_check=False, jd_keep_rows=keep, **kind)
    rows, _ = brute(healthy, healthy.build(), recorded.inputs, 5)
    rows[2] = 0
    rows = grouped(rows, recorded) if kind else rows
    assert_rows(recorded, rows[rows.norm(dim=1) > 0], tolerance=tolerance)
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 1


def test_an_infinity_that_reaches_all_rows_makes_no_step(tmp_path):
    # BERT's positions [1, T] have one gradient for all instances, in which 0 times NaN is NaN.
    def inside(trainer, model, inputs, number):
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        factors = torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0]).double()[:, None, None]
        outputs = model(inputs_embeds=embedded * factors, attention_mask=inputs["attention_mask"])
        return F.cross_entropy(outputs.logits, inputs["labels"]), outputs

    recorded = Recorded(Case(inside), tmp_path, jd_check=False)
    assert recorded.step(None).norm() == 0
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 5


def test_a_loss_that_spreads_infinities_makes_no_step(tmp_path):
    def all_of_them(trainer, model, inputs, number):
        loss, outputs = CASES["contrastive"].loss(trainer, model, inputs, number)
        return loss * torch.nan, outputs

    recorded = Recorded(Case(all_of_them), tmp_path, jd_check=False)
    assert recorded.step(None).norm() == 0
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 5


@pytest.mark.parametrize("kind", [{}, GROUP, {"jd_objectives": "batch"}], ids=["instance", "group", "batch"])
def test_a_gradient_scaler_sees_a_split_losss_overflow(kind, tmp_path):
    recorded = Recorded(Case(spoiled), tmp_path, jd_check=False, **kind)
    recorded.trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert not recorded.step(None).isfinite().any()
