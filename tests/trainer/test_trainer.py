"""What a person who knows Trainer expects of JDTrainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_jd import JDSeq2SeqTrainer, JDSeq2SeqTrainingArguments, JDTrainer
from hf_jd.gramian import Engine
from tests.models import tiny_gpt2, tiny_llama
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock

TASK = {"jd_objectives": "group", "jd_group_column": "task"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("flags", [{}, TASK], ids=["instance", "group"])
def test_one_step_moves_lora_b(name, flags, tmp_path):
    before, after = lora(name), lora(name)
    run(after, arguments(tmp_path, max_steps=1, **flags))
    start = dict(before.named_parameters())
    moved = {n: (p - start[n]).abs().max().item() for n, p in after.named_parameters() if "lora_B" in n}
    assert min(moved.values()) > 0


def test_the_update_equals_the_weighted_sum_of_brute_force_rows(tmp_path):
    data = examples(5, unlabelled=(2,))
    model = lora("gpt2", warm=True)
    batch = collate(data)
    counted = batch["labels"][:, 1:] != -100
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Trainer's number of tokens: for GPT-2, it includes the first token, which is never predicted.
    objectives = 4 * nll.sum(1)[counted.any(1)] / (batch["labels"] != -100).sum()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)]) for x in objectives]
    gramian = torch.stack(rows) @ torch.stack(rows).T
    weights = torch.tensor([0.5, 0.1, 0.3, 2.0], dtype=torch.float64)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=5,
        train_sampling_strategy="sequential",
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    before = flat(model)
    trainer = run(model, args, data, weighting=lambda g: weights)
    assert relative(trainer.jd_state.gramian, gramian) < 1e-6
    assert relative(trainer.jd_state.losses, objectives.detach()) < 1e-6
    assert relative(before - flat(model), weights @ torch.stack(rows)) < 1e-6


def test_any_callable_is_a_weighting(tmp_path):
    seen = []

    def halves(gramian):
        seen.append(gramian)
        return gramian.new_full((len(gramian),), 0.5)

    ours = run(lora("gpt2"), arguments(tmp_path), weighting=halves)
    theirs = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean"))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert len(seen) == 4
    assert seen[0].shape == (2, 2)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.tensor([1.0, torch.nan]), [0.5, 0.5]], ids=str)
def test_a_weighting_that_returns_something_else_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="has to return 2 finite weights"):
        run(lora("gpt2"), arguments(tmp_path), weighting=lambda gramian: wrong)


@pytest.mark.parametrize("flags", [{}, TASK], ids=["instance", "group"])
def test_one_objective_equals_the_stock_step(flags, tmp_path):
    data = [{**example, "task": "same"} for example in examples()]
    settings = {"per_device_train_batch_size": 2 if flags else 1, "max_steps": 3}
    theirs = stock(lora("gpt2"), tmp_path, data, **settings)
    ours = run(lora("gpt2"), arguments(tmp_path, **settings, **flags), data)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


@pytest.mark.parametrize("kind", ["instance", "token"])
def test_custom_losses_equal_a_custom_trainer(kind, tmp_path):
    class Own(JDTrainer):
        def compute_losses(self, model, inputs):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            tokens = outputs.logits.square().mean(-1)
            counted = inputs["attention_mask"].bool()
            return (tokens, counted) if kind == "token" else tokens.masked_fill(~counted, 0).sum(1)

    class Reference(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            tokens = outputs.logits.square().mean(-1).masked_fill(inputs["attention_mask"] == 0, 0)
            return tokens.sum() / (num_items_in_batch if kind == "token" else len(tokens))

    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean"), cls=Own)
    theirs = run(lora("gpt2"), arguments(tmp_path, TrainingArguments), cls=Reference)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-8


def test_means_of_separately_weighed_micro_batches_are_averaged(tmp_path):
    # All micro-batches are the same, so three equal one. The head computes in float32, which rounds thirds.
    data = examples(2) * 6
    flags = {"jd_group_reduction": "mean", "train_sampling_strategy": "sequential", "max_steps": 2, **TASK}
    one = run(lora("gpt2"), arguments(tmp_path, **flags), data)
    flags |= {"jd_scope": "micro_batch", "gradient_accumulation_steps": 3}
    three = run(lora("gpt2"), arguments(tmp_path, **flags), data)
    assert (
        relative(flat(three.model), flat(one.model)) < 1e-7
    )  # The head computes in float32, which rounds a third of a gradient differently.
    assert relative(logged(three, "loss"), logged(one, "loss")) < 1e-6


@pytest.mark.parametrize("kind", ["token", "instance"])
def test_a_loss_function_may_return_unreduced_losses(kind, tmp_path):
    def unreduced(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        counted = targets != -100
        tokens = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (tokens, counted) if kind == "token" else tokens.sum(1)

    def reduced(outputs, labels, num_items_in_batch=None):
        losses = unreduced(outputs, labels)
        return losses[0].sum() / num_items_in_batch if kind == "token" else losses.mean()

    data = examples()
    flags = {"max_steps": 5, "gradient_accumulation_steps": 3 if kind == "token" else 1}
    theirs = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **flags), compute_loss_func=reduced)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags), compute_loss_func=unreduced)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert 0 < ours.evaluate(data)["eval_loss"] < (5 if kind == "token" else 50)


def test_custom_instance_losses_are_exact_over_accumulation(tmp_path):
    class Own(JDTrainer):
        def compute_losses(self, model, inputs):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return logits.square().mean(-1).masked_fill(inputs["attention_mask"] == 0, 0).sum(1)

    models = [
        run(lora("gpt2"), arguments(tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=a), cls=Own)
        for b, a in ((6, 1), (2, 3))
    ]
    assert relative(flat(models[0].model), flat(models[1].model)) < 1e-8


def test_micro_batches_can_be_weighed_separately(tmp_path):
    sizes = []

    def mean(gramian):
        sizes.append(len(gramian))
        return gramian.new_full((len(gramian),), 1 / len(gramian))

    flags = {"gradient_accumulation_steps": 3, "max_steps": 2}
    run(lora("gpt2"), arguments(tmp_path, jd_scope="micro_batch", **flags), weighting=mean)
    assert sizes == [2] * 6
    sizes.clear()
    run(lora("gpt2"), arguments(tmp_path, **flags), weighting=mean)
    assert sizes == [6] * 2


@pytest.mark.parametrize("where", ["loss", "logits"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"jd_backward": "two_pass"}, TASK, {**TASK, "jd_backward": "two_pass"}],
    ids=lambda flags: str(len(flags)),
)
def test_a_nonfinite_loss_is_left_out(where, flags, tmp_path):
    class Broken(JDTrainer):
        def compute_losses(self, model, inputs):
            broken = self.state.global_step == 1
            factors = torch.ones(len(inputs["labels"]), 1)
            if broken and len(factors) == 4:
                factors[2] = torch.inf
            handle = model.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output * factors[..., None] if where == "logits" else None
            )
            losses, counted = super().compute_losses(model, inputs)
            handle.remove()
            return losses * factors if where == "loss" else losses, counted

    class Without(JDTrainer):
        def compute_losses(self, model, inputs):
            losses, counted = super().compute_losses(model, inputs)
            if self.state.global_step == 1:
                counted[2] = False
            return losses, counted

    args = arguments(tmp_path, jd_check=False, per_device_train_batch_size=4, max_steps=3, **flags)
    data = examples(16)
    ours, theirs = (run(lora("gpt2", warm=True), args, data, cls=cls) for cls in (Broken, Without))
    assert logged(ours, "jd/non_finite").tolist() == [0, 1, 0]
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert logged(ours, "loss").tolist() == logged(theirs, "loss").tolist()


@pytest.mark.parametrize("backward", ["one_pass", "two_pass"])
def test_a_gradient_scaler_finds_gradients_times_its_scale(backward, tmp_path):
    gradients, gramians = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trainer = JDTrainer(lora("gpt2", warm=True), arguments(tmp_path, jd_backward=backward), data_collator=collate)
        trainer.accelerator.scaler = scaler
        loss = trainer.training_step(trainer.model, collate(examples(3)), torch.tensor(20))
        gradients.append((loss, torch.cat([p.grad.flatten() for p in trainer.trainable()])))
        gramians.append(trainer.jd_state.gramian)
    assert gradients[0][0] == gradients[1][0]
    assert relative(gradients[1][1], 1024 * gradients[0][1]) < 1e-6
    assert relative(gramians[1], gramians[0]) < 1e-6


def test_a_gradient_scaler_sees_an_overflow(tmp_path):
    class Broken(JDTrainer):
        def compute_losses(self, model, inputs):
            losses, counted = super().compute_losses(model, inputs)
            return losses * torch.inf, counted

    trainer = Broken(lora("gpt2", warm=True), arguments(tmp_path, jd_check=False), data_collator=collate)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.training_step(trainer.model, collate(examples(3)), torch.tensor(20))
    assert not any(p.grad.isfinite().any() for p in trainer.trainable())


def test_an_update_with_nothing_to_learn_is_no_step(tmp_path):
    model = lora("gpt2")
    trainer = run(model, arguments(tmp_path, weight_decay=0.1, max_steps=2), examples(4, unlabelled=(0, 1, 2, 3)))
    assert torch.equal(flat(model), flat(lora("gpt2")))
    assert logged(trainer, "loss").tolist() == [0, 0]


def test_the_engine_follows_model_init(tmp_path):
    # Trainer builds a new model when it trains.
    trainer = JDTrainer(
        model_init=lambda: lora("gpt2"),
        args=arguments(tmp_path),
        train_dataset=examples(),
        data_collator=collate,
    )
    trainer.train()
    first = flat(trainer.model)
    assert not torch.equal(first, flat(lora("gpt2")))
    trainer.train()
    assert torch.equal(flat(trainer.model), first)


def test_an_engine_is_built_once_per_run(tmp_path, monkeypatch):
    made = []
    construct = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: made.append(k) or construct(self, *a, **k))
    trainer = run(lora("gpt2"), arguments(tmp_path, jd_check=False))
    assert [options["check"] for options in made] == [False]
    trainer.train()
    assert len(made) == 2


@pytest.mark.parametrize(("keep", "materialise"), [("auto", True), ("true", True), ("false", False), ("4KB", False)])
def test_keep_rows_decides_what_is_stored(keep, materialise, tmp_path, monkeypatch):
    asked = []
    compute = Engine.compute_jacobian
    monkeypatch.setattr(Engine, "compute_jacobian", lambda *args: asked.append(args[3]) or compute(*args))
    plain = run(lora("gpt2"), arguments(tmp_path))
    asked.clear()
    ours = run(lora("gpt2"), arguments(tmp_path, jd_keep_rows=keep))
    assert asked == [materialise] * 4
    assert relative(flat(ours.model), flat(plain.model)) < 1e-10


def test_evaluation_equals_trainer_and_leaves_training_metrics_alone(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 4}
    data = Dataset.from_list(examples(6, seed=3)).remove_columns("task")
    theirs = run(lora("gpt2"), arguments(tmp_path, TrainingArguments, **settings), eval_dataset=data)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **settings), eval_dataset=data)
    assert relative(logged(ours, "eval_loss"), logged(theirs, "eval_loss")) < 1e-6
    assert all("jd/min_gw" in entry for entry in ours.state.log_history if "loss" in entry)
    assert not any("jd/min_gw" in entry for entry in ours.state.log_history if "eval_loss" in entry)


def test_callbacks_can_read_the_last_steps_state(tmp_path):
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            states.append(trainer.jd_state)

    trainer = JDTrainer(
        lora("gpt2"), arguments(tmp_path, **TASK), train_dataset=examples(), data_collator=collate, callbacks=[Watch()]
    )
    trainer.train()
    for state in states:
        m = len(state.names)
        assert (state.gramian.shape, state.weights.shape, state.losses.shape) == ((m, m), (m,), (m,))
        assert not state.losses.requires_grad
    assert len({id(state) for state in states}) == 4


@pytest.mark.parametrize("weighting", ["upgrad", "gradvac", "dwa"])
def test_resuming_gives_the_same_parameters(weighting, tmp_path):
    # The last two weightings remember past steps and draw random numbers, or read losses.
    flags = {"max_steps": 6, "per_device_train_batch_size": 4, "jd_weighting": weighting, **TASK}
    saving = {"save_strategy": "steps", "save_steps": 3, **flags}
    whole = run(lora("gpt2", dropout=0.1), arguments(tmp_path / "a", **flags))
    run(lora("gpt2", dropout=0.1), arguments(tmp_path / "b", **saving))
    resumed = JDTrainer(
        lora("gpt2", dropout=0.1),
        arguments(tmp_path / "b", **saving),
        train_dataset=examples(),
        data_collator=collate,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_the_seq2seq_trainer_takes_its_own_arguments(tmp_path):
    args = arguments(tmp_path, JDSeq2SeqTrainingArguments, predict_with_generate=False)
    trainer = run(lora("llama"), args, cls=JDSeq2SeqTrainer)
    assert trainer.jd_state is not None


def test_compute_loss_returns_trainers_number_in_training(tmp_path):
    batch, items = collate(examples(4)), torch.tensor(17)
    losses = []
    for cls, args in ((Trainer, arguments(tmp_path, TrainingArguments)), (JDTrainer, arguments(tmp_path))):
        trainer = cls(tiny_gpt2(), args)
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_full_fine_tuning_by_group_trains_tied_embeddings(tmp_path):
    theirs = run(tiny_llama(tie_word_embeddings=True), arguments(tmp_path, TrainingArguments))
    ours = run(tiny_llama(tie_word_embeddings=True), arguments(tmp_path, jd_weighting="mean", **TASK))
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
