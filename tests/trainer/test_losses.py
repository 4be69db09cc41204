"""Unreduced losses compared with transformers' reduced ones."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from hf_jd.losses import causal_lm as unreduced
from tests.models import tiny_gpt2, tiny_llama, with_lora


def causal_lm(logits, labels, shift_labels=None, label_smoothing=0.0):
    inputs = {"labels": labels, "shift_labels": shift_labels}
    return unreduced({"logits": logits}, inputs, torch.nn.Identity(), label_smoothing)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :3] = -100
    labels[2, 4:] = -100
    return logits, labels


def test_the_sum_equals_the_models_loss(batch):
    logits, labels = batch
    losses, counted = causal_lm(logits, labels)
    assert (losses[~counted] == 0).all()
    torch.testing.assert_close(losses.sum() / counted.sum(), ForCausalLMLoss(logits, labels, 11))
    torch.testing.assert_close(losses.sum() / 7, ForCausalLMLoss(logits, labels, 11, num_items_in_batch=7))


def test_the_sum_equals_the_label_smoothers(batch):
    logits, labels = batch
    losses, counted = causal_lm(logits, labels, label_smoothing=0.3)
    smoothed = LabelSmoother(0.3)({"logits": logits}, labels, shift_labels=True)
    torch.testing.assert_close(losses.sum() / counted.sum(), smoothed)


def test_labels_may_already_be_shifted(batch):
    logits, labels = batch
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    for ours, theirs in zip(causal_lm(logits, labels, shifted), causal_lm(logits, labels), strict=True):
        assert torch.equal(ours, theirs)


def test_virtual_tokens_come_before_the_labels(batch):
    logits, labels = batch
    # Like PEFT: the prompt's labels are ignored, and its last token predicts the first real token.
    longer = torch.cat([torch.full((3, 2), -100), labels], dim=1)
    prompted = torch.cat([torch.randn(3, 2, 11), logits], dim=1)
    for ours, theirs in zip(causal_lm(prompted, labels), causal_lm(prompted, longer), strict=True):
        assert torch.equal(ours, theirs)


def test_logits_that_do_not_match_the_labels_are_refused(batch):
    logits, labels = batch
    with pytest.raises(ValueError, match="don't belong to labels"):
        causal_lm(logits[:2], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_log_probabilities_are_read_from_the_models_graph(make, dtype, monkeypatch):
    model = with_lora(make()).to(dtype)
    batch = {"input_ids": torch.randint(3, 37, (2, 6)), "labels": torch.randint(3, 37, (2, 6))}
    outputs = model(**batch)
    expected = unreduced({"logits": outputs.logits.detach()}, batch, model, 0.0)
    monkeypatch.setattr(torch.nn.functional, "log_softmax", None)  # called for whatever isn't read
    for read, computed in zip(unreduced(outputs, batch, model, 0.0), expected, strict=True):
        torch.testing.assert_close(read, computed)


def test_log_probabilities_of_other_logits_are_not_read(batch):
    logits, labels = batch
    logits.requires_grad_()
    others = (logits * 2).view(-1, 11)
    loss = torch.nn.functional.cross_entropy(others, labels.flatten())
    read, _ = unreduced({"logits": logits, "loss": loss}, {"labels": labels}, torch.nn.Identity(), 0.0)
    assert torch.equal(read, causal_lm(logits, labels)[0])
