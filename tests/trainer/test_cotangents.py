"""A loss that is split at the model's outputs has the same rows as brute force."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

from hf_jd import JDTrainerMixin
from hf_jd.trainer.splitting import cut
from tests.models import tiny_llama
from tests.trainer import own_losses
from tests.trainer.own_losses import CASES, Case, trained, trainer_of
from tests.trainer.runs import lora, relative
from tests.trainer.split_runs import (
    GROUP,
    SPLIT,
    Recorded,
    assert_rows,
    brute,
    grouped,
)

# GPT-2's positions [1, T] belong to no instance; heads are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


@pytest.mark.parametrize("name", SPLIT)
def test_rows_equal_brute_force(name, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path)
    rows, rest = brute(case, case.build().train(), recorded.inputs, 5)
    some = rows.norm(dim=1) > 0
    assert some.all() == (name != "some-only"), "instances whose cotangent is zero have no row"
    assert_rows(recorded, rows[some], rest)


@pytest.mark.parametrize(
    "name", ["contrastive", "two-views", "towers", "penalised", "R-Drop", "hidden-states", "next-tokens"]
)
def test_rows_of_groups_equal_brute_force(name, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path, **GROUP)
    rows, rest = brute(case, case.build().train(), recorded.inputs, 5)
    assert_rows(recorded, grouped(rows, recorded), rest)


@pytest.mark.parametrize("keep", ["true", "false"])
@pytest.mark.parametrize("name", ["contrastive", "two-views", "next-tokens"])
def test_rows_equal_brute_force_however_they_are_stored(name, keep, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path, jd_keep_rows=keep)
    assert_rows(recorded, *brute(case, case.build().train(), recorded.inputs, 5))


@pytest.mark.parametrize("name", CASES)
def test_a_part_that_bypasses_the_outputs_is_reported(name, tmp_path, monkeypatch):
    rests = []

    def noted(*args):
        found = split(*args)
        rests.append(found[1] is not None)
        return found

    split = cut.split
    monkeypatch.setattr(cut, "split", noted)
    Recorded(CASES[name], tmp_path).step(None)
    assert rests == [CASES[name].rest]


def test_a_batch_is_one_objective(tmp_path):
    case = CASES["contrastive"]
    recorded = Recorded(case, tmp_path, jd_objectives="batch")
    rows, _ = brute(case, case.build().train(), recorded.inputs, 5)
    assert relative(recorded.step(None), rows.sum(0)) < 1e-10
    assert relative(recorded.gramian, rows.sum(0).square().sum().view(1, 1)) < 1e-10


# ---- Whose row? ----


def interleaved(trainer, model, inputs, number):
    """Rows 2 i and 2 i + 1 belong to example i."""
    inputs.pop("labels")
    views = {key: torch.stack([value, value.flip(1)], dim=1).flatten(0, 1) for key, value in inputs.items()}
    outputs = model(**views)
    first, second = F.normalize(outputs.logits, dim=-1).view(len(views["input_ids"]) // 2, 2, -1).unbind(1)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first))), outputs


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_jd_instances_assigns_rows(kind, tmp_path):
    class Interleaved(JDTrainerMixin, trainer_of(interleaved)):
        def jd_instances(self, output, instances):
            return torch.arange(len(output)) // (len(output) // instances)

    case = Case(interleaved)
    recorded = Recorded(case, tmp_path, cls=Interleaved, **kind)
    rows, rest = brute(case, case.build(), recorded.inputs, 5, lambda tensor: torch.arange(len(tensor)) // 2)
    assert_rows(recorded, grouped(rows, recorded) if kind else rows, rest)


def repeated(trainer, model, inputs, number):
    """Rows 3 i to 3 i + 2 belong to example i, as several generations per prompt do."""
    labels = inputs.pop("labels")
    outputs = model(**{key: value.repeat_interleave(3, dim=0) for key, value in inputs.items()})
    return F.cross_entropy(outputs.logits, labels.repeat_interleave(3)), outputs


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_rows_that_start_like_another_example_are_refused(kind, tmp_path):
    recorded = Recorded(Case(repeated), tmp_path, **kind)
    with pytest.raises(ValueError, match=r"5 examples, .* shape \[15, 3\], .* to example n // 3, .*`jd_instances`"):
        recorded.step(None)


def test_rows_of_an_uncounted_batch(tmp_path):
    case = CASES["two-views"]
    recorded = Recorded(case, tmp_path)
    del recorded.batch["jd_examples"]
    assert_rows(recorded, *brute(case, case.build().train(), recorded.inputs, 5))


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_rows_of_packed_documents(kind, tmp_path):
    def per_token(trainer, model, inputs, number):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.square().mean(), outputs

    inner = DataCollatorWithFlattening()

    class Packed(Case):
        @property
        def collate(self):
            return lambda batch: inner([{k: v for k, v in e.items() if k in ("input_ids", "labels")} for e in batch])

    case = Packed(per_token, lambda: tiny_llama(use_cache=False), text=True)
    recorded = Recorded(case, tmp_path, **kind)
    starts = recorded.batch["position_ids"] == 0
    documents = starts.long().cumsum(1) - 1
    assert documents.max() == 4
    rows, rest = brute(case, case.build(), recorded.inputs, 5, lambda tensor: documents[:, : tensor.shape[1]])
    # Llama's norms compute in float32.
    assert_rows(recorded, grouped(rows, recorded) if kind else rows, rest, tolerance=1e-6)


# ---- Mixed precision ----


def states_and_tokens(trainer, model, inputs, number):
    """Read two outputs, of which one depends on the other."""
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.loss + outputs.hidden_states[-1].square().mean(), outputs


def twice_read(trainer, model, inputs, number):
    """Read the logits before and after the cast, as distillation does."""
    outputs = model(**inputs)
    return outputs.loss + outputs.logits.square().mean(), outputs


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("loss", [own_losses.next_tokens, own_losses.scaled, states_and_tokens, twice_read])
@pytest.mark.parametrize("build", [lambda: lora("gpt2", warm=True), tiny_llama], ids=["lora", "full"])
def test_rows_of_outputs_cast_by_mixed_precision(build, loss, kind, tmp_path):
    case = Case(loss, lambda: build().float(), text=True)
    flags = {"max_steps": 1, "per_device_train_batch_size": 5, "train_sampling_strategy": "sequential"}
    gramians = []
    for bf16 in (False, True):
        trainer = trained(case, tmp_path, 5, jd_weighting="mean", bf16=bf16, **flags, **kind)
        gramians.append(trainer.jd_state.gramian)
    assert len(gramians[0]) == (3 if kind else 5)
    assert 1e-6 < relative(gramians[1], gramians[0]) < 2e-2


def test_a_gradient_scaler_finds_gradients_times_its_scale(tmp_path):
    case, found = CASES["penalised"], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        recorded = Recorded(case, tmp_path)
        recorded.trainer.accelerator.scaler = scaler
        found.append((recorded.step(torch.arange(5).double()), recorded.gramian))
    assert relative(found[1][0], 1024 * found[0][0]) < 1e-10
    assert relative(found[1][1], found[0][1]) < 1e-10
