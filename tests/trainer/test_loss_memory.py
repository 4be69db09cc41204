"""Autograd stores as many bytes for an unreduced loss as for transformers' loss, to within 10 %."""

from __future__ import annotations

from weakref import WeakSet

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from hf_jd import JDTrainer
from hf_jd.losses import causal_lm
from tests.models import tiny_gpt2
from tests.trainer.runs import arguments, collate, examples

VOCABULARY = 1000


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def kept(loss) -> int:
    """Return the bytes of all storages that autograd holds when the backward of `loss()` begins."""
    saved = WeakSet()

    def pack(tensor):
        holder = Saved(tensor.detach())  # A saved output would hold its own graph.
        saved.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        value = loss()
        stores = [holder.tensor.untyped_storage() for holder in saved]
        value.backward()
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unreduced_losses_store_no_more_for_the_backward(dtype, smoothing):
    torch.manual_seed(0)
    logits = torch.randn(4, 16, VOCABULARY, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (4, 16))
    labels[:, :5] = -100

    def theirs():
        if smoothing:
            return LabelSmoother(smoothing)({"logits": 1 * logits}, labels, shift_labels=True)
        return ForCausalLMLoss(1 * logits, labels, VOCABULARY)

    def ours():
        return causal_lm({"logits": 1 * logits}, {"labels": labels}, torch.nn.Identity(), smoothing)[0].sum()

    reference = kept(theirs)
    assert reference >= labels.numel() * VOCABULARY * torch.float32.itemsize * (0.5 if smoothing else 1)
    assert kept(ours) <= 1.1 * reference


def experts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, router_aux_loss_coef=0.5, **sizes, **experts))


@pytest.mark.parametrize("build", [lambda: tiny_gpt2(vocab_size=VOCABULARY), experts], ids=["gpt2", "experts"])
def test_a_trainers_step_stores_one_set_of_losses(build, tmp_path):
    """The bytes of the model and its unreduced losses: the model's own loss is freed."""
    batch = collate(examples(4))
    model = build()
    trainer = JDTrainer(model, arguments(tmp_path), data_collator=collate)
    trainer.current_gradient_accumulation_steps = 1

    def ours():
        losses, counted = trainer.compute_losses(model, batch)
        return trainer._reduced((losses, counted), None)

    theirs = kept(lambda: model(**batch).loss)
    assert kept(ours) <= 1.1 * theirs
    assert kept(ours) <= 1.1 * theirs
