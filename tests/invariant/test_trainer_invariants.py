"""Configurations that must give one trajectory: mean as Trainer, accumulation as one big batch, two passes as one.

The models compute in float64 up to their logits. GPT-2's tolerance is 1e-10; Llama's norms compute in float32, in which
a repeated computation agrees with itself only to 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer
from hf_jd.gramian import Engine
from tests.marks import slow
from tests.models import tiny_gpt2
from tests.releases import needs
from tests.trainer.runs import arguments, examples, flat, logged, lora, relative, run, stock

TOLERANCES = {"gpt2": 1e-10, "llama": 1e-6}
KINDS = {"instance": {"jd_objectives": "instance"}, "group": {"jd_objectives": "group", "jd_group_column": "task"}}


@pytest.fixture
def jacobians(monkeypatch):
    """Count the computed Jacobians: a mean that takes a short cut would prove nothing."""
    seen = []
    compute = Engine.compute_jacobian
    monkeypatch.setattr(Engine, "compute_jacobian", lambda *a, **k: seen.append(compute(*a, **k)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mean_equals_trainer(name, accumulation, kind, tmp_path, jacobians):
    # Seven batches per epoch: with accumulation 3, every third update has only one micro-batch.
    flags = {"gradient_accumulation_steps": accumulation, "max_steps": 20, "max_grad_norm": 1e9, "weight_decay": 0.1}
    # Initial weights differ between releases.
    flags["max_grad_norm"] = logged(stock(lora(name), tmp_path, **flags), "grad_norm").median().item()
    theirs = stock(lora(name), tmp_path, **flags)
    ours = run(lora(name), arguments(tmp_path, jd_weighting="mean", **flags, **KINDS[kind]))
    assert relative(flat(ours.model), flat(theirs.model)) < TOLERANCES[name]
    assert (flat(theirs.model) - flat(lora(name))).abs().max() > 1e-3
    norms = logged(theirs, "grad_norm")
    assert 0 < (norms > flags["max_grad_norm"]).sum() < len(norms), "some steps are to be clipped, and some not"
    assert relative(logged(ours, "grad_norm"), norms) < 10 * TOLERANCES[name]
    # The losses themselves are float32, summed in a different order.
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert ours.state.total_flos == theirs.state.total_flos
    assert len(jacobians) >= 20
    assert len(ours.jd_state.gramian) > 1


@pytest.mark.parametrize("kind", [slow("instance"), "group"])
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            {"label_smoothing_factor": 0.1},
            marks=needs("transformers", "5.15", "the number of items to the label smoother"),
        ),
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"max_grad_norm": 0.0},
        {"torch_empty_cache_steps": 1},
        {"neftune_noise_alpha": 5.0},
        {"include_num_input_tokens_seen": "non_padding"},
        {"gradient_checkpointing": True},
        {"jd_scope": "micro_batch"},
        {"jd_backward": "two_pass"},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_mean_equals_trainer_with_flags(flags, kind, tmp_path):
    flags = {"gradient_accumulation_steps": 3, "max_steps": 6, **flags}
    jd_flags = {key: flags.pop(key) for key in list(flags) if key.startswith("jd_")}
    theirs = stock(lora("gpt2"), tmp_path, **flags)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags, **jd_flags, **KINDS[kind]))
    # Trainer's label smoother divides in float32, in a different order.
    tolerance = 1e-6 if "label_smoothing_factor" in flags else 1e-10
    assert relative(flat(ours.model), flat(theirs.model)) < tolerance
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


@pytest.mark.filterwarnings("ignore:.*further passes now")  # GPT-2's positions: [1, T]
@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_trainer_in_full_fine_tuning_with_dropout(kind, tmp_path):
    flags = {"gradient_accumulation_steps": 2, "max_steps": 6}
    theirs = stock(tiny_gpt2(dropout=0.2), tmp_path, **flags)
    ours = run(tiny_gpt2(dropout=0.2), arguments(tmp_path, jd_weighting="mean", **flags, **KINDS[kind]))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_trainer_if_the_model_takes_no_token_count(kind, scope, tmp_path, monkeypatch):
    # Trainer then averages the means of the micro-batches, whatever their numbers of tokens.
    monkeypatch.setattr("transformers.GPT2LMHeadModel.accepts_loss_kwargs", False, raising=False)
    flags = {"gradient_accumulation_steps": 3, "max_steps": 6}
    theirs = stock(lora("gpt2"), tmp_path, **flags)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", jd_scope=scope, **flags, **KINDS[kind]))
    # A mean of float32 losses and a sum of quotients round differently.
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


def means(model, inputs, divide_by=None):
    """Average each instance's squared logits over its length; return these, or their sum over a number."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    losses = (logits.square().mean(-1) * inputs["attention_mask"]).sum(1) / inputs["attention_mask"].sum(1)
    return losses if divide_by is None else losses.sum() / divide_by


