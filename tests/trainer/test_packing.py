"""Packed rows: each document is an instance, as in a padded batch."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, TrainingArguments

from hf_jd import JDTrainer
from hf_jd.packing import packed_documents, unpacked, without_documents
from tests.marks import slow
from tests.models import tiny_llama
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
KINDS = {"instance": {}, "grouped": {"jd_group_column": "task"}, "group": GROUP}


def flattened(n=8):
    """Return examples whose first token has no label, as in the flattening collator, without a mask."""
    data = examples(n)
    for example in data:
        example["labels"] = [-100, *example["labels"][1:]]
    return data


def packing(**settings):
    """Return DataCollatorWithFlattening for examples without attention masks, with any flash attention arguments."""
    inner = DataCollatorWithFlattening(**settings)
    return lambda batch: inner([{k: v for k, v in e.items() if k in ("input_ids", "labels")} for e in batch])


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])},
        {"position_ids": torch.tensor([[2, 3, 4, 2, 3, 2]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6], dtype=torch.int32)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]])},
    ],
    ids=["positions", "from-two", "cu_seq_lens", "seq_idx"],
)
def test_documents_of_one_row_are_found(batch):
    batch = {"input_ids": torch.arange(6)[None], **batch}
    documents = packed_documents(batch)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert unpacked(batch["input_ids"], documents).tolist() == [[0, 1, 2], [3, 4, 0], [5, 0, 0]]


def test_documents_of_padded_rows_are_found():
    positions = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 2, 0, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": torch.ones_like(mask), "position_ids": positions, "attention_mask": mask}
    assert packed_documents(batch, "always").tolist() == [[0, 0, 1, 1, -1], [2, 2, 2, 3, 3]]
    # In transformers, these documents attend to each other, so rows are the instances, unless the user says otherwise.
    assert packed_documents(batch) is None
    assert packed_documents({**batch, "attention_mask": None}).tolist() == [[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]]


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"position_ids": torch.arange(4).repeat(2, 1)},
        {"position_ids": torch.arange(4)[None]},
        # Padding on the left, with positions as in generation.
        {
            "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
        },
    ],
    ids=["none", "rows", "shared", "left"],
)
def test_rows_that_are_not_packed_have_no_documents(batch):
    assert packed_documents({"input_ids": torch.ones(2, 4, dtype=torch.long), **batch}) is None


def test_documents_can_be_left_out():
    batch = packing(return_flash_attn_kwargs=True, return_seq_idx=True)(examples(4))
    documents, keep = packed_documents(batch), torch.tensor([True, False, True, True])
    rest = without_documents({**batch, "jd_group": torch.arange(4)}, documents, keep)
    data = examples(4)
    expected = packing(return_flash_attn_kwargs=True)([data[0], data[2], data[3]])
    for key in ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert rest[key].tolist() == expected[key].tolist()
    assert rest["max_length_q"] == expected["max_length_q"]
    assert rest["jd_group"].tolist() == [0, 2, 3]
    assert packed_documents(rest).max() == 2


@pytest.mark.parametrize("flags", [{}, {"gradient_accumulation_steps": 2}, {"jd_backward": "two_pass"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_packing_equals_padding(name, kind, flags, tmp_path):
    models, trainers = [], []
    for collator in (collate, packing()):
        model = lora(name, warm=True)
        models.append(model)
        args = arguments(tmp_path, per_device_train_batch_size=3, **flags, **KINDS[kind])
        trainers.append(run(model, args, flattened(6), data_collator=collator))
    assert len(trainers[1].jd_state.gramian) > 1
    assert trainers[0].jd_state.names == trainers[1].jd_state.names
    tolerance = 1e-5 if name == "llama" else 1e-6  # float32 in norms and losses, summed in another order
    assert relative(trainers[1].jd_state.gramian, trainers[0].jd_state.gramian) < tolerance
    assert relative(flat(models[1]), flat(models[0])) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_trainer_on_packed_rows(kind, tmp_path):
    flags = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    theirs = run(lora("llama"), arguments(tmp_path, TrainingArguments, **flags), flattened(6), data_collator=packing())
    args = arguments(tmp_path, jd_weighting="mean", **flags, **KINDS[kind])
    ours = run(lora("llama"), args, flattened(6), data_collator=packing())
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert len(ours.jd_state.gramian) > 1


@pytest.mark.filterwarnings("ignore:.*further passes now")
def test_packing_equals_padding_in_full_fine_tuning(tmp_path):
    models = []
    for collator in (collate, packing()):
        args = arguments(tmp_path, per_device_train_batch_size=3, **GROUP)
        models.append(run(tiny_llama(), args, flattened(), data_collator=collator).model)
    assert relative(flat(models[1]), flat(models[0])) < 1e-5


def test_documents_that_attend_to_each_other_are_refused(tmp_path):
    def attending(batch):
        packed = packing()(batch)
        return {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}

    args = arguments(tmp_path, per_device_train_batch_size=3)
    with pytest.raises(
        ValueError, match="instances of the batch mix.*attention across documents .give no attention_mask"
    ):
        run(lora("llama", warm=True), args, flattened(), data_collator=attending)


def test_group_losses_of_a_packed_evaluation_set(tmp_path):
    class Rows(JDTrainer):
        def compute_losses(self, model, inputs):
            losses, counted = super().compute_losses(model, inputs)
            return (losses * counted).sum(1)

    def evaluated(collator, cls=JDTrainer):
        args = arguments(tmp_path, per_device_eval_batch_size=3, **GROUP)
        data = flattened(8)
        data[4]["labels"] = [-100] * len(data[4]["labels"])
        model = lora("llama", warm=True)
        model.config.use_cache = False
        return cls(model, args, train_dataset=data, eval_dataset=data, data_collator=collator).evaluate()

    padded, packed = evaluated(collate), evaluated(packing())
    for task in ("code", "docs", "chat"):
        assert packed[f"eval_{task}_loss"] == pytest.approx(padded[f"eval_{task}_loss"], rel=1e-5)
    assert len({packed[f"eval_{task}_loss"] for task in ("code", "docs", "chat")}) == 3
    # Losses of whole rows belong to no group, but must not stop a run at its first evaluation.
    assert not any("code" in key for key in evaluated(packing(), Rows))


def test_losses_per_packed_row_are_refused(tmp_path):
    class Rows(JDTrainer):
        def compute_losses(self, model, inputs):
            losses, counted = super().compute_losses(model, inputs)
            return (losses * counted).sum(1)

    with pytest.raises(ValueError, match=r"has shape \[1\], but rows of the batch hold several documents"):
        run(lora("llama"), arguments(tmp_path), flattened(), Rows, data_collator=packing())


def test_a_nonfinite_packed_document_is_left_out(tmp_path):
    data = flattened(6)
    token = 36
    for example in data:
        example["input_ids"] = [min(i, token - 1) for i in example["input_ids"]]
    data[1]["input_ids"][2] = token

    class Broken(JDTrainer):
        def compute_losses(self, model, inputs):
            losses, counted = super().compute_losses(model, inputs)
            return losses * torch.where(inputs["input_ids"] == token, torch.inf, 1.0), counted | (
                inputs["input_ids"] == token
            )

    args = arguments(tmp_path, per_device_train_batch_size=3, max_steps=2, **GROUP)
    ours = run(lora("llama", warm=True), args, data, Broken, data_collator=packing())
    assert flat(ours.model).isfinite().all()
    assert logged(ours, "jd/non_finite").sum() == 1
