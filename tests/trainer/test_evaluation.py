"""`eval_<group>_loss`: each group's mean loss, in addition to Trainer's own evaluation."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_jd import JDTrainer
from tests.trainer.runs import TASKS, arguments, collate, examples, lora

HELD_OUT = examples(11, seed=5, unlabelled=(4,))


def evaluated(directory, data=HELD_OUT, cls=JDTrainer, **flags) -> dict[str, float]:
    args = arguments(directory, jd_group_column="task", per_device_eval_batch_size=3, **flags)
    return cls(lora("gpt2"), args, train_dataset=examples(), eval_dataset=data, data_collator=collate).evaluate()


def expected(task: str, smoothing: float = 0.0) -> float:
    """Compute the mean over a group's tokens, one example at a time."""
    model, total, tokens = lora("gpt2").eval(), 0.0, 0
    for example in HELD_OUT:
        if example["task"] == task:
            labels = torch.tensor(example["labels"])[1:]
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits, labels, reduction="none", label_smoothing=smoothing, ignore_index=-100
            )
            total, tokens = total + losses.sum().item(), tokens + int((labels != -100).sum())
    return total / tokens


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_groups_loss_is_the_mean_of_its_tokens(smoothing, tmp_path):
    metrics = evaluated(tmp_path, label_smoothing_factor=smoothing)
    for task in TASKS:
        assert metrics[f"eval_{task}_loss"] == pytest.approx(expected(task, smoothing), rel=1e-6)


def test_trainers_evaluation_is_unchanged(tmp_path):
    plain = arguments(tmp_path, TrainingArguments, per_device_eval_batch_size=3)
    theirs = Trainer(lora("gpt2"), plain, eval_dataset=HELD_OUT, data_collator=collate).evaluate()
    metrics = evaluated(tmp_path)
    assert metrics["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-12)


def test_sets_without_the_column_and_unknown_groups_work(tmp_path):
    plain = [{key: value for key, value in example.items() if key != "task"} for example in HELD_OUT]
    assert not any("code" in key for key in evaluated(tmp_path, plain))
    other = [{**example, "task": "other" if example["task"] == "code" else example["task"]} for example in HELD_OUT]
    metrics = evaluated(tmp_path, other)
    assert metrics["eval_docs_loss"] == pytest.approx(expected("docs"), rel=1e-6)
    assert not any("other" in key or "code" in key for key in metrics)


def test_several_sets_have_their_own_prefix_and_are_logged(tmp_path):
    args = arguments(tmp_path, jd_group_column="task", eval_strategy="steps", eval_steps=2)
    sets = {"held": HELD_OUT, "seen": examples()}
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=examples(), eval_dataset=sets, data_collator=collate)
    trainer.train()
    logged = [key for entry in trainer.state.log_history for key in entry]
    assert logged.count("eval_held_code_loss") == logged.count("eval_seen_code_loss") == 2


class Own(JDTrainer):
    """Losses that need another forward pass."""

    def compute_losses(self, model, inputs):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return logits[:, 0].square().mean(1)


def test_custom_losses_are_computed(tmp_path):
    metrics = evaluated(tmp_path, cls=Own)
    model = lora("gpt2").eval()
    rows = [model(torch.tensor([e["input_ids"]])).logits[0, 0] for e in HELD_OUT if e["task"] == "chat"]
    assert metrics["eval_chat_loss"] == pytest.approx(torch.stack(rows).square().mean().item(), rel=1e-6)


def test_the_best_model_is_chosen_by_a_groups_loss(tmp_path):
    args = arguments(
        tmp_path,
        jd_group_column="task",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        save_steps=2,
        metric_for_best_model="eval_docs_loss",
    )
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=examples(), eval_dataset=HELD_OUT, data_collator=collate)
    trainer.train()
    losses = [entry["eval_docs_loss"] for entry in trainer.state.log_history if "eval_docs_loss" in entry]
    assert trainer.state.best_metric == min(losses)