class TheirMeans(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return means(model, inputs).mean()


class OurMeans(JDTrainer):
    loss_is_scaled_for_ga = False

    def compute_losses(self, model, inputs):
        return means(model, inputs)


class TheirShares(Trainer):
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args):
        batches, number = super().get_batch_samples(*args)
        self.instances = sum(len(batch["labels"]) for batch in batches)
        return batches, number

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return means(model, inputs, self.instances)


class OurShares(OurMeans):
    loss_is_scaled_for_ga = True


@needs("transformers", "5.19", "loss_is_scaled_for_ga")
@pytest.mark.parametrize("accepts", [slow(True), False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("theirs", "ours"), [(TheirMeans, OurMeans), (TheirShares, OurShares)])
def test_mean_equals_a_trainer_that_sets_its_loss_scale(theirs, ours, kind, accepts, tmp_path, monkeypatch):
    # 13 examples: the last update of an epoch has micro-batches of 2, 2, 2 and 1, or only of 1.
    monkeypatch.setattr("transformers.GPT2LMHeadModel.accepts_loss_kwargs", accepts, raising=False)
    flags = {"gradient_accumulation_steps": 4, "max_steps": 6}
    theirs = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), examples(13), theirs)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags, **KINDS[kind]), examples(13), ours)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_trainer_in_bfloat16(kind, tmp_path):
    theirs = stock(lora("llama").float(), tmp_path, bf16=True)
    ours = run(lora("llama").float(), arguments(tmp_path, jd_weighting="mean", bf16=True, **KINDS[kind]))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-3
    assert relative(flat(theirs.model), flat(lora("llama").float())) > 1e-2


class Stream(torch.utils.data.IterableDataset):
    """A stream that ends after five examples, in the middle of an accumulation."""

    def __iter__(self):
        return iter(examples(5))


def test_mean_equals_trainer_if_a_stream_ends_during_accumulation(tmp_path):
    flags = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_steps": 5}
    theirs = stock(lora("gpt2"), tmp_path, Stream(), **flags)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags), Stream())
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_upgrad_without_conflict_equals_trainer(kind, tmp_path):
    # All examples repeat the same few tokens, so no two of them conflict.
    data = [
        {"input_ids": [5, 6] * n, "attention_mask": [1] * 2 * n, "labels": [5, 6] * n, "task": "abc"[n % 3]}
        for n in (2, 3, 4, 5, 3, 4)
    ]
    flags = {"per_device_train_batch_size": 3, "max_steps": 6, "learning_rate": 1e-3}
    theirs = stock(lora("gpt2", warm=True), tmp_path, data, **flags)
    ours = run(lora("gpt2", warm=True), arguments(tmp_path, jd_weighting="upgrad", **flags, **KINDS[kind]), data)
    assert logged(ours, "jd/conflicts").max() == 0
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_upgrad_with_conflicts_differs_from_trainer(kind, tmp_path):
    theirs = stock(lora("gpt2"), tmp_path)
    ours = run(lora("gpt2"), arguments(tmp_path, **KINDS[kind]))
    assert logged(ours, "jd/conflicts").max() > 0
    assert relative(flat(ours.model), flat(theirs.model)) > 1e-4


@pytest.mark.parametrize("reduction", ["share", "mean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["upgrad", slow("mgda")])
def test_one_big_batch_equals_its_accumulation(weighting, kind, reduction, tmp_path):
    data = examples(13, unlabelled=(4,))
    runs = []
    for size, accumulation in ((6, 1), (2, 3), (1, 6)):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            jd_weighting=weighting,
            jd_group_reduction=reduction,
            max_steps=6,
            **KINDS[kind],
        )
        runs.append(run(lora("gpt2"), args, data))
    for other in runs[1:]:
        assert relative(flat(other.model), flat(runs[0].model)) < 1e-8
        assert relative(logged(other, "loss"), logged(runs[0], "loss")) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_pass_equals_two_passes_with_dropout(accumulation, kind, tmp_path):
    data = examples(14, unlabelled=(3,))
    models = []
    for backward in ("one_pass", "two_pass"):
        flags = {"gradient_accumulation_steps": accumulation, "jd_backward": backward, "max_steps": 6}
        models.append(run(lora("gpt2", dropout=0.2), arguments(tmp_path, **flags, **KINDS[kind]), data).model)
    # The second pass multiplies float32 losses by their weights.
    assert relative(flat(models[0]), flat(models[1])) < 1e-6
